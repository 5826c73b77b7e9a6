"""Ids, titles and texts of an index's documents, by row: an SQLite file that is never written again."""

import contextlib
import errno
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from moeret.errors import ArtifactError
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
            connection.execute("CREATE TABLE documents (row INTEGER PRIMARY KEY, id TEXT, title TEXT, text TEXT)")
            rows = ((row, document.id, document.title, document.text) for row, document in enumerate(documents))
            connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", rows)
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
            raise ArtifactError(f"cannot read {path}: {error}; build the index anew") from None

    def close(self) -> None:
        """Gives the file back."""
        self._connection.close()

    def fetch(self, rows: Sequence[int] | np.ndarray) -> dict[int, Document]:
        """The documents of these rows.

        Raises:
          ArtifactError: the file cannot be read, or lacks a row.
        """
        wanted = sorted({int(row) for row in rows})
        found: dict[int, Document] = {}
        try:
            for start in range(0, len(wanted), _ROWS_AT_ONCE):
                chunk = wanted[start : start + _ROWS_AT_ONCE]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT row, id, title, text FROM documents WHERE row IN ({marks})"
                with self._lock:
                    table = self._connection.execute(query, chunk).fetchall()
                found.update({row: Document(id, text, title) for row, id, title, text in table})
        except sqlite3.Error as error:
            raise ArtifactError(f"cannot read {self._path}: {error}; build the index anew") from None
        if len(found) != len(wanted):
            raise ArtifactError(f"{self._path} lacks {len(wanted) - len(found)} documents; build the index anew")
        return found
