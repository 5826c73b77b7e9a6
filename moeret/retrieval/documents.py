"""Ids, titles, texts and metadata of a segment's documents, by row: an SQLite file that is never written again.

SQLite because it is in Python's standard library, reads one row of a billion without loading the others, and has the trees
that ids and filters need; any number of threads and processes may read a file that nobody writes.
"""

import contextlib
import errno
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool

from moeret.errors import ArtifactError
from moeret.retrieval.filters import Where, fields, matching
from moeret.types import Document

_ROWS_AT_ONCE = 500


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Writes documents as rows 0, 1, 2, ...

    Raises:
      OSError: the file cannot be written, as on a full disk.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(
                "CREATE TABLE documents (row INTEGER PRIMARY KEY, id TEXT, title TEXT, text TEXT, metadata TEXT)"
            )
            connection.execute(
                "CREATE TABLE fields (field, value, row INTEGER, PRIMARY KEY (field, value, row)) WITHOUT ROWID"
            )
            insert = connection.execute
            for row, own in enumerate(documents):
                insert("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", (row, own.id, own.title, own.text, own.metadata))
                for field, value in fields(own.metadata):
                    insert("INSERT OR IGNORE INTO fields VALUES (?, ?, ?)", (field, value, row))
            connection.execute("CREATE INDEX ids ON documents (id)")
            connection.commit()
    except sqlite3.Error as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


class DocumentStore:
    """Reads documents by row; safe to share between threads."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        uri = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
        try:
            self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        self.close = weakref.finalize(self, self._connection.close)
        """Gives the file back, as the last reader's going does."""

    def _unreadable(self, error: sqlite3.Error) -> ArtifactError:
        return ArtifactError(f"cannot read {self._path}: {error}; build the index anew")

    def _execute(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def fetch(self, rows: Sequence[int] | np.ndarray) -> dict[int, Document]:
        """The documents of these rows.

        Raises:
          ArtifactError: the file cannot be read, or lacks a row.
        """
        wanted = sorted({int(row) for row in rows})
        found: dict[int, Document] = {}
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            chunk = wanted[start : start + _ROWS_AT_ONCE]
            marks = ",".join("?" * len(chunk))
            table = self._execute(f"SELECT row, id, title, text, metadata FROM documents WHERE row IN ({marks})", chunk)
            found.update({row: Document(id, text, title, metadata) for row, id, title, text, metadata in table})
        if len(found) != len(wanted):
            raise ArtifactError(f"{self._path} lacks {len(wanted) - len(found)} documents; build the index anew")
        return found

    def rows_of(self, ids: Iterable[str]) -> dict[str, list[int]]:
        """The rows of the documents that have these ids; an id that none has is left out."""
        wanted, found = list(dict.fromkeys(ids)), dict[str, list[int]]()
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            chunk = wanted[start : start + _ROWS_AT_ONCE]
            marks = ",".join("?" * len(chunk))
            for id, row in self._execute(f"SELECT id, row FROM documents WHERE id IN ({marks}) ORDER BY row", chunk):
                found.setdefault(id, []).append(row)
        return found

    def matching(self, where: Where, count: int) -> Bool[np.ndarray, "N"]:
        """Which of the `count` documents fulfil a filter."""

        def of_field(field: str):
            query = "SELECT row FROM fields WHERE field = ? AND "
            return lambda condition, values: {row for (row,) in self._execute(query + condition, [field, *values])}

        out = np.zeros(count, bool)
        out[sorted(matching(where, count, of_field))] = True
        return out
