"""Rows of anchor, positive and negatives, as sentence-transformers and Hugging Face's data sets have them, as a BEIR folder.

The only importer of `datasets`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moeret.config import OnError, require
from moeret.data.beir import corpus_row, document_of, encodable, lacking, row_of, short
from moeret.data.records import format_of, records
from moeret.errors import ConfigError, DataError
from moeret.lock import new_folder, require_new
from moeret.types import Document

_ANCHORS, _POSITIVES = ("anchor", "query", "question"), ("positive", "answer")
_SKIPPED = "skipped.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a row, and of a document of the corpus, say what."""

    anchor: str | None = None
    """Column of the query; unless given, anchor, query or question, the first of them that is there."""
    positive: str | None = None
    """Column of its answer, text or a list; unless given, positive or answer."""
    negative: tuple[str, ...] = ()
    """Columns of what is no answer, text or lists; unless given, those whose names begin with negative."""
    id: str = "_id"
    """With a corpus: column of a document's id."""
    title: str | None = None
    """With a corpus: column of its title; unless given, title where there is one."""
    text: str = "text"
    """With a corpus: column of its text."""

    def __post_init__(self) -> None:
        require(not isinstance(self.negative, str), f"negative must be names of columns, got {self.negative!r}")
        own = [name for name in (self.anchor, self.positive, *self.negative) if name is not None]
        twice = next((name for name in own if own.count(name) > 1), None)
        require(twice is None, f"a column says one thing: {twice!r} is named twice")


def convert_rows(
    rows: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    columns: Columns | None = None,
    corpus: str | Path | None = None,
    on_error: OnError = "stop",
) -> dict[str, int]:
    """Writes a new domain's folder, with all judgments in the train split, and returns how many it has of what.

    A row has `anchor` (or `query`, or `question`), `positive` (or `answer`), and any number of columns whose names begin with
    `negative`, or the `columns` that are named; positives and negatives may be lists. Equal texts become one query, whose id is a
    digest of its text. Rows of a `datasets.Dataset` will do.

    Without a `corpus` every text of a positive or a negative becomes a document, with a digest for its id. With one (JSONL, also
    gzip) its documents, with their ids, titles and metadata, are those of the domain: a positive is a document's id or its text,
    with or without the title before it, whitespace aside, and negatives are not needed. In training every document that is no
    positive is a negative, either way.

    With "skip" rows and documents that cannot be used, and rows of which a positive is no document, are left out, counted and
    listed in `out`/skipped.jsonl.

    Raises:
      ConfigError: `out` is there already. ArtifactError: it cannot be made. BusyError: it is being made.
      DataError: a row lacks a column, has something else than text in it, or a positive that is no document; a document is none or
        has another one's id; with "skip" only if nothing is left. No folder is left behind.
    """
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, 1))
    return _convert(numbered, _row, out, columns, corpus, on_error)


def convert_file(
    path: str | Path,
    out: str | Path,
    *,
    columns: Columns | None = None,
    corpus: str | Path | None = None,
    on_error: OnError = "stop",
) -> dict[str, int]:
    """The same from a JSONL file, also gzip.

    Raises:
      ConfigError, DataError: as convert_rows; the message names the line.
    """
    return _convert(_lines(Path(path), "rows"), row_of, out, columns, corpus, on_error)


