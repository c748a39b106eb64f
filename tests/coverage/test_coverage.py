"""The coverage of the tests is counted over lines and branches, in child processes too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coverage.__main__ import measured, place, result_of, run, share

HALF = {"covered_lines": 3, "num_statements": 8, "covered_branches": 3, "num_branches": 4}
WHOLE = {"covered_lines": 24, "num_statements": 24, "covered_branches": 12, "num_branches": 12}


def test_lines_and_branches_count_alike() -> None:
    assert share([HALF]) == 0.5
    assert share([HALF, WHOLE]) == 0.875
    assert share([]) == 1


def test_the_runtime_has_its_own_figure_and_weak_modules_are_listed() -> None:
    result = result_of({"runtime/a.py": WHOLE, "runtime/b.py": HALF, "src/unetc/c.py": HALF}, ["runtime"])
    assert [figure["value"] for figure in result["figures"]] == [0.875, 0.5]
    assert result["tables"][0]["rows"] == [["runtime/b.py", 0.5, 5, 1], ["src/unetc/c.py", 0.5, 5, 1]]


@pytest.mark.nightly
def test_tests_of_a_folder_run_the_modules_that_they_are_about(tmp_path: Path) -> None:
    run("planner", tmp_path)
    modules = measured([place("planner", tmp_path)])
    assert share(own for name, own in modules.items() if name.startswith("compiler/planner/")) > 0.9
    assert share(own for name, own in modules.items() if name.startswith("src/unetc/server/")) == 0
