"""The records of one file of documents, whatever its format, one after another; and Parquet files written.

A file is gzip of JSONL if its name ends with `.gz`, Parquet if it ends with `.parquet`, and JSONL otherwise. A record is a
non-blank line, or a row of a Parquet file with the columns `_id`, `text` and, if need be, `title` and `metadata` (a struct, a
map, or text that is a JSON object).
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeret.data.beir import document_of, row_of
from moeret.errors import DataError
from moeret.types import Document

_ROWS = 256
"""How many rows of a Parquet file are in memory at once."""
_BUFFER = 1 << 20
"""How many bytes of each of a Parquet file's columns are read at once."""


def format_of(path: Path) -> Literal["jsonl", "gz", "parquet"]:
    """What a file holds, by its name."""
    name = path.name.lower()
    return "gz" if name.endswith(".gz") else "parquet" if name.endswith(".parquet") else "jsonl"


Raw = str | dict[str, Any] | ValueError
"""A line, a row, or why a row cannot be had."""


def document_in(raw: Raw) -> Document:
    """The document of a record. Raises DataError, without the place, if it is none."""
    if isinstance(raw, str):
        return document_of(row_of(raw))
    if isinstance(raw, ValueError):
        raise DataError(f"cannot be read ({raw})")
    metadata = raw.get("metadata")
    if not isinstance(metadata, str):
        return document_of(raw | {"metadata": _filled(metadata)})
    try:
        row = row_of(metadata) if metadata.strip() else {}
    except DataError as error:
        raise DataError(f"metadata: {error}") from None
    return document_of(raw | {"metadata": row})


def _filled(value: Any) -> Any:
    """A Parquet value with maps (lists of pairs) as dicts, and without the fields that are None."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
        value = {str(key): own for key, own in value}
    if isinstance(value, dict):
        return {key: _filled(own) for key, own in value.items() if own is not None}
    return [_filled(own) for own in value] if isinstance(value, list) else value


def records(
    path: Path, start: int = 0, offset: int = 0, line: int = 1, digest: Any = None
) -> Iterator[tuple[int, int, Raw]]:
    """The line, offset and content of each record from number `start` on, which is on `line` and begins at byte `offset`.

    Lines and rows count from 1, offsets are of the decompressed file (0 for Parquet). A plain file's bytes are added to `digest`.

    Raises:
      DataError: the file is missing, unreadable or damaged, or lacks a column.
    """
    with readable(path):
        if format_of(path) == "parquet":
            yield from ((number, 0, row) for number, row in enumerate(_rows(path, start), start=start + 1))
            return
        with gzip.open(path) if format_of(path) == "gz" else path.open("rb") as file:
            file.seek(offset)
            for number, raw in enumerate(file, start=line):
                if digest is not None:
                    digest.update(raw)
                text = raw.decode("utf-8", "surrogateescape")
                if text.strip():
                    yield number, offset, text
                offset += len(raw)


def _rows(path: Path, start: int) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a Parquet file from number `start` on."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: Parquet files need pyarrow; run pip install 'moeret[parquet]'") from None
    try:
        with path.open("rb") as raw, ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if missing := [name for name in ("_id", "text") if name not in names]:
                raise DataError(f"{path}: there is no column {missing[0]}; it needs _id and text, and has {names}")
            ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            groups = [group for group, end in enumerate(ends) if end > start]
            columns = [name for name in ("_id", "title", "text", "metadata") if name in names]
            before = int(ends[groups[0] - 1]) if groups and groups[0] else 0
            for batch in file.iter_batches(_ROWS, groups, columns, use_threads=False) if groups else ():
                yield from _values(batch.slice(min(max(0, start - before), batch.num_rows)))
                before += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one ({str(error).splitlines()[0]})") from None


def write_parquet(path: Path, parts: Iterable[dict[str, Any]]) -> None:
    """Writes a Parquet file from columns of some rows at a time; a matrix is a column of lists of one length.

    Raises:
      DataError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise DataError(f"{path}: Parquet files need pyarrow; run pip install 'moeret[parquet]'") from None

    def column(values: Any) -> Any:
        if not isinstance(values, np.ndarray):
            return pyarrow.array(values, pyarrow.string())
        return pyarrow.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).ravel(), values.shape[1])

    writer = None
    try:
        for part in parts:
            table = pyarrow.table({name: column(values) for name, values in part.items()})
            writer = writer or ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _values(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    """A batch's rows. One row that cannot be had, for invalid UTF-8 say, does not take the others along."""
    try:
        yield from batch.to_pylist()
    except ValueError as error:
        if batch.num_rows == 1:
            yield error
        else:
            for row in range(batch.num_rows):
                yield from _values(batch.slice(row, 1))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what opening and decompressing a file raises into DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a gzip file, or a damaged one ({error})") from None
    except EOFError:
        raise DataError(f"{path}: the gzip file ends too early; was it copied whole?") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
