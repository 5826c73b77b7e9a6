"""Reading BEIR folders, and saying what is wrong with them before any work is done; writing them.

A folder holds `corpus.jsonl` ({"_id", "title", "text"} a line, and "metadata" if need be), `queries.jsonl` ({"_id", "text"}) and
`qrels/SPLIT.tsv` (a header line, then query-id, corpus-id, score).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeret.errors import DataError
from moeret.types import BASE_EXPERT, SHARED_EXPERT, Document

Qrels = dict[str, dict[str, int]]
"""query id -> document id -> relevance; only relevance above 0 counts as a positive."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {BASE_EXPERT, SHARED_EXPERT, "all", "auto", "oracle"}
_SHOWN_PROBLEMS = 3
_DEEPEST = 100
"""Objects and lists of metadata within one another at most: Python reads and writes not many more."""


class Problems:
    """Collects what is wrong with one file, to raise it all as one sentence."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self._shown: list[str] = []

    def add(self, problem: str) -> None:
        """Notes one problem."""
        self.count += 1
        if len(self._shown) < _SHOWN_PROBLEMS:
            self._shown.append(problem)

    def raise_if_any(self) -> None:
        """Raises DataError naming the file, the first problems, and how many more there are."""
        if self.count:
            more = f"; and {self.count - len(self._shown)} more" if self.count > len(self._shown) else ""
            raise DataError(f"{self.path}: {'; '.join(self._shown)}{more}")


@dataclass(frozen=True, slots=True)
class Judged:
    """Queries with at least one relevant document, and their judgments."""

    queries: dict[str, str]
    qrels: Qrels


@dataclass(frozen=True, slots=True)
class Domain:
    """One named corpus with the judged queries of the splits that were asked for."""

    name: str
    path: Path
    corpus: list[Document]
    splits: dict[str, Judged]


def parse_domains(arguments: list[str]) -> dict[str, Path]:
    """Turns `["law=data/law", ...]` into {"law": Path("data/law")}.

    Raises:
      DataError: no `=`, a name twice, a name that cannot name a file, or a folder that is not there.
    """
    domains: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or not folder:
            raise DataError(f"--domain {argument}: expected NAME=BEIR_DIR, for example law=data/law")
        check_name(name)
        if name in domains:
            raise DataError(f"--domain {name} is given twice; every domain needs a name of its own")
        if not Path(folder).is_dir():
            raise DataError(f"--domain {argument}: there is no directory {folder}")
        domains[name] = Path(folder)
    return domains


def parse_deletions(arguments: list[str]) -> dict[str, list[str]]:
    """Turns `["law=gone.jsonl", "more.jsonl"]` into {"law": [ids], "": [ids]}, from files of {"_id": ...} lines.

    Raises:
      DataError: a file that cannot be read, or a line without an id.
    """
    out: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        named = bool(equals) and _NAME.fullmatch(name) is not None
        own = out.setdefault(name if named else "", [])
        path = Path(file if named else argument)
        problems = Problems(path)
        for number, row in _rows(path, problems):
            try:
                own.append(_id(row))
            except DataError as error:
                problems.add(f"line {number}: {error}")
        problems.raise_if_any()
    return out


def check_name(name: str) -> None:
    """Raises DataError unless `name` can name a domain and its files."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise DataError(
            f"{name!r} cannot name a domain: use letters, digits, dot, dash and underscore, "
            f"starting with a letter or digit, at most 64, and none of {', '.join(sorted(_RESERVED))}"
        )


def read_domain(name: str, path: Path, splits: tuple[str, ...], optional: tuple[str, ...] = ()) -> Domain:
    """Reads a BEIR folder with exactly these splits, so that no code can see another one.

    Raises:
      DataError: anything missing or malformed, with file and line. Splits in `optional` may be absent.
    """
    corpus = read_corpus(path / "corpus.jsonl")
    wanted = {split: path / "qrels" / f"{split}.tsv" for split in (*splits, *optional)}
    missing = [split for split in splits if not wanted[split].is_file()]
    if missing:
        raise DataError(
            f"{wanted[missing[0]]} is not there; domain {name} needs judged queries in its {missing[0]} split"
            + (" (an expert without any: moeret experts add --label-free)" if missing[0] == "train" else "")
        )
    present = {split: file for split, file in wanted.items() if file.is_file()}
    queries = read_queries(path / "queries.jsonl") if present else {}
    known = {document.id for document in corpus}
    judged = {split: _judged(queries, read_qrels(file, queries.keys(), known), file) for split, file in present.items()}
    return Domain(name, path, corpus, judged)


