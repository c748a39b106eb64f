"""Whose turn it is: full calls first, and nobody waits forever."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from unetc.runtime.batching.turns import PATIENCE, SHORT, Waiting, choose


def one(
    member: str, key: str, rows: int = 1, age: int = 1, seconds: float = 0.0, urgent: bool = False
) -> Waiting[str, str]:
    return Waiting(member=member, key=key, rows=rows, age=age, seconds=seconds, urgent=urgent)


def most(rows: int) -> Callable[[str], int]:
    return lambda key: rows


def test_the_largest_group_goes_first() -> None:
    waiting = [one("a", "x"), one("b", "y"), one("c", "y")]
    assert choose(waiting, most(4)) == ("y", ["b", "c"])


def test_a_short_call_goes_before_a_large_one() -> None:
    long = [one(str(i), "y", seconds=1.0) for i in range(4)]
    assert choose([one("a", "x", seconds=0.9 * SHORT), *long], most(4)) == ("x", ["a"])
    assert choose([one("a", "x", seconds=SHORT), *long], most(4))[0] == "y"


def test_a_group_counts_for_the_rows_that_its_call_can_have() -> None:
    waiting = [*(one(str(i), "x") for i in range(4)), *(one(str(i), "y") for i in range(3))]
    assert choose(waiting, {"x": 2, "y": 8}.__getitem__) == ("y", ["0", "1", "2"])


def test_age_outranks_a_short_call() -> None:
    short = [one(str(i), "y", seconds=0.1) for i in range(4)]
    old = one("a", "x", age=2 * int(PATIENCE) + 2, seconds=1.0)
    assert choose([old, *short], most(4)) == ("x", ["a"])


def test_age_outranks_a_full_call() -> None:
    full = [one(str(i), "y") for i in range(4)]
    assert choose([one("a", "x", age=int(PATIENCE) + 2), *full], most(4)) == ("x", ["a"])
    assert choose([one("a", "x", age=int(PATIENCE) - 2), *full], most(4))[0] == "y"


def test_an_urgent_member_goes_before_all_others() -> None:
    waiting = [one("a", "x", urgent=True), *(one(str(i), "y", age=99) for i in range(4))]
    assert choose(waiting, most(4)) == ("x", ["a"])


def test_the_oldest_members_of_a_group_are_taken_in_their_own_order() -> None:
    waiting = [one("a", "x", age=1), one("b", "x", age=3), one("c", "x", age=1), one("d", "x", age=2)]
    assert choose(waiting, most(2)) == ("x", ["b", "d"])


def test_a_member_with_more_rows_than_a_call_runs_alone() -> None:
    assert choose([one("a", "x", rows=6, age=2), one("b", "x", rows=2)], most(4)) == ("x", ["a"])


@given(
    keys=st.lists(st.sampled_from("abcde"), min_size=1, max_size=30),
    rows=st.integers(1, 3),
    seconds=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    largest=st.integers(1, 8),
    moves=st.randoms(),
)
def test_nobody_waits_forever(keys: list[str], rows: int, seconds: list[float], largest: int, moves: Random) -> None:
    """Whoever has run goes anywhere; the others wait no longer than a bound that follows from the sizes."""
    duration = dict(zip("abcde", seconds, strict=True))
    group, last = dict(enumerate(keys)), dict.fromkeys(range(len(keys)), 0)
    together = max(1, largest // rows)
    bound = 2 * PATIENCE + len(keys) / together + 2 * 5
    for turn in range(1, 90):
        waiting = [one(str(i), key, rows=rows, age=turn - last[i], seconds=duration[key]) for i, key in group.items()]
        assert max(w.age for w in waiting) <= bound + len(keys)
        key, chosen = choose(waiting, lambda _: largest)
        assert chosen
        assert len(chosen) <= together
        for member in map(int, chosen):
            assert group[member] == key
            last[member] = turn
            group[member] = moves.choice("abcde")
