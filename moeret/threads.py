"""Work of one process that is done side by side.

A small program gains little from a second core, so two of them, each on one, end sooner than one after the other on both; and while
one thread waits for a file, or works in Python, others compute.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_MOST = 8
"""Each may hold much: a segment that is linked, twice."""


def at_once() -> int:
    """Threads that it pays to have: one for each core that this process may use, up to eight."""
    return min(_MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


_THREADS = ThreadPoolExecutor(at_once(), "side by side")


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What each of these calls gives, in order; they may not call this themselves.

    Raises:
      Exception: what the first of them that failed raised.
    """
    return list(_THREADS.map(lambda call: call(), calls)) if len(calls) > 1 else [call() for call in calls]
