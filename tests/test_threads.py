"""Calls side by side give what they would one after another."""

import threading

import pytest

from moeret.threads import at_once, side_by_side


def test_results_are_in_the_order_of_the_calls():
    assert side_by_side([]) == []
    assert side_by_side([lambda n=n: n for n in range(50)]) == [*range(50)]


def test_calls_run_at_once():
    together = threading.Barrier(at_once(), timeout=30)
    side_by_side([together.wait] * at_once())  # breaks where one waits for another's end


def test_what_a_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1, lambda: 1 // 0, lambda: 2])