def convert_dataset(
    name: str,
    out: str | Path,
    *,
    subset: str | None = None,
    split: str = "train",
    columns: Columns | None = None,
    corpus: str | Path | None = None,
    on_error: OnError = "stop",
) -> dict[str, int]:
    """The same from a data set of the Hugging Face hub, or of a folder, row by row as `datasets` streams them.

    Raises:
      ConfigError: `out` is there already, or `datasets` is not installed.
      DataError: as convert_rows; also where there is no such data set, subset or split, or the hub does not answer.
    """
    require_new(Path(out))
    try:
        import datasets  # an extra, and slow to import
    except ImportError:
        raise ConfigError("rows of a data set need another library; run pip install 'moeret[datasets]'") from None
    place = f"data set {name}{f', subset {subset}' if subset else ''}, split {split}"

    def rows() -> Iterator[Mapping[str, Any]]:
        try:
            yield from datasets.load_dataset(name, subset, split=split, streaming=True)
        except Exception as error:  # many kinds: of the library, the hub's client, and the files' formats
            first = str(error).strip().partition("\n")[0]
            raise DataError(
                f"cannot be read ({type(error).__name__}: {first}); check the names and the network"
            ) from None

    try:
        return convert_rows(rows(), out, columns=columns, corpus=corpus, on_error=on_error)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _lines(path: Path, of: str) -> Iterator[tuple[str, str]]:
    """Where each line of a file is, and what is on it."""
    require(
        format_of(path) != "parquet",
        f"{path}: a JSONL file is wanted, also gzip; convert_rows takes rows of any source",
    )
    number = 0
    for number, _, line in records(path):
        yield f"{path}, line {number}", line
    if not number:
        raise DataError(f"{path}: there are no {of}")


def _convert(
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[Any], Mapping[str, Any]],
    out: str | Path,
    columns: Columns | None,
    corpus: str | Path | None,
    on_error: OnError,
) -> dict[str, int]:
    """Writes a folder from where each row is, and what `parse` makes a row of."""
    require(on_error in ("stop", "skip"), f"on_error must be stop or skip, got {on_error!r}")
    columns, refused = columns or Columns(), _Refused(on_error == "skip")
    judged: set[tuple[str, str]] = set()
    with new_folder(Path(out)) as folder:
        (folder / "qrels").mkdir()
        with (
            (folder / "corpus.jsonl").open("w", encoding="utf-8") as documents,
            (folder / "queries.jsonl").open("w", encoding="utf-8") as queries,
            (folder / "qrels" / "train.tsv").open("w", encoding="utf-8") as qrels,
        ):
            asked = _Texts(queries, "q")
            held = _Texts(documents, "d") if corpus is None else _Corpus(Path(corpus), documents, columns, refused)
            qrels.write("query-id\tcorpus-id\tscore\n")
            for anchor, answers in _usable(rows, parse, columns, held, refused):
                query = asked.id(anchor)
                for answer in answers:
                    if (query, answer) not in judged:
                        judged.add((query, answer))
                        qrels.write(f"{query}\t{answer}\t1\n")
        if not judged:
            raise DataError(
                f"none of the rows can be used; {refused.last()}" if refused.skipped else "there are no rows"
            )
        if refused.skipped:
            (folder / _SKIPPED).write_text("".join(f"{json.dumps(own)}\n" for own in refused.skipped))
    counts = {"queries": len(asked.ids), "documents": len(held.ids), "judgments": len(judged)}
    return counts | ({"skipped": len(refused.skipped)} if on_error == "skip" else {})


def _usable(
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[Any], Mapping[str, Any]],
    columns: Columns,
    held: "_Texts | _Corpus",
    refused: "_Refused",
) -> Iterator[tuple[str, list[str]]]:
    """The anchor of each row that can be used, and the ids of its positives."""
    for where, raw in rows:
        try:
            anchor, positives, negatives = _parts(parse(raw), columns)
            answers = held.answers(positives, negatives)
        except DataError as error:
            refused.add(where, error)
        else:
            yield anchor, answers


def _row(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise DataError(f"a row has columns, got {short(raw)}")
    return raw


@dataclass(slots=True)
class _Refused:
    """What cannot be used: raised, or left out and noted."""

    skip: bool
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, error: DataError) -> None:
        """Raises the error with its place, unless it is skipped."""
        if not self.skip:
            raise DataError(f"{where}: {error}") from None
        self.skipped.append({"where": where, "reason": str(error)})

    def last(self) -> str:
        """What was skipped last, in words."""
        return "the last, {where}: {reason}".format(**self.skipped[-1])