def write_domain(domain: Domain) -> Path:
    """Writes the domain's BEIR folder, with its corpus and splits, and returns where it is. No id may hold a tab or a line end."""
    folder = domain.path
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    queries = {id: text for judged in domain.splits.values() for id, text in judged.queries.items()}
    _write_lines(folder / "corpus.jsonl", map(json.dumps, map(corpus_row, domain.corpus)))
    _write_lines(folder / "queries.jsonl", (json.dumps({"_id": id, "text": text}) for id, text in queries.items()))
    for split, judged in domain.splits.items():
        rows = (f"{query}\t{id}\t{score}" for query, own in judged.qrels.items() for id, score in own.items())
        _write_lines(folder / "qrels" / f"{split}.tsv", ("query-id\tcorpus-id\tscore", *rows))
    return folder


def corpus_row(document: Document) -> dict[str, Any]:
    """What a line of a corpus says of a document; `document_of` is the inverse."""
    row = {"_id": document.id, "title": document.title, "text": document.text}
    return row | ({"metadata": json.loads(document.metadata)} if document.metadata else {})


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _judged(queries: dict[str, str], qrels: Qrels, file: Path) -> Judged:
    relevant = {query: documents for query, documents in qrels.items() if max(documents.values()) > 0}
    if not relevant:
        raise DataError(f"{file}: no query has a relevant document (a score above 0)")
    return Judged({query: queries[query] for query in relevant}, relevant)


def read_corpus(path: Path) -> list[Document]:
    """Reads a corpus.jsonl.

    Raises:
      DataError: the file is missing or empty, a line is malformed, or an id comes twice.
    """
    problems, lines, documents = Problems(path), {}, []
    for number, row in _rows(path, problems):
        try:
            document = document_of(row)
        except DataError as error:
            problems.add(f"line {number}: {error}")
            continue
        if document.id in lines:
            problems.add(f"line {number}: id {short(document.id)} is already on line {lines[document.id]}")
        lines.setdefault(document.id, number)
        documents.append(document)
    problems.raise_if_any()
    if not documents:
        raise DataError(f"{path}: the corpus is empty")
    return documents


def document_of(row: dict[str, Any]) -> Document:
    """The document that a line of a corpus says. Raises DataError, without the place, if it says none."""
    return Document(id=_id(row), title=_text(row, "title", ""), text=_text(row, "text"), metadata=_metadata(row))


def read_queries(path: Path) -> dict[str, str]:
    """Reads a queries.jsonl into query id -> text. Raises DataError as read_corpus does."""
    problems, queries = Problems(path), {}
    for number, row in _rows(path, problems):
        try:
            query, text = _id(row), _text(row, "text")
        except DataError as error:
            problems.add(f"line {number}: {error}")
            continue
        if query in queries:
            problems.add(f"line {number}: query id {query!r} comes twice")
        elif not text.strip():
            problems.add(f"line {number}: query {query!r} is empty")
        queries[query] = text
    problems.raise_if_any()
    return queries


def read_qrels(path: Path, queries: Any, documents: Any) -> Qrels:
    """Reads a qrels file whose ids must all be among `queries` and `documents` (containers of ids)."""
    problems: Problems = Problems(path)
    qrels: Qrels = {}
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\r\n").split("\t")
            header = number == 1 and not re.fullmatch(r"-?\d+", cells[-1])
            if header or not line.strip():
                continue
            if len(cells) != 3:
                problems.add(
                    f"line {number}: expected query-id, corpus-id and score between tabs, got {line.strip()[:80]!r}"
                )
                continue
            query, document, score = cells
            if query not in queries:
                problems.add(f"line {number}: query {query!r} is not in queries.jsonl")
            if document not in documents:
                problems.add(f"line {number}: document {document!r} is not in corpus.jsonl")
            try:
                qrels.setdefault(query, {})[document] = int(score)
            except ValueError:
                problems.add(f"line {number}: score {score[:20]!r} is not a whole number")
    problems.raise_if_any()
    if not qrels:
        raise DataError(f"{path}: there are no judgments")
    return qrels


