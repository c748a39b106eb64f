from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from unetc.runtime.batching.largest import useful_batch

TIMES = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), st.floats(0.01, 1000), min_size=1)


@given(TIMES)
def test_no_batch_makes_many_more_samples_per_second_than_the_chosen_one(times: dict[int, float]) -> None:
    chosen = useful_batch([*times.items()])
    assert chosen is not None
    assert all(times[chosen] / chosen <= 1.06 * ms / batch for batch, ms in times.items())


@given(TIMES)
def test_every_smaller_batch_makes_fewer_samples_per_second(times: dict[int, float]) -> None:
    chosen = useful_batch([*times.items()])
    assert chosen is not None
    assert all(ms / batch > times[chosen] / chosen for batch, ms in times.items() if batch < chosen)


def test_calls_grow_only_while_that_pays() -> None:
    assert useful_batch([]) is None
    assert useful_batch([*{1: 1.0, 2: 2.0, 4: 4.0}.items()]) == 1
    assert useful_batch([*{1: 1.0, 2: 1.1, 4: 1.3, 8: 2.6, 16: 5.1}.items()]) == 4
    assert useful_batch([*{1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0}.items()]) == 8
