"""Calls that arrive together are answered together: queries are embedded faster in one batch than one by one.

A batch begins when the one before it is done, with what has arrived meanwhile, so that batches grow with the load and nobody
waits for them without it. Only where nothing is running does a call wait, for a few milliseconds, for others that arrive with it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moeret.errors import MoeretError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class OverloadError(MoeretError):
    """More calls wait than may; ask again later."""


class ClosedError(MoeretError):
    """No more calls are taken."""


class DeadlineError(MoeretError):
    """A call's time was over before it was answered."""


@dataclass(eq=False, slots=True)
class _Call(Generic[Item, Answer]):
    key: Hashable
    item: Item
    cost: int
    answer: "asyncio.Future[Answer]"
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Answer]):
    """Answers calls of one event loop in batches, one batch at a time, in a thread of its own.

    Args:
      answer: called with a key and items that were given with it, in their order; returns each one's answer,
        or the error that its caller is to have.
      cost: of an item, in what `budget` counts.
      budget: what a batch costs at most, unless its first item alone costs more.
      wait: seconds that a call waits for others while no batch is running.
      most_waiting: calls that may wait; more are refused.
      observe: called with the seconds that each item of a batch has waited.
    """

    def __init__(
        self,
        answer: Callable[[Hashable, list[Item]], Sequence[Answer]],
        *,
        cost: Callable[[Item], int] = lambda item: 1,
        budget: int = 64,
        wait: float = 0.002,
        most_waiting: int = 256,
        observe: Callable[[list[float]], None] = lambda waited: None,
    ):
        self._answer, self._cost, self._observe = answer, cost, observe
        self._budget, self._wait, self._most_waiting = budget, wait, most_waiting
        self._waiting: deque[_Call[Item, Answer]] = deque()
        self._arrived, self._closing = asyncio.Event(), False
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many calls wait."""
        return len(self._waiting)

    async def submit(self, key: Hashable, item: Item, seconds: float | None = None) -> Answer:
        """The answer to an item; items are answered together only with others of an equal key.

        Raises:
          OverloadError: too many calls wait.
          ClosedError: no more are taken.
          DeadlineError: there was no answer after so many seconds.
          TypeError: the key is not hashable.
        """
        hash(key)
        if self._closing:
            raise ClosedError("no more queries are taken: the service is being shut down")
        if len(self._waiting) >= self._most_waiting:
            raise OverloadError(f"{len(self._waiting)} queries wait already; ask again later")
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        call = _Call(key, item, self._cost(item), asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._arrived.set()
        try:
            async with asyncio.timeout(seconds) as limit:
                return await call.answer
        except TimeoutError:
            if not limit.expired():  # the answer's own
                raise
            raise DeadlineError(f"there was no answer after {seconds:g} seconds") from None
        finally:
            if not call.answer.done():
                call.answer.cancel()
            if call in self._waiting:  # remove's own error would hold the call's and its answer's whole repr
                self._waiting.remove(call)

    async def close(self) -> None:
        """Refuses new calls, and returns when all that were taken are answered."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self) -> None:
        loop, idle = asyncio.get_running_loop(), True
        while self._waiting or not self._closing:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                idle = True
                continue
            if idle:
                await asyncio.sleep(self._wait)
                idle = False
                continue
            batch = self._next()
            now = time.monotonic()
            try:
                self._observe([now - call.arrived for call in batch])
                items = [call.item for call in batch]
                answers = await loop.run_in_executor(self._thread, self._answer, batch[0].key, items)
                pairs = [*zip(batch, answers, strict=True)]
            except Exception as error:  # its callers' to handle; what comes next is not their fault
                pairs = [(call, error) for call in batch]
            for call, answer in pairs:
                if call.answer.done():  # its time was over, or its caller has gone
                    continue
                if isinstance(answer, Exception):
                    call.answer.set_exception(answer)
                else:
                    call.answer.set_result(answer)

    def _next(self) -> list[_Call[Item, Answer]]:
        """The call that waits longest and, as long as the budget allows, others of its key."""
        batch, rest, left = [], deque(), self._budget
        for call in self._waiting:
            alike = not batch or call.key == batch[0].key
            if alike and (not batch or call.cost <= left):
                batch.append(call)
                left -= call.cost
            else:
                rest.append(call)
        self._waiting = rest
        return batch
