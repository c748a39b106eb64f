from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetc.errors import SessionError
from unetc.runtime.batching.estimates import Estimate
from unetc.runtime.batching.ladder import HEADROOM, choose_level, find_level, saving_of, steps_down

LEVELS = ("full", "27%", "40%", "55%")
SECONDS = st.floats(0.01, 100)
ESTIMATE = st.builds(Estimate, SECONDS, SECONDS)
ESTIMATES = st.lists(ESTIMATE, min_size=4, max_size=4).map(lambda own: dict(zip(LEVELS, own, strict=True)))


@pytest.mark.parametrize(
    ("name", "saving"), [("full", 0), ("27%", 0.27), ("0.27", 0.27), ("0", 0), ("99.5%", 0.995), ("0%", 0)]
)
def test_a_level_is_named_after_its_saving(name: str, saving: float) -> None:
    assert saving_of(name) == pytest.approx(saving)


@pytest.mark.parametrize("name", ["", "fast", "100%", "1", "-5%", "nan", "%", "inf%", "27"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SessionError, match=r"is not a quality level\. Expected full, or a saving such as 27%"):
        saving_of(name)


def test_a_level_is_found_by_its_saving_written_in_another_way() -> None:
    assert find_level(LEVELS, "0.27") == find_level(LEVELS, "27.0%") == "27%"
    for unknown in ("28%", "best", "0.3"):
        with pytest.raises(SessionError, match=r"Expected one of: auto, full, 27%, 40%, 55%\."):
            find_level(LEVELS, unknown)


@given(st.permutations(LEVELS), st.sampled_from(LEVELS), st.sampled_from([*LEVELS, "30%", "99%", None]))
def test_steps_go_down_from_the_start_and_never_below_the_floor(
    levels: list[str], start: str, floor: str | None
) -> None:
    allowed = steps_down(levels, start, floor)
    savings = [saving_of(level) for level in allowed]
    assert allowed[0] == start
    assert savings == sorted(set(savings))
    assert set(allowed) - {start} == {
        level for level in levels if floor and saving_of(start) < saving_of(level) <= saving_of(floor)
    }


@given(ESTIMATES, SECONDS, SECONDS)
def test_the_best_level_within_the_target_is_chosen(
    estimates: dict[str, Estimate], target: float, deadline: float
) -> None:
    choice = choose_level(estimates, target=target, deadline=deadline)
    fitting = [
        level
        for level in LEVELS
        if estimates[level].under_load <= HEADROOM * target and estimates[level].seconds <= deadline
    ]
    assert choice.seconds == estimates[choice.level].seconds
    if fitting:
        assert choice.level == fitting[0]
    else:
        assert choice.seconds == min(own.seconds for own in estimates.values())


@given(ESTIMATES, SECONDS, SECONDS)
def test_a_request_is_late_only_if_every_level_is(
    estimates: dict[str, Estimate], target: float, deadline: float
) -> None:
    choice = choose_level(estimates, target=target, deadline=deadline)
    assert choice.in_time == (min(own.seconds for own in estimates.values()) <= deadline)


@given(st.lists(SECONDS, min_size=4, max_size=4), SECONDS, SECONDS, st.floats(1, 10))
def test_more_load_never_raises_the_quality_while_a_level_meets_the_target(
    times: list[float], target: float, deadline: float, factor: float
) -> None:
    estimates = {level: Estimate(time, time) for level, time in zip(LEVELS, times, strict=True)}
    loaded = {level: Estimate(time * factor, time * factor) for level, time in zip(LEVELS, times, strict=True)}
    before = choose_level(estimates, target=target, deadline=deadline)
    after = choose_level(loaded, target=target, deadline=deadline)
    if after.seconds <= min(HEADROOM * target, deadline):
        assert LEVELS.index(after.level) >= LEVELS.index(before.level)


@given(ESTIMATES, SECONDS, SECONDS)
def test_in_a_crowd_the_fastest_level_is_chosen(estimates: dict[str, Estimate], target: float, deadline: float) -> None:
    choice = choose_level(estimates, target=target, deadline=deadline, crowded=True)
    assert choice.seconds == min(own.seconds for own in estimates.values())


def test_a_level_that_is_not_faster_is_not_chosen() -> None:
    equal = {"full": Estimate(5.0, 5.0), "27%": Estimate(5.0, 5.0)}
    assert choose_level(equal, target=1.0, deadline=9.0).level == "full"
