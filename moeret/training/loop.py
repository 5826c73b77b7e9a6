"""fit: the only training loop."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from moeret.config import TrainConfig, require
from moeret.models.experts import Bank
from moeret.models.mesh import replicate
from moeret.processes import from_owners, is_first, is_mine
from moeret.progress import progress_bar
from moeret.training.batches import Batches
from moeret.training.checkpoint import Checkpoints
from moeret.training.step import TrainState, add_batch, learning_rates, make_optimizer, update, zero_totals

Evaluate = Callable[[Bank, Bool[np.ndarray, "E"]], Float[np.ndarray, "E 3"]]
"""Dev nDCG@10 of each expert asked for of a bank (without the base), over all, seen and unseen queries."""


@dataclass(slots=True)
class Progress:
    """How every expert is doing on dev: the choice of its checkpoint, and when it stops."""

    best: np.ndarray
    best_step: np.ndarray
    stale: np.ndarray
    active: np.ndarray

    @classmethod
    def start(cls, experts: int) -> "Progress":
        """Nothing looked at yet."""
        zeros = np.zeros(experts, np.int32)
        return cls(np.full(experts, -1.0, np.float32), zeros, zeros.copy(), np.ones(experts, bool))

    def look(
        self, step: int, scores: Float[np.ndarray, "E"], looked: Bool[np.ndarray, "E"], patience: int
    ) -> Bool[np.ndarray, "E"]:
        """Notes a look at the dev of some experts, and returns which of them are better than ever."""
        better = looked & (scores > self.best)
        self.best = np.where(better, scores, self.best).astype(np.float32)
        self.best_step = np.where(better, step, self.best_step).astype(np.int32)
        self.stale = np.where(better, 0, self.stale + looked).astype(np.int32)
        self.active = self.active & (self.stale < patience)
        return better

    def tree(self) -> dict[str, np.ndarray]:
        """As arrays for a checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A finished run: every expert at its best step; 0 if none was better than its start."""

    bank: Bank
    steps: Int[np.ndarray, "E"]


@dataclass(slots=True)
class MetricsLog:
    """Metrics as JSON lines, by the first process; a resumed run first drops the lines that it will write again."""

    path: Path

    def resume(self, step: int) -> None:
        """Keeps only lines up to this step."""
        if is_first() and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            self.path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))

    def write(self, **values: Any) -> None:
        """Appends one line."""
        if is_first():
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def fit(
    bank: Bank,
    batches: Batches,
    evaluate: Evaluate,
    config: TrainConfig,
    work: Path,
    *,
    what: str,
    show_progress_bar: bool,
) -> Fitted:
    """Trains all experts of `bank` (without the base) until their steps are done or dev stops improving.

    The progress bar says `what` is trained.

    Progress lives in `work`: a run that was cut off goes on from its newest checkpoint, and ends with the parameters that
    an undisturbed run has, because a step depends only on its number.
    """
    # ---- State: fresh, or as the newest checkpoint has it
    names = batches.names
    optimizer = make_optimizer(config)
    state = TrainState(bank, optimizer.init(bank))
    state, best_bank = replicate(batches.mesh, (state, jax.tree.map(jnp.copy, bank)))
    progress, log = Progress.start(len(names)), MetricsLog(work / "metrics.jsonl")
    with Checkpoints(work / "checkpoints") as checkpoints:
        saved = checkpoints.restore(_tree(batches.mesh, state, best_bank, progress))
        step = 0
        if saved:
            step, tree = saved
            state, best_bank = TrainState(*tree["state"]), tree["best_bank"]
            state = TrainState(state.bank, _like(optimizer.init(bank), state.opt_state))
            progress = Progress(**{name: np.asarray(value) for name, value in tree["progress"].items()})
        log.resume(step if saved else -1)

        def look(step: int, due: Bool[np.ndarray, "E"]) -> None:
            nonlocal best_bank
            mine = due & np.array([is_mine(number) for number in range(len(names))])
            scores = from_owners(evaluate(jax.device_get(state.bank), mine), mine)
            better = progress.look(step, scores[:, 0], due, config.patience)
            best_bank = _choose(better, state.bank, best_bank)
            groups = zip(("dev", "seen", "unseen"), scores.T, strict=True)
            log.write(step=step, **{group: _named(names, values, due) for group, values in groups})

        if not saved:
            look(0, progress.active)

        # ---- Steps
        limits = batches.limits
        last = int(limits.max(initial=0))
        progress.active = progress.active & (limits > step)
        with progress_bar(f"Training {what}", last, shown=show_progress_bar, unit="steps", start=step) as advance:
            while progress.active.any():
                started, active = time.monotonic(), progress.active.copy()
                totals = zero_totals(state.bank)
                for expert, batch in batches.step(step, active):
                    totals = add_batch(batches.static, batches.frozen, state.bank, totals, expert, batch)
                rates = np.where(active, learning_rates(config, limits, step), np.float32(0))
                state = update(batches.mesh, optimizer, state, totals.gradients, replicate(batches.mesh, rates))
                losses = np.asarray(totals.losses)
                step += 1
                seconds = time.monotonic() - started
                rate = active.sum() * config.batch_size / seconds
                mean = float(losses[active].mean())
                log.write(
                    step=step,
                    loss=_named(names, losses, active),
                    pairs_per_second=round(float(rate), 1),
                )
                require(
                    np.isfinite(mean),
                    f"the loss is not finite at step {step}; lower --learning-rate, and delete {work} to start over",
                )
                # Each at its own times, so that an expert's path depends on nobody beside it.
                due = active & ((step % config.evaluate_every == 0) | (limits == step))
                if due.any():
                    look(step, due)
                    progress.active = progress.active & (limits > step)
                    checkpoints.save(step, _tree(batches.mesh, state, best_bank, progress))
                dev = float(progress.best.mean())
                advance(1, f"loss {mean:.3f}, {rate:.0f} pairs/s, dev {dev:.3f}")
    if batches.tally.batches:
        log.write(step=step, batches=batches.tally.report())
    return Fitted(jax.device_get(best_bank), progress.best_step)


def _named(names: tuple[str, ...], values: np.ndarray, active: Bool[np.ndarray, "E"]) -> dict[str, float | None]:
    """The active experts' values, for the log; None for a group of too few queries."""
    return {
        name: None if np.isnan(value) else round(float(value), 7)
        for name, value, on in zip(names, values, active, strict=True)
        if on
    }


def _tree(mesh: Mesh, state: TrainState, best_bank: Bank, progress: Progress) -> dict[str, Any]:
    return {"state": tuple(state), "best_bank": best_bank, "progress": replicate(mesh, progress.tree())}


def _like(structure: optax.OptState, restored: Any) -> optax.OptState:
    """Restored leaves in the optimizer's own containers."""
    return jax.tree.unflatten(jax.tree.structure(structure), jax.tree.leaves(restored))


def _choose(better: Bool[np.ndarray, "E"], new: Bank, old: Bank) -> Bank:
    """The experts of `new` where `better`, else those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(better[:, None, None], a, b), new, old)
