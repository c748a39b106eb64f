"""Bins divide the steps of a schedule evenly and cover all noise levels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.analyzer.sweeps import (
    REFERENCE,
    SHAPE,
    estimate_of,
    table_of,
)
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.sweep import make_bins
from unetc.artifacts.profile import Bin, Profile
from unetc.errors import ProfileError


def test_more_bins_than_steps_are_refused() -> None:
    AnalysisOptions(steps=5, bins=5)
    with pytest.raises(ProfileError, match="cannot cut 5 steps into 6 bins"):
        AnalysisOptions(steps=5, bins=6)


levels = st.lists(st.floats(1e-3, 5.0), min_size=1, max_size=60).map(lambda gaps: np.cumsum(gaps) - 10.0)


@given(levels=levels, count=st.integers(1, 12))
def test_bins_share_the_steps_evenly_and_name_the_bin_of_every_step(levels: NDArray[np.float64], count: int) -> None:
    bins = make_bins(levels, count)
    assert len(bins) == min(count, len(levels))
    sizes = [bin.steps for bin in bins]
    assert sum(sizes) == len(levels)
    assert max(sizes) - min(sizes) <= 1
    assert all(left.high == right.low for left, right in pairwise(bins))
    assert all(bin.low < bin.high for bin in bins)
    profile = bare_profile(bins)
    assert [profile.bin_of(level) for level in levels] == [b for b, size in enumerate(sizes) for _ in range(size)]
    assert (profile.bin_of(-1e9), profile.bin_of(1e9)) == (0, len(bins) - 1)


def bare_profile(bins: tuple[Bin, ...]) -> Profile:
    return Profile(
        unetc="0",
        model=REFERENCE,
        scheduler="ddim",
        steps=sum(bin.steps for bin in bins),
        samples=1,
        seed=0,
        target="null",
        threads=1,
        batch=1,
        sample_shape=SHAPE,
        components=(),
        bins=bins,
        full_ms=estimate_of(1.0),
        full_bytes=1,
        costs=(),
        effects=(),
        samplings=1.0,
        means=(b"",) * len(bins),
    )


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler"])
@pytest.mark.parametrize("steps", [8, 25, 50])
def test_bins_of_a_real_schedule_begin_at_its_first_step(scheduler: str, steps: int) -> None:
    table = table_of(scheduler, steps)
    bins = make_bins(table.log_snr, 8)
    assert bins[0].low == table.log_snr[0]
    assert [bin.steps for bin in bins] == sorted((bin.steps for bin in bins), reverse=True)
