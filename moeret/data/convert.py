"""Rows of anchor, positive and negatives, as sentence-transformers and Hugging Face's data sets have them, as a BEIR folder."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from moeret.config import require
from moeret.data.beir import encodable, row_of, short
from moeret.data.records import format_of, records
from moeret.errors import DataError

_ANCHORS = ("anchor", "query", "question")


def convert_rows(rows: Iterable[Mapping[str, Any]], out: str | Path) -> dict[str, int]:
    """Writes a new domain's folder, with all judgments in the train split, and returns how many it has of what.

    A row has `anchor` (or `query`, or `question`), `positive`, and any number of columns whose names begin with `negative`;
    positives and negatives may be lists. Equal texts become one query or one document, whose id is a digest of its text.
    Negatives become documents: in training every document that is no positive is one. Rows of a `datasets.Dataset` will do.

    Raises:
      ConfigError: `out` is there already.
      DataError: a row lacks a column or has something else than text in it; nothing is left behind.
    """
    out = Path(out)
    require(not out.exists(), f"{out} is there already; name a folder that is not")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "qrels").mkdir(parents=True)
    try:
        counts = _write(rows, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(out)
    return counts


def convert_file(path: str | Path, out: str | Path) -> dict[str, int]:
    """The same from a JSONL file, also gzip.

    Raises:
      ConfigError, DataError: as convert_rows; the message names the line.
    """
    path = Path(path)
    require(
        format_of(path) != "parquet",
        f"{path}: a JSONL file is wanted, also gzip; convert_rows takes rows of any source",
    )
    return convert_rows(_rows(path), out)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, _, line in records(path):
        try:
            row = row_of(line)
            _parts(row)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        yield row


def _write(rows: Iterable[Mapping[str, Any]], folder: Path) -> dict[str, int]:
    with (
        (folder / "corpus.jsonl").open("w") as corpus,
        (folder / "queries.jsonl").open("w") as queries,
        (folder / "qrels" / "train.tsv").open("w") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        asked, held, judged = _Texts(queries, "q"), _Texts(corpus, "d"), set()
        for number, row in enumerate(rows, 1):
            try:
                anchor, positives, negatives = _parts(row)
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


def _parts(row: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """A row's anchor, positives and negatives."""
    name = next((own for own in _ANCHORS if own in row), None)
    if name is None or "positive" not in row:
        lacking = "positive" if name else f"{_ANCHORS[0]} (or {' or '.join(_ANCHORS[1:])})"
        raise DataError(f"there is no {lacking}; it has {', '.join(map(str, row)) or 'nothing'}")
    [anchor] = _strings(row[name], name, most=1)
    negatives = [text for key in row if str(key).startswith("negative") for text in _strings(row[key], key, least=0)]
    return anchor, _strings(row["positive"], "positive"), negatives


def _strings(value: Any, name: str, least: int = 1, most: int = 10**9) -> list[str]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    if not good or not least <= len(texts) <= most:
        raise DataError(f"{name} must be text{' or a list of texts' if most > 1 else ''}, got {short(value)}")
    for text in texts:
        encodable(text, name)
    return texts
