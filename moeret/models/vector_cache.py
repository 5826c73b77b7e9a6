"""Vectors kept on disk, so that texts are embedded once, whatever happens to the process that does."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from moeret import artifact
from moeret.errors import ArtifactError
from moeret.processes import is_mine, wait_for_all
from moeret.progress import Advance

_CHUNK = 2048
"""Texts embedded and kept at a time."""


def cached_vectors(
    embed: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    width: int,
    folders: Sequence[Path],
    key: str,
    advance: Advance,
) -> Float[np.ndarray, "N D"]:
    """`embed(texts)` in chunks kept on disk, so that a killed job loses one chunk and a second job none.

    A chunk is found in any of `folders` by a hash of `key` (which names the encoder) and its texts, checked by its own
    digest, and written to the first of them. Where several processes want the same texts, each embeds some of the chunks.
    `advance` is called for chunks that are found; `embed` reports its own.

    Raises:
      ArtifactError: another process wrote a chunk to where this one does not see it.
    """
    folders[0].mkdir(parents=True, exist_ok=True)
    out = np.empty((len(texts), width), np.float32)
    elsewhere = []
    for number, start in enumerate(range(0, len(texts), _CHUNK)):
        chunk = texts[start : start + _CHUNK]
        name = _file_name(key, chunk)
        vectors = next(
            (v for folder in folders if (v := _read_chunk(folder / name, len(chunk), width)) is not None), None
        )
        if vectors is None and not is_mine(number):
            elsewhere.append((name, start, len(chunk)))
            continue
        if vectors is None:
            vectors = np.ascontiguousarray(embed(chunk), np.float32)
            raw = vectors.tobytes()
            artifact.write_atomically(folders[0] / name, hashlib.sha256(raw).digest() + raw)
        else:
            advance(len(chunk))
        out[start : start + len(chunk)] = vectors
    wait_for_all("vectors")
    for name, start, count in elsewhere:
        vectors = _read_chunk(folders[0] / name, count, width)
        if vectors is None:
            raise ArtifactError(
                f"another process made {folders[0] / name}, but it is not there; give all the same folder"
            )
        out[start : start + count] = vectors
        advance(count)
    return out


def kept_vectors(texts: Sequence[str], width: int, folder: Path, key: str) -> Float[np.ndarray, "N D"] | None:
    """What `cached_vectors` keeps of these texts in a folder, if they are whole chunks of its and none is missing."""
    parts = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        part = _read_chunk(folder / _file_name(key, chunk), len(chunk), width)
        if part is None:
            return None
        parts.append(part)
    return np.concatenate(parts) if parts else None


def _file_name(key: str, chunk: Sequence[str]) -> str:
    return f"{artifact.fingerprint([key, list(chunk)])}.vectors"


def _read_chunk(path: Path, rows: int, width: int) -> Float[np.ndarray, "N D"] | None:
    """A kept chunk, or None where there is none that is whole."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    if len(raw) != 32 + 4 * rows * width or hashlib.sha256(raw[32:]).digest() != raw[:32]:
        return None
    return np.frombuffer(raw, np.float32, offset=32).reshape(rows, width)
