"""The quickstart's corpora: documentation of the Python libraries on this machine, one BEIR folder per library.

A document is a docstring without its summary line; the summary line is the query that asks for it. Sources are parsed,
never imported.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeret.data.beir import Domain, Judged, sample_ids, write_domain
from moeret.errors import DataError
from moeret.types import Document

STANDARD_LIBRARY = "python"
_SKIPPED = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "__pycache__", "_vendor", "examples"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPLITS = {"train": 0.7, "dev": 0.15, "test": 0.15}


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented function, class or module."""

    name: str
    summary: str
    rest: str


def installed_libraries() -> dict[str, Path]:
    """The standard library and the libraries that moeret itself needs: name -> source folder."""
    libraries = {STANDARD_LIBRARY: Path(sysconfig.get_path("stdlib"))}
    for requirement in importlib.metadata.requires("moeret") or []:
        if ";" in requirement:  # an optional extra, or another platform's
            continue
        name = re.match(r"[\w-]+", requirement).group().replace("-", "_")
        name = {"orbax_checkpoint": "orbax"}.get(name, name)
        spec = importlib.util.find_spec(name) if name != "PyStemmer" else None
        if spec and spec.submodule_search_locations:
            libraries[name] = Path(next(iter(spec.submodule_search_locations)))
    return libraries


def read_library(name: str, folder: Path) -> list[Entry]:
    """The usable docstrings of a library's public names, in file order, no summary and no text twice."""
    entries: dict[str, Entry] = {}
    texts: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part in _SKIPPED or (part.startswith("_") and part != "__init__") for part in parts):
            continue
        prefix = [part for part in ((name, *parts) if name != STANDARD_LIBRARY else parts) if part != "__init__"]
        for entry in _documented(path, ".".join(prefix)):
            key, text = _normal(entry.summary), _normal(entry.rest)
            if key not in entries and text not in texts and key not in text:
                entries[key] = entry
                texts.add(text)
    return list(entries.values())


def write_domains(out: Path, *, per_library: int, libraries: int) -> dict[str, Path]:
    """Writes BEIR folders of the `libraries` best-documented libraries, at most `per_library` documents each.

    Raises:
      DataError: fewer than two libraries on this machine are documented well enough.
    """
    read = {name: read_library(name, folder) for name, folder in installed_libraries().items()}
    usable = {name: entries for name, entries in read.items() if len(entries) >= 100}
    if len(usable) < 2:
        raise DataError(
            "fewer than two installed libraries have 100 usable docstrings, so there is nothing to route between"
        )
    best = sorted(usable, key=lambda name: (name != STANDARD_LIBRARY, -len(usable[name]), name))[:libraries]
    return {name: write_domain(_domain(name, out / name, usable[name], per_library)) for name in best}


def _documented(path: Path, prefix: str) -> Iterator[Entry]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other people's sources warn of is not ours to report
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return  # a file for another Python, or none at all
    yield from _entries(tree, prefix)


def _entries(node: ast.AST, prefix: str) -> Iterator[Entry]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring and (entry := _entry(prefix, inspect.cleandoc(docstring))):
        yield entry
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield from _entries(child, f"{prefix}.{child.name}")


def _entry(name: str, docstring: str) -> Entry | None:
    first, _, rest = docstring.partition("\n\n")
    summary = " ".join(first.split())
    usable = 4 <= len(summary.split()) <= 40 and len(rest.strip()) >= 80 and summary.isprintable()
    usable = usable and not _SURROGATE.search(rest)  # which no corpus may hold
    return Entry(name, summary, rest.strip()) if usable else None


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _domain(name: str, folder: Path, entries: list[Entry], most: int) -> Domain:
    by_name = {f"{entry.name}#{number}": entry for number, entry in enumerate(entries)}
    chosen = {id: by_name[id] for id in sample_ids(by_name, most)}
    corpus = [Document(id, entry.rest, entry.name) for id, entry in chosen.items()]
    ids, start, splits = list(chosen), 0.0, {}
    for split, share in _SPLITS.items():
        own = ids[round(start * len(ids)) : round((start + share) * len(ids))]
        start += share
        queries = {f"ask-{id}": chosen[id].summary for id in own}
        splits[split] = Judged(queries, {f"ask-{id}": {id: 1} for id in own})
    return Domain(name, folder, corpus, splits)
