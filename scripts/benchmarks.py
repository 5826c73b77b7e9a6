"""BENCHMARKS.md: sections that scripts write, each with its command, commit, machine and versions.

A section stands between two comment lines that carry its name; writing it again replaces it and nothing else.
"""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax

from moeret.config import Precision

FILE = Path(__file__).resolve().parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Every section is written by the script that it names. Ratios within one run hold; absolute times are of one machine.
"""
VERSIONS = (
    "moeret",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "hnswlib",
    "tokenizers",
    "bm25s",
    "ir_measures",
)


def write_section(name: str, title: str, body: str, extra_versions: dict[str, str] | None = None) -> None:
    """Replaces or appends the section `name` of BENCHMARKS.md."""
    versions = {package: version(package) for package in VERSIONS} | (extra_versions or {})
    facts = [
        f"- command: `{command()}`",
        f"- commit: `{COMMIT}`",
        f"- machine: {processor()}, {cores()}, {memory_gib():.0f} GiB, Python {platform.python_version()}",
        f"- versions: {', '.join(f'{package} {number}' for package, number in versions.items())}",
    ]
    if not FILE.is_file():
        FILE.write_text(HEAD)
    write_block(FILE, name, "\n".join([f"## {title}", "", *facts, "", body.strip()]))


def write_block(file: Path, name: str, text: str) -> None:
    """Replaces what stands between a file's comment lines of that name, or appends it with them."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block, old = f"{begin}\n{text}\n{end}", file.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    file.write_text(pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n")


def command() -> str:
    """How this program was started, from the repository's root, with places on this machine left out."""
    main = sys.modules["__main__"]
    start = f"python -m {main.__spec__.name}" if main.__spec__ else f"python {Path(sys.argv[0]).name}"
    return " ".join([start, *(Path(word).name if word.startswith(("/", "..")) else word for word in sys.argv[1:])])


def commit() -> str:
    """The commit of the working tree, with a mark if it has changes."""
    root = FILE.parent
    name = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "moeret", "experiments", "scripts"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return name.stdout.strip() + (" with changes" if dirty.stdout.strip() else "")


COMMIT = commit()
"""Of the code that was imported: a long run may see another commit at its end."""


def processor() -> str:
    """The processor's model, and whether it multiplies bfloat16 matrices in hardware."""
    lines = _processor_lines()
    model = re.search(r"model name\s*: (.*)", lines)
    units = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in lines]
    return (model.group(1) if model else platform.processor()) + (f" with {units[0]}" if units else "")


def cores() -> str:
    """How many there are, and how many this process may use if not all."""
    every = os.cpu_count()
    used = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return f"{every} cores" + (f" of which {used} used" if used != every else "")


def fast_precision() -> Precision:
    """bfloat16 where the processor or an accelerator multiplies it, float32 where that would be slower."""
    hardware = jax.default_backend() != "cpu" or re.search("avx512_bf16|amx_bf16", _processor_lines())
    return "bfloat16" if hardware else "float32"


def _processor_lines() -> str:
    return Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""


def memory_gib() -> float:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def interleaved_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after another in every round, after two rounds to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(2 + repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= 2:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(own) for name, own in taken.items()}


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    marks = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, marks, *rows])
