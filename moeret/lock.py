"""One writer a directory: an flock, which a dead process cannot hold; and new directories, which are there whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moeret.config import require
from moeret.errors import ArtifactError, BusyError

_LOCK = ".lock"


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Holds the writer's lock on `root`, making the directory if need be.

    Raises:
      BusyError: another live process holds it.
      ArtifactError: `root` is a file or cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / _LOCK).open("w")
    except (FileExistsError, NotADirectoryError):
        raise ArtifactError(f"{root} cannot be a directory: a file is in the way; choose another path") from None
    except OSError as error:
        raise ArtifactError(
            f"cannot write to {root}: {error.strerror}; choose a directory that you may write"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another process is writing {root}; wait for it or stop it, then run this again") from None
        yield


@contextlib.contextmanager
def new_folder(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when that went well: until then it is `out`.unfinished, beside it.

    What fails leaves nothing behind. With `resume` it leaves the folder, to be filled further by the next attempt.

    Raises:
      ConfigError: `out` is there already.
      BusyError: another live process is making it.
      ArtifactError: it cannot be made.
    """
    require_new(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with writing(unfinished):
        try:
            if not resume:
                _clear(unfinished)  # of an attempt that was killed
            yield unfinished
            for path in unfinished.rglob("*"):
                sync(path)
            require_new(out)  # it took a while
            unfinished.rename(out)
        except BaseException:
            if not resume:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        (out / _LOCK).unlink()
        sync(out.parent)


def require_new(out: Path) -> None:
    """Raises ConfigError if there is something at `out`."""
    require(not out.exists(), f"{out} is there already; name a folder that is not")


def require_own(out: Path, *marks: str) -> None:
    """Raises ConfigError where a directory has none of the files that mark it as ours, and others: ours would lie among them."""
    if out.is_dir() and not any((out / mark).exists() for mark in marks):
        others = sorted(path.name for path in out.iterdir() if path.name != _LOCK)
        require(not others, f"{out} holds other things ({', '.join(others[:3])}); name a new directory")


def sync(path: Path) -> None:
    """Returns when what a file or directory holds is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
