"""The processes that train one model together (`jax.distributed`): who writes, who does what, and waiting for all.

Every process runs the same program on the same arguments, over one file system that all of them see. One process alone is the
case of a run with one process.
"""

import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float

from moeret.config import require


def join(where: str | None) -> None:
    """Joins a run of several processes; must come before anything is computed.

    `where` is `auto` where the cluster tells each process its place (TPU pods, Slurm, Open MPI), else
    HOST:PORT,PROCESS/PROCESSES with the address of process 0; None for a process alone.

    Raises:
      ConfigError: it says no such thing.
    """
    if where is None:
        return
    if where == "auto":
        jax.distributed.initialize()
        return
    parts = re.fullmatch(r"(\S+:\d+),(\d+)/(\d+)", where)
    require(
        parts is not None and int(parts[2]) < int(parts[3]),
        f"a run of several processes is joined by auto or HOST:PORT,PROCESS/PROCESSES, such as 10.0.0.1:1234,0/2; got {where}",
    )
    jax.distributed.initialize(parts[1], int(parts[3]), int(parts[2]))


def is_first() -> bool:
    """Whether this process writes what all have made."""
    return jax.process_index() == 0


def is_mine(number: int) -> bool:
    """Whether this process does piece `number` of a work that is split among all."""
    return number % jax.process_count() == jax.process_index()


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def from_owners(table: Float[np.ndarray, "N _"], mine: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "N _"]:
    """The table whose rows each process made some of: every row as its owner has it, the same in all processes."""
    if jax.process_count() == 1:
        return table
    tables, owned = multihost_utils.process_allgather((table, mine))
    return np.where(owned[..., None], tables, 0).sum(axis=0)
