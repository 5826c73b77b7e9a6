"""One writer a directory: an flock, which a dead process cannot hold."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from moeret.errors import ArtifactError, BusyError


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Holds the writer's lock on `root`, making the directory if need be.

    Raises:
      BusyError: another live process holds it.
      ArtifactError: `root` is a file or cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".lock").open("w")
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
