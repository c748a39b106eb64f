"""The documentation site builds without a warning: no dead link, no page outside the navigation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--jobs", "1"]
    built = subprocess.run([*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site/index.html").is_file()


def test_decisions_are_numbered_without_a_gap_and_have_a_status() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [int(page.name[:3]) for page in pages] == [*range(1, len(pages) + 1)]
    names = {page.name for page in pages}
    for page in pages:
        title, _, status, *_ = page.read_text().split("\n")
        assert title.startswith(f"# {page.name[:3]}. ")
        found = re.fullmatch(r"Status: (Accepted|Open|Superseded by \[\d{3}\]\((.*)\))", status)
        assert found, f"{page.name}: {status}"
        assert found[2] is None or found[2] in names
        assert f"({page.name})" in (ROOT / "docs/decisions/index.md").read_text()
