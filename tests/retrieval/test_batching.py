"""Calls are answered together, each with its own answer, whatever becomes of the others."""

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.retrieval.batching import Batcher, ClosedError, DeadlineError, OverloadError


def batches_of(answer=lambda key, items: [(key, item) for item in items], **settings):
    """A batcher, and the batches that it has answered."""
    batches = []

    def kept(key, items):
        batches.append((key, list(items)))
        return answer(key, items)

    return Batcher(kept, **settings), batches


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=30),
    budget=st.integers(1, 20),
)
def test_every_call_gets_its_own_answer_and_batches_keep_their_key_and_budget(calls, budget):
    async def run():
        batcher, batches = batches_of(cost=lambda item: item[1], budget=budget, wait=0)
        asked = [(key, (number, cost)) for number, (key, cost) in enumerate(calls)]
        answers = await asyncio.gather(*(batcher.submit(key, item) for key, item in asked))
        await batcher.close()
        return asked, answers, batches

    asked, answers, batches = asyncio.run(run())
    assert answers == asked
    assert sorted((key, item) for key, items in batches for item in items) == sorted(asked)
    for _, items in batches:
        assert len(items) == 1 or sum(cost for _, cost in items) <= budget
        assert [number for number, _ in items] == sorted(number for number, _ in items)


def test_calls_that_arrive_while_a_batch_runs_make_the_next_one():
    async def run():
        begun, go_on = threading.Event(), threading.Event()

        def answer(key, items):
            begun.set()
            assert go_on.wait(10)
            return items

        batcher, batches = batches_of(answer, wait=0)
        first = asyncio.create_task(batcher.submit("a", 0))
        await asyncio.to_thread(begun.wait, 10)
        rest = [asyncio.create_task(batcher.submit("a", number)) for number in range(1, 9)]
        await asyncio.sleep(0.05)
        assert len(batcher) == 8
        go_on.set()
        assert await asyncio.gather(first, *rest) == [*range(9)]
        return batches

    assert asyncio.run(run()) == [("a", [0]), ("a", [*range(1, 9)])]


def test_calls_that_arrive_within_the_wait_go_together():
    async def run():
        batcher, batches = batches_of(wait=0.2)
        first = asyncio.create_task(batcher.submit("a", 0))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, batcher.submit("a", 1))
        return batches

    assert asyncio.run(run()) == [("a", [0, 1])]


def test_an_answered_call_is_never_written_out():
    """Which hits' whole texts would be, by the error of a list that the call is no more in."""

    class Item:
        def __repr__(self):
            raise AssertionError("written out")

    async def run():
        batcher, _ = batches_of()
        return (await batcher.submit("a", item := Item()))[1] is item

    assert asyncio.run(run())


def test_a_failed_batch_fails_its_own_calls_alone():
    def answer(key, items):
        if key == "bad":
            raise ValueError("no such thing")
        return [ValueError(item) if item == "x" else item for item in items]

    async def run():
        batcher, _ = batches_of(answer)
        return await asyncio.gather(
            *(batcher.submit(*call) for call in [("bad", 1), ("good", 2), ("bad", 3), ("good", "x")]),
            return_exceptions=True,
        )

    first, second, third, fourth = asyncio.run(run())
    assert second == 2
    assert all(isinstance(own, ValueError) for own in (first, third, fourth))


def test_a_batch_with_a_wrong_number_of_answers_fails_and_the_next_one_does_not():
    async def run():
        batcher, _ = batches_of(lambda key, items: [] if key == "bad" else items)
        with pytest.raises(ValueError):
            await batcher.submit("bad", 1)
        return await batcher.submit("good", 2)

    assert asyncio.run(run()) == 2


def test_more_calls_than_may_wait_are_refused_and_the_others_answered():
    async def run():
        go_on = threading.Event()
        batcher, _ = batches_of(lambda key, items: go_on.wait(10) and items, most_waiting=3, wait=0)
        calls = [asyncio.create_task(batcher.submit("a", 0))]
        await asyncio.sleep(0.05)  # it is being answered, and waits no more
        calls += [asyncio.create_task(batcher.submit("a", number)) for number in range(1, 6)]
        await asyncio.sleep(0.05)
        go_on.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    assert answers[:4] == [0, 1, 2, 3]
    assert all(isinstance(own, OverloadError) for own in answers[4:])


def test_a_call_whose_time_is_over_is_not_answered_and_holds_nobody_up():
    async def run():
        batcher, batches = batches_of(lambda key, items: [time.sleep(0.2) or item for item in items], wait=0)
        running = asyncio.create_task(batcher.submit("a", 0))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineError, match=r"0\.05 seconds"):
            await batcher.submit("a", 1, 0.05)
        assert len(batcher) == 0
        assert (await running, await batcher.submit("a", 2)) == (0, 2)
        return batches

    assert asyncio.run(run()) == [("a", [0]), ("a", [2])]


def test_closing_answers_what_was_taken_and_takes_no_more():
    async def run():
        batcher, _ = batches_of(lambda key, items: [time.sleep(0.05) or item for item in items], budget=2, wait=0)
        calls = [asyncio.create_task(batcher.submit("a", number)) for number in range(5)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await batcher.submit("a", 9)
        await closing
        return await asyncio.gather(*calls)

    assert asyncio.run(run()) == [*range(5)]
    asyncio.run(batches_of()[0].close())  # also where nothing was ever asked


def test_a_key_that_cannot_be_compared_is_refused_and_harms_nobody():
    async def run():
        batcher, _ = batches_of()
        with pytest.raises(TypeError):
            await batcher.submit(["a"], 1)
        return await batcher.submit("a", 2)

    assert asyncio.run(run()) == ("a", 2)


def test_an_answers_own_timeout_is_told_as_it_is():
    async def run():
        batcher, _ = batches_of(lambda key, items: [TimeoutError("a replica is slow")])
        await batcher.submit("a", 1)

    with pytest.raises(TimeoutError, match="a replica is slow"):
        asyncio.run(run())
