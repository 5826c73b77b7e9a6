"""Checkpoints of a training run: the only importer of orbax."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moeret.errors import CheckpointError

_KEPT = 2


class Checkpoints:
    """The newest checkpoints of one run, saved whole or not at all."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save at warning level
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(_KEPT), enable_async_checkpointing=False
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, step: int, tree: Any) -> None:
        """Saves a tree of arrays as `step`, unless that step is saved already; on disk when this returns.

        Raises:
          CheckpointError: it cannot be written; the checkpoints before it are whole.
        """
        if self._manager.latest_step() != step:
            try:
                self._manager.save(step, args=ocp.args.StandardSave(tree))
                self._manager.wait_until_finished()
            except Exception as error:  # orbax and tensorstore raise many kinds, also for a full disk
                raise CheckpointError(
                    f"checkpoint {step} cannot be written to {self._folder} ({_reason(error)}); "
                    "make room, then the same command goes on from the one before"
                ) from None

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, tree) of the newest checkpoint, placed as the arrays of `like` are; None where there is none.

        Raises:
          CheckpointError: the newest checkpoint cannot be read back as `like`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            return step, self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(
                f"checkpoint {step} in {self._folder} cannot be read ({_reason(error)}); "
                f"delete {self._folder / str(step)} to go on from the one before"
            ) from None


def _reason(error: Exception) -> str:
    """An error's kind and first line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"
