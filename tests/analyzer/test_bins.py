"""Bins divide the steps of a schedule evenly and cover all noise levels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.analyzer.sweeps import table_of
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.sweep import make_bins
from unetc.errors import SessionError


def test_there_are_at_most_as_many_bins_as_steps() -> None:
    AnalysisOptions(steps=5, bins=6)
    assert [bin.steps for bin in make_bins(np.arange(5.0), 6)] == [1] * 5


@pytest.mark.parametrize("scale", [-0.1, 1000.0, float("inf")])
def test_a_guidance_scale_out_of_range_is_refused(scale: float) -> None:
    AnalysisOptions(guidance_scale=0.0)
    with pytest.raises(SessionError, match=r"lies in \[0, 1000\)"):
        AnalysisOptions(guidance_scale=scale)


levels = st.lists(st.floats(1e-3, 5.0), min_size=1, max_size=60).map(lambda gaps: np.cumsum(gaps) - 10.0)


@given(levels=levels, count=st.integers(1, 12))
def test_bins_share_the_steps_evenly_and_hold_them_in_order(levels: NDArray[np.float64], count: int) -> None:
    bins = make_bins(levels, count)
    assert len(bins) == min(count, len(levels))
    sizes = [bin.steps for bin in bins]
    assert sum(sizes) == len(levels)
    assert max(sizes) - min(sizes) <= 1
    assert all(left.high == right.low for left, right in pairwise(bins))
    assert all(bin.low < bin.high for bin in bins)
    bin_of_step = np.searchsorted([bin.low for bin in bins[1:]], levels, side="right").tolist()
    assert bin_of_step == [b for b, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler"])
@pytest.mark.parametrize("steps", [8, 25, 50])
def test_bins_of_a_real_schedule_begin_at_its_first_step(scheduler: str, steps: int) -> None:
    table = table_of(scheduler, steps)
    bins = make_bins(table.log_snr, 8)
    assert bins[0].low == table.log_snr[0]
    assert [bin.steps for bin in bins] == sorted((bin.steps for bin in bins), reverse=True)
