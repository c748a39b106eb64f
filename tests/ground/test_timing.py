"""Timed calls alternate, and short calls get more rounds."""

from __future__ import annotations

import time

import pytest

from unetc.timing import MORE, interleaved_ms


def test_timed_calls_alternate_and_include_their_waiting() -> None:
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    times = interleaved_ms(calls, rounds=3, warmup=1, wait=lambda: (order.append("wait"), time.sleep(0.01)))
    assert times.shape == (3, 2)
    assert order == ["a", "wait", "b", "wait"] * 4
    assert times.min() >= 10


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 2, 2), (0.1, 3, 5), (60.0, 2 * MORE, 2 * MORE)])
def test_rounds_continue_for_some_seconds_but_not_forever(seconds: float, least: int, most: int) -> None:
    times = interleaved_ms([lambda: time.sleep(0.025)], rounds=2, seconds=seconds)
    assert least <= len(times) <= most
