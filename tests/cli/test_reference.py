"""The reference of the command line is generated from the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from unetc.cli import reference

PAGE = Path(__file__).parents[2] / "docs/cli.md"


def test_the_committed_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main([str(PAGE), "--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_refused_and_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "cli.md"
    assert reference.main([str(page), "--check"]) == 1
    assert f"python -m unetc.cli.reference {page}" in capsys.readouterr().err
    assert reference.main([str(page)]) == 0
    assert page.read_text() == PAGE.read_text()


def test_every_command_and_option_is_there_with_its_default() -> None:
    sections = {text.split("\n")[0]: text for text in PAGE.read_text().split("\n## ")[1:]}
    assert [*sections] == [
        f"unetc {name}"
        for name in [
            "analyze",
            "plan",
            "build",
            "pareto",
            "sample",
            "serve",
            "export",
            "compile",
            "verify",
            "report",
            "inspect",
            "doctor",
            "demo",
        ]
    ]
    assert "| `--budget X` | 0.27 | Share of the time to save, in [0, 1): 0.27 saves 27 %. |" in sections["unetc plan"]
    assert "| `--max-engines N` | `4` |" in sections["unetc pareto"]
    assert "| `--controls`, `--no-controls` | `--controls` |" in sections["unetc build"]
    assert "| `-o`, `--output PATH` | `bundle` |" in sections["unetc build"]
    assert "unetc inspect PATH [OPTIONS]" in sections["unetc inspect"]
