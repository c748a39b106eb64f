"""Mutants are made of the sources that tests read, and a test that fails kills them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import share_of, tried
from tests.mutants.subjects import SUBJECTS, Subject
from tests.mutants.workshop import ROOT

pytestmark = pytest.mark.nightly


def subject(*tests: str) -> Subject:
    return Subject(name="treatments", modules=("treatments.py",), tests=tests, sample=3)


def test_every_subject_names_files_that_exist() -> None:
    for own in SUBJECTS:
        assert all((ROOT / "src/unetc" / module).exists() for module in own.modules)
        for test in own.tests:
            file, _, name = test.partition("::")
            assert (ROOT / "tests" / file).exists(), test
            assert not name or f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def test_tests_of_the_changed_module_kill_and_others_do_not(tmp_path: Path) -> None:
    row = tried(subject("ground/test_treatments.py"), tmp_path / "own", 1.0, again=False, reasons={})
    assert (row["tried"], row["killed"], row["survivors"]) == (3, 3, [])


def test_a_survivor_is_listed_with_its_change_and_its_reason(tmp_path: Path) -> None:
    others = subject("ground/test_treatments.py::test_a_held_branch_is_the_last_one")
    row = tried(others, tmp_path, 1.0, again=False, reasons={})
    assert row["killed"] == 0
    assert {own["reason"] for own in row["survivors"]} == {"not examined"}
    first = row["survivors"][0]
    assert first["function"] == "treatments._forecast"
    assert " → " in first["change"]
    reason = {f"{first['function']} | {first['change']}": "equivalent: an example"}
    again = tried(others, tmp_path, 1.0, again=False, reasons=reason)
    assert again["survivors"][0]["reason"] == "equivalent: an example"
    assert share_of("", [again])["figure"].endswith("without 1 equivalent")
