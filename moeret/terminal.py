"""What the command line prints, and where."""

import json
import re
import sys
from typing import Any

from rich.console import Console

OUT = Console(highlight=False)
"""Standard output, for people."""


def fail(message: str) -> None:
    """Ends the program with an error."""
    complain(f"error: {message}")
    sys.exit(1)


def complain(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"moeret: {message}\n")


def print_json(value: Any) -> None:
    """Standard output, for programs."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def shown_line(text: str, width: int) -> str:
    """One line of at most `width` characters, without control characters that could drive the terminal."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