class _Texts:
    """Writes each text once, and knows it by a digest."""

    def __init__(self, file: TextIO, letter: str):
        self._file, self._letter, self.ids = file, letter, set[str]()

    def id(self, text: str) -> str:
        """The id of a text, which is written if it is new."""
        id = self._letter + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        if id not in self.ids:
            self.ids.add(id)
            self._file.write(json.dumps({"_id": id, "text": text}) + "\n")
        return id

    def answers(self, positives: list[str], negatives: list[str]) -> list[str]:
        """The ids of positives; negatives become documents too."""
        found = [self.id(text) for text in positives]
        for text in negatives:
            self.id(text)
        return found


class _Corpus:
    """Writes the documents of a file, and knows which of them a text or an id is."""

    def __init__(self, path: Path, file: TextIO, columns: Columns, refused: _Refused):
        self._path, self.ids, self._texts = path, set[str](), dict[bytes, list[str]]()
        for where, line in _lines(path, "documents"):
            try:
                document = _document(row_of(line), columns)
                if document.id in self.ids:
                    raise DataError(f"id {short(document.id)} is already another line's")
            except DataError as error:
                refused.add(where, error)
                continue
            self.ids.add(document.id)
            for text in {document.text, document.contents}:
                if text.strip():
                    self._texts.setdefault(_digest(text), []).append(document.id)
            file.write(json.dumps(corpus_row(document)) + "\n")
        if not self.ids:
            raise DataError(f"none of the documents can be used; {refused.last()}")

    def answers(self, positives: list[str], _: list[str]) -> list[str]:
        """The ids of the documents that the positives are. Raises DataError if one is none."""
        return [id for positive in positives for id in self._answer(positive)]

    def _answer(self, positive: str) -> list[str]:
        found = [positive] if positive in self.ids else self._texts.get(_digest(positive))
        if found is None:
            raise DataError(
                f"{short(positive)} is neither the text nor the id of a document of {self._path}; "
                "--on-error skip (on_error in Python) leaves such rows out"
            )
        return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def _document(row: Mapping[str, Any], columns: Columns) -> Document:
    """The document of a line whose columns may have other names."""
    for name in (columns.id, columns.title, columns.text):
        if name is not None and name not in row:
            raise DataError(
                f"{lacking(name, row)}; id, title and text of the columns may have other names: --id doc_id"
            )
    title = row.get("title" if columns.title is None else columns.title)
    document = document_of(
        {"_id": row[columns.id], "title": title, "text": row[columns.text], "metadata": row.get("metadata")}
    )
    if any(mark in document.id for mark in "\t\r\n"):
        raise DataError(f"id {short(document.id)} has a tab or a line end, which no file of judgments can hold")
    return document


def _parts(row: Mapping[str, Any], columns: Columns) -> tuple[str, list[str], list[str]]:
    """A row's anchor, positives and negatives."""
    anchor, positive = _column(row, columns.anchor, _ANCHORS), _column(row, columns.positive, _POSITIVES)
    for name in columns.negative:
        _column(row, name, ())
    others = (key for key in row if str(key).startswith("negative") and key not in (anchor, positive))
    negative = columns.negative or [*others]
    [query] = _strings(row[anchor], anchor, most=1)
    negatives = [text for key in negative for text in _strings(row[key], key, least=0)]
    return query, _strings(row[positive], positive), negatives


def _column(row: Mapping[str, Any], name: str | None, usual: tuple[str, ...]) -> str:
    """The column that is named, or the first of the usual ones."""
    names = usual if name is None else (name,)
    found = next((own for own in names if own in row), None)
    if found is None:
        raise lacking(f"{names[0]} (or {' or '.join(names[1:])})" if names[1:] else names[0], row)
    return found


def _strings(value: Any, name: str, least: int = 1, most: int = 10**9) -> list[str]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    if not good or not least <= len(texts) <= most:
        raise DataError(f"{name} must be text{' or a list of texts' if most > 1 else ''}, got {short(value)}")
    for text in texts:
        encodable(text, name)
    return texts
