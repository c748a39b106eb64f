from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_figures_of_the_readme_are_those_of_the_committed_results() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "benchmarks/readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_the_tables_of_the_benchmarks_are_those_of_the_committed_results() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "benchmarks/tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_every_file_that_the_readme_links_to_exists() -> None:
    import re

    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    assert not missing