def carve_dev(train: Judged, share: float = 0.1) -> tuple[Judged, Judged]:
    """Splits train into (train, dev) by a hash of the query id: the same queries whoever asks.

    Raises:
      DataError: fewer than two queries, so that one side would be empty.
    """
    if len(train.queries) < 2:
        raise DataError(
            "one judged train query leaves nothing to carve a dev split from; give at least two, or a dev split"
        )
    chosen = set(sample_ids(train.queries, min(max(1, round(share * len(train.queries))), len(train.queries) - 1)))
    dev = {query for query in train.queries if query in chosen}
    return _only(train, train.queries.keys() - dev), _only(train, dev)


def seen_queries(judged: Judged, train: Judged) -> np.ndarray:
    """Bool [Q]: for which queries some relevant document is a positive of `train`; the others' are *unseen*.

    Seen queries measure memory as well as understanding (Evaluating Interpolation and Extrapolation Performance of Neural
    Retrieval Models, CIKM 2022).
    """
    positives = {id for documents in train.qrels.values() for id, score in documents.items() if score > 0}
    return np.array(
        [any(score > 0 and id in positives for id, score in documents.items()) for documents in judged.qrels.values()]
    )


def sample(judged: Judged, most: int) -> Judged:
    """At most `most` queries, always the same ones."""
    return _only(judged, set(sample_ids(judged.queries, most)))


def sample_ids(ids: Any, most: int) -> list[str]:
    """At most `most` of these ids in a fixed pseudo-random order that does not depend on the others' presence."""
    return sorted(ids, key=lambda id: hashlib.sha256(id.encode()).digest())[:most]


def _only(judged: Judged, keep: Any) -> Judged:
    return Judged(
        {query: text for query, text in judged.queries.items() if query in keep},
        {query: documents for query, documents in judged.qrels.items() if query in keep},
    )


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file with their line numbers; what is not one is added to `problems`."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = row_of(line)
            except DataError as error:
                problems.add(f"line {number}: {error}")
                continue
            yield number, row


def row_of(line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises DataError, without the place, if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({getattr(error, 'msg', type(error).__name__)}): {line.strip()[:60]!r}") from None
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {line.strip()[:60]!r}")
    return row


def _id(row: dict[str, Any]) -> str:
    if "_id" not in row:
        raise lacking("_id", row)
    value = row["_id"]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"_id must be a non-empty string, got {short(value)}")
    return encodable(value, "_id")


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise DataError(f"{key} must be a string, got {short(value)}") if key in row else lacking(key, row)
    return encodable(value, key)


def lacking(key: str, row: Mapping[str, Any]) -> DataError:
    """What to raise for a row that has others than the wanted columns."""
    names = ", ".join(map(str, row)) or "nothing"
    return DataError(f"there is no {key}; it has {names if len(names) <= 200 else f'{names[:197]}...'}")


def _metadata(row: dict[str, Any]) -> str:
    value = row.get("metadata") or {}
    if not isinstance(value, dict):
        raise DataError(f"metadata must be a JSON object, got {short(value)}")
    if _is_deep(value):
        raise DataError(f"metadata must not have more than {_DEEPEST} objects or lists within one another")
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except ValueError:
        raise DataError(f"metadata must have finite numbers, got {short(value)}") from None
    except (TypeError, RecursionError) as error:
        raise DataError(f"metadata cannot be written as JSON: {error}") from None
    return encodable(text, "metadata") if value else ""


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [own for one in level for own in (one.values() if isinstance(one, dict) else one)]
        level = [own for own in level if isinstance(own, (dict, list))]
    return bool(level)


def short(value: Any) -> str:
    """The value as a message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def encodable(value: str, key: str) -> str:
    """The value, if it can be written. Raises DataError if it is not valid Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{key} is not valid Unicode text") from None
    return value
