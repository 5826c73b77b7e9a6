"""What mkdocs calls: puts README.md and BENCHMARKS.md, which lie above docs, into the site, with links that hold in both places."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ABOVE = {"README.md": "index.md", "BENCHMARKS.md": "BENCHMARKS.md"}
"""Files beside the folder docs, and which pages of the site they are."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files from above, as if they lay in docs."""
    root = Path(config.config_file_path).parent
    for name, page in ABOVE.items():
        files.append(File.generated(config, page, content=(root / name).read_text().replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    r"""Makes the links of a page to the files from above lead to their pages, and `a\|b` in a table mean a|b, as on GitHub."""
    for name, page in ABOVE.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), markdown)
