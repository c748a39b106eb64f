"""Which share of unetc's lines and branches do the ordinary tests run?

    python -m tests.coverage                 # make coverage: folder by folder; resumes if killed
    python -m tests.coverage planner cli     # these folders; the figures are of all folders that have been run

Child processes are measured too, unless they are killed. Writes `benchmarks/results/coverage.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from unetc.environment import describe

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/coverage.json"
SOURCES = ("analyzer", "compiler", "runtime", "src")
GOALS = {"runtime": 0.95, "the rest": 0.9}
"""Share of the lines and branches to run."""
SHOWN = 0.9
"""Modules below this share are listed."""

DONE = "done"
"""File that says that all tests have passed."""

Counts = dict[str, int]
COUNTED = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def folders() -> list[str]:
    """List the folders of tests, and the sources, whose docstrings have examples."""
    return [*sorted({path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}), "src"]


def tests_of(folder: str) -> Path:
    """Return the path of a folder's tests."""
    return ROOT / folder if folder == "src" else ROOT / "tests" / folder


def place(folder: str, work: Path) -> Path:
    """Return where the data of a folder's tests lie; other sources or other tests have another place."""
    digest = hashlib.sha256()
    files = {path for own in SOURCES for path in (ROOT / own).rglob("*.py")}
    for path in sorted(files | {*tests_of(folder).rglob("*.py"), *(ROOT / "tests").glob("*.py")}):
        digest.update(path.read_bytes())
    return work / f"{folder}-{digest.hexdigest()[:16]}"


def run(folder: str, work: Path) -> None:
    """Run the ordinary tests of a folder.

    Raises:
        SystemExit: If one fails.
    """
    data = place(folder, work)
    data.mkdir(parents=True, exist_ok=True)
    shared = [] if folder == "src" else ["--shared", str(work / "shared")]  # an option of tests/conftest.py
    tests = ["-m", "pytest", "-q", "-p", "no:randomly", *shared, str(tests_of(folder))]
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={ROOT / 'pyproject.toml'}", *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "COVERAGE_FILE": str(data / "data")}, check=False)
    if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"tests of {folder} failed")
    (data / DONE).touch()


def measured(places: Iterable[Path]) -> dict[str, Counts]:
    """Count lines and branches by module, over the data in some places."""
    data = [str(path) for own in places for path in own.glob("data.*")]
    with tempfile.TemporaryDirectory() as temporary:
        combined, report = f"{temporary}/data", f"{temporary}/report.json"
        tool = [sys.executable, "-m", "coverage"]
        settings = [f"--rcfile={ROOT / 'pyproject.toml'}", f"--data-file={combined}"]
        subprocess.run([*tool, "combine", "--keep", "--quiet", *settings, *data], check=True, cwd=ROOT)
        subprocess.run([*tool, "json", "--quiet", *settings, "-o", report], check=True, cwd=ROOT)
        files = json.loads(Path(report).read_text())["files"]
    return {
        str((ROOT / name).resolve().relative_to(ROOT)): {key: own["summary"][key] for key in COUNTED}
        for name, own in files.items()
    }


def share(modules: Iterable[Counts]) -> float:
    """Return the share of lines and branches that were run; 1 if there are none."""
    modules = list(modules)
    run = sum(own["covered_lines"] + own["covered_branches"] for own in modules)
    whole = sum(own["num_statements"] + own["num_branches"] for own in modules)
    return run / whole if whole else 1.0


def result_of(modules: dict[str, Counts], done: Sequence[str]) -> dict[str, Any]:
    """Write figures and tables."""
    parts = {
        "runtime": [own for name, own in modules.items() if name.startswith("runtime/")],
        "the rest": [own for name, own in modules.items() if not name.startswith("runtime/")],
    }
    shares = {name: share([own]) for name, own in modules.items()}
    listed = sorted((value, name) for name, value in shares.items() if value < SHOWN)
    return {
        "command": "make coverage",
        "settings": {"coverage": version("coverage"), "folders": " ".join(done)},
        "environment": describe(),
        "figures": [
            {"figure": f"{name}: share of lines and branches", "value": share(own), "goal": {"at_least": GOALS[name]}}
            for name, own in parts.items()
        ],
        "tables": [
            {
                "title": f"Modules below {SHOWN:g}",
                "columns": ["module", "share", "lines left", "branches left"],
                "rows": [
                    [
                        name,
                        value,
                        modules[name]["num_statements"] - modules[name]["covered_lines"],
                        modules[name]["num_branches"] - modules[name]["covered_branches"],
                    ]
                    for value, name in listed
                ],
            }
        ],
    }


def main() -> None:
    """Run the folders that are missing, and write the result."""
    known = folders()
    parser = argparse.ArgumentParser(
        prog="python -m tests.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", choices=[*known, []], metavar="FOLDER", help=f"of {', '.join(known)}")
    parser.add_argument("--work", type=Path, default=ROOT / ".coverage-parts", help="data of every folder")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the result")
    options = parser.parse_args()
    work = options.work.resolve()
    for folder in options.folders or known:
        if not (place(folder, work) / DONE).exists():
            print(f"tests of {folder}", flush=True)
            run(folder, work)
    done = {folder: own for folder in known if ((own := place(folder, work)) / DONE).exists()}
    result = result_of(measured(done.values()), tuple(done))
    options.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result["figures"], indent=1))


if __name__ == "__main__":
    main()
