"""How long making a model took, on what: beside its manifest, for its card, and no part of what makes it what it is."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from moeret import artifact
from moeret.models.card import MADE, read_made
from moeret.processes import is_first


@contextmanager
def counted(model: Path, what: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Adds the hours from the call of what this yields to `what` in a model's made.json, also where they end in an error.

    That call takes the run's request: hours of a run that was cut off count only if it is the same that goes on.
    """
    started, finished = list[tuple[float, str]](), False

    def start(request: dict[str, Any]) -> None:
        started.append((time.monotonic(), artifact.fingerprint(request)))

    try:
        yield start
        finished = True
    finally:
        if started and is_first():
            [(since, request)] = started
            made = read_made(model)
            before = made.get(what, {})
            goes_on = before.get("request") == request and not before["finished"]
            hours = before["hours"] if goes_on else 0
            made[what] = {
                "request": request,
                "finished": finished,
                "hours": round(hours + (time.monotonic() - since) / 3600, 5),
                "device": _device(),
                "versions": {
                    "python": platform.python_version(),
                    **{name: version(name) for name in ("moeret", "jax", "flax")},
                },
            }
            with suppress(OSError):  # what ended the run is worth more than its hours
                artifact.write_atomically(model / MADE, (json.dumps(made, indent=1) + "\n").encode())


def _device() -> str:
    """All processes' devices in words; of a processor its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} × {device.device_kind}"
    return f"{jax.process_count()} × CPU with {os.cpu_count()} cores"
