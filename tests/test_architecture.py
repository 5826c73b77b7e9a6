"""docs/architecture.md shows the rooms and arrows as they are, and the arrows point one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moeret"
ORDER = ["words", "data", "models", "training retrieval", "evaluation serving integrations", "quickstart", "cli"]
WORDS = {
    "errors",
    "types",
    "config",
    "artifact",
    "hub",
    "lock",
    "metrics",
    "processes",
    "progress",
    "terminal",
    "threads",
}
ONE_IMPORTER = {
    "bm25s": "data/lexical.py",
    "datasets": "data/convert.py",
    "fastapi": "serving/app.py",
    "haystack": "integrations/haystack.py",
    "hnswlib": "retrieval/hnsw.py",
    "httpx2": "serving/client.py",
    "huggingface_hub": "hub.py",
    "ir_measures": "metrics.py",
    "langchain_core": "integrations/langchain.py",
    "llama_index": "integrations/llama_index.py",
    "matplotlib": "evaluation/pictures.py",
    "orbax": "training/checkpoint.py",
    "prometheus_client": "serving/measures.py",
    "pyarrow": "data/records.py",
    "ray": "retrieval/ray_",
    "sqlite3": "retrieval/documents.py",
    "tokenizers": "data/tokenizer.py",
    "tyro": "cli/",
    "uvicorn": "serving/",
}


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module given as the parts of its path below the package."""
    return "words" if parts[0] in WORDS else parts[0]


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def arrows() -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    out: dict[str, set[str]] = {}
    for path in files():
        room = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
        own = out.setdefault(room, set())
        for name in imports(path):
            if name.startswith("moeret."):
                own.add(room_of(tuple(name.split(".")[1:])))
        own.discard(room)
    return out


def test_arrows_point_one_way_and_training_and_retrieval_never_meet():
    place = {room: number for number, rooms in enumerate(ORDER) for room in rooms.split()}
    wrong = [(room, other) for room, others in arrows().items() for other in others if place[other] >= place[room]]
    assert wrong == []


def test_the_page_shows_these_arrows_and_files():
    page = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"```arrows\n(.*?)```", page, re.DOTALL).group(1)
    shown = {line.split(" -> ")[0]: set(line.split(" -> ")[1].split()) for line in block.strip().splitlines()}
    assert shown == {room: others for room, others in arrows().items() if others}
    missing = [
        path.relative_to(PACKAGE).as_posix()
        for path in files()
        if path.name != "__init__.py" and f"`{path.relative_to(PACKAGE).as_posix()}`" not in page
    ]
    assert missing == []
    listed = re.findall(r"`((?:\w+/)?\w+\.py)`", page)
    assert [name for name in listed if not ((PACKAGE / name).is_file() or (ROOT / name).is_file())] == []


def test_each_of_these_libraries_has_one_importer():
    for library, home in ONE_IMPORTER.items():
        users = [
            path.relative_to(PACKAGE).as_posix()
            for path in files()
            if any(name == library or name.startswith(f"{library}.") for name in imports(path))
        ]
        assert users and all(user.startswith(home) for user in users), library


def test_nothing_can_unpickle():
    banned = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert [(path, name) for path in files() for name in imports(path) if name.split(".")[0] in banned] == []
    assert not any("allow_pickle" in path.read_text() for path in files())


def test_searching_imports_no_training_code():
    code = (
        "import sys, moeret, moeret.cli; moeret.Retriever;"
        "print(*[m for m in sys.modules if m.startswith(('moeret.training', 'moeret.evaluation', 'orbax'))])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_files_hold_one_idea():
    assert [path.name for path in files() if len(path.read_text().splitlines()) > 410] == []
