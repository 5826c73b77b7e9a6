"""Rows of anchor, positive and negatives, as sentence-transformers and Hugging Face's data sets have them, as a BEIR folder.

The only importer of `datasets`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moeret.config import require
from moeret.data.beir import encodable, row_of, short
from moeret.data.records import format_of, records
from moeret.errors import ConfigError, DataError
from moeret.lock import new_folder, require_new

_ANCHORS, _POSITIVES = ("anchor", "query", "question"), ("positive", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a row say what."""

    anchor: str | None = None
    """Column of the query; unless given, anchor, query or question, the first of them that is there."""
    positive: str | None = None
    """Column of its answer, text or a list; unless given, positive or answer."""
    negative: tuple[str, ...] = ()
    """Columns of what is no answer, text or lists; unless given, those whose names begin with negative."""

    def __post_init__(self) -> None:
        require(not isinstance(self.negative, str), f"negative must be names of columns, got {self.negative!r}")
        own = [name for name in (self.anchor, self.positive, *self.negative) if name is not None]
        twice = next((name for name in own if own.count(name) > 1), None)
        require(twice is None, f"a column says one thing: {twice!r} is named twice")


def convert_rows(
    rows: Iterable[Mapping[str, Any]], out: str | Path, *, columns: Columns | None = None
) -> dict[str, int]:
    """Writes a new domain's folder, with all judgments in the train split, and returns how many it has of what.

    A row has `anchor` (or `query`, or `question`), `positive` (or `answer`), and any number of columns whose names begin with
    `negative`, or the `columns` that are named; positives and negatives may be lists. Equal texts become one query or one
    document, whose id is a digest of its text. Negatives become documents: in training every document that is no positive is
    one. Rows of a `datasets.Dataset` will do.

    Raises:
      ConfigError: `out` is there already. ArtifactError: it cannot be made. BusyError: it is being made.
      DataError: a row lacks a column or has something else than text in it; nothing is left behind.
    """
    with new_folder(Path(out)) as folder:
        return _write(rows, folder, columns or Columns())


def convert_file(path: str | Path, out: str | Path, *, columns: Columns | None = None) -> dict[str, int]:
    """The same from a JSONL file, also gzip.

    Raises:
      ConfigError, DataError: as convert_rows; the message names the line.
    """
    path = Path(path)
    require(
        format_of(path) != "parquet",
        f"{path}: a JSONL file is wanted, also gzip; convert_rows takes rows of any source",
    )
    columns = columns or Columns()
    return convert_rows(_rows(path, columns), out, columns=columns)


def convert_dataset(
    name: str,
    out: str | Path,
    *,
    subset: str | None = None,
    split: str = "train",
    columns: Columns | None = None,
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
        return convert_rows(rows(), out, columns=columns)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _rows(path: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    row = None
    for number, _, line in records(path):
        try:
            row = row_of(line)
            _parts(row, columns)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        yield row
    if row is None:
        raise DataError(f"{path}: there are no rows")


def _write(rows: Iterable[Mapping[str, Any]], folder: Path, columns: Columns) -> dict[str, int]:
    (folder / "qrels").mkdir()
    with (
        (folder / "corpus.jsonl").open("w") as corpus,
        (folder / "queries.jsonl").open("w") as queries,
        (folder / "qrels" / "train.tsv").open("w") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        asked, held, judged = _Texts(queries, "q"), _Texts(corpus, "d"), set()
        for number, row in enumerate(rows, 1):
            try:
                if not isinstance(row, Mapping):
                    raise DataError(f"a row has columns, got {short(row)}")
                anchor, positives, negatives = _parts(row, columns)
            except DataError as error:
                raise DataError(f"row {number}: {error}") from None
            query = asked.id(anchor)
            for positive in positives:
                pair = query, held.id(positive)
                if pair not in judged:
                    judged.add(pair)
                    qrels.write(f"{pair[0]}\t{pair[1]}\t1\n")
            for negative in negatives:
                held.id(negative)
    if not judged:
        raise DataError("there are no rows")
    return {"queries": len(asked.ids), "documents": len(held.ids), "judgments": len(judged)}


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
        lacking = f"{names[0]} (or {' or '.join(names[1:])})" if names[1:] else names[0]
        raise DataError(f"there is no {lacking}; it has {', '.join(map(str, row)) or 'nothing'}")
    return found


def _strings(value: Any, name: str, least: int = 1, most: int = 10**9) -> list[str]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    if not good or not least <= len(texts) <= most:
        raise DataError(f"{name} must be text{' or a list of texts' if most > 1 else ''}, got {short(value)}")
    for text in texts:
        encodable(text, name)
    return texts
