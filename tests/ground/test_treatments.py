"""Every treatment has a row, and the rows do not contradict each other."""

from __future__ import annotations

import numpy as np
import pytest

from unetc.treatments import EARLIER, EXTRAPOLATION, HELD, ROWS, Treatment


def test_every_treatment_has_a_row_and_a_letter() -> None:
    assert [*ROWS] == [*Treatment]
    letters = [row.letter for row in ROWS.values()]
    assert len({*letters}) == len(letters)
    assert all(len(letter) == 1 and letter.islower() for letter in letters)


@pytest.mark.parametrize("treatment", Treatment)
def test_only_treatments_that_reuse_branches_have_refreshes(treatment: Treatment) -> None:
    row = treatment.row
    assert treatment.reuses == (row.recall is not None)
    assert all((period > 1) == treatment.reuses for period in row.periods)
    assert bool(row.periods) == (treatment is not Treatment.KEEP)
    assert row.of_step or not row.of_x0
    assert treatment.reuses or not row.of_x0
    assert treatment is Treatment.KEEP or (row.mean is None) != (row.recall is None), "it removes or reuses"


@pytest.mark.parametrize("treatment", [Treatment.FORECAST, Treatment.FORECAST_X0])
def test_a_forecast_lies_on_the_line_through_the_last_two_branches(treatment: Treatment) -> None:
    slope, offset = np.array([2.0, -1.0]), np.array([0.5, 3.0])
    line = {
        HELD: slope * 700 + offset,
        EARLIER: slope * 900 + offset,
        EXTRAPOLATION: np.array([(600 - 700) / (700 - 900)]),
    }
    recall = treatment.row.recall
    assert recall is not None
    np.testing.assert_allclose(recall(line.__getitem__), slope * 600 + offset)


@pytest.mark.parametrize("treatment", [Treatment.HOLD, Treatment.HOLD_X0])
def test_a_held_branch_is_the_last_one(treatment: Treatment) -> None:
    recall = treatment.row.recall
    assert recall is not None
    assert recall({HELD: "last", EARLIER: "before"}.__getitem__) == "last"
