"""Every nightly test is in exactly one slice, in any order of collection, and slices take about the same time."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import slices

ROOT = Path(__file__).parents[2]

FILES = {
    "torch.py": """
class cuda:
    is_available = staticmethod(lambda: False)
""",
    "test_a.py": """
import pytest

@pytest.fixture(scope="module", params=["large", "small"])
def model(request):
    return request.param

@pytest.mark.nightly
@pytest.mark.parametrize("scale", [0, 1])
def test_of_a_model(model, scale):
    pass

def test_of_every_day():
    pass
""",
    "test_b.py": """
import pytest

@pytest.mark.nightly
@pytest.mark.parametrize("scale", [0, 1])
def test_without_a_model(scale):
    pass
""",
    "pytest.ini": "[pytest]\nmarkers =\n    nightly\naddopts = -m 'not nightly' -p no:schemathesis\n",
}
GROUPS = [
    {"test_a.py::test_of_a_model[large-0]", "test_a.py::test_of_a_model[large-1]"},
    {"test_a.py::test_of_a_model[small-0]", "test_a.py::test_of_a_model[small-1]"},
    {"test_b.py::test_without_a_model[0]", "test_b.py::test_without_a_model[1]"},
]

COLLECT = """
import pytest
from tests import slices

class Collected:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        count = slices.count_slices(slices.read_durations())
        parts = [slices.select(session.items, slices.Slice(number=k + 1, of=count)) for k in range(count)]
        tests = sorted(item.nodeid for part in parts for item in part)
        assert tests == sorted(item.nodeid for item in session.items)
        assert len(set(tests)) == len(tests)
        assert all(parts)
        print(count, len(tests))

raise SystemExit(pytest.main(["--collect-only", "-qqq", "-m", "nightly"], plugins=[Collected()]))
"""

durations = st.dictionaries(
    st.builds("{}{}".format, st.sampled_from("abcde"), st.sampled_from(["", "[x]", "[y]", "[z]"])),
    st.floats(0, 300),
    min_size=1,
    max_size=12,
)


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_randomly", "-p", "tests.conftest", "-v", *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        command,
        env=environment
        | {
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },  # their imports take long
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@given(durations, st.integers(1, 6), st.randoms())
def test_every_group_is_in_one_slice_in_any_order(seconds: dict[str, float], count: int, random: Random) -> None:
    parts = slices.divide(random.sample(sorted(seconds), len(seconds)), seconds, count)
    assert len(parts) == count
    assert sorted(chain.from_iterable(parts)) == sorted(seconds)
    assert parts == slices.divide(seconds, seconds, count)


@given(durations)
def test_a_slice_exceeds_the_limit_only_if_one_group_does(seconds: dict[str, float]) -> None:
    parts = slices.divide(seconds, seconds, slices.count_slices(seconds))
    assert max(slices.wall_time(part, seconds) for part in parts) <= max(slices.LIMIT, *seconds.values())


def test_the_committed_durations_keep_the_gate_short() -> None:
    seconds = slices.read_durations()
    for part in slices.divide(seconds, seconds, slices.count_slices(seconds)):
        assert slices.wall_time(part, seconds) <= slices.LIMIT or len(part) == 1, part


@pytest.mark.nightly
def test_slices_of_shuffled_runs_hold_every_nightly_test_once(tmp_path: Path) -> None:
    seen: list[str] = []
    for number in (1, 2, 3):
        done = run(tmp_path, "-m", "nightly", f"--nightly-slice={number}/3", f"--randomly-seed={number}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"nightly slice: {number}/3" in done.stdout
        own = set(re.findall(r"^(test_\S+) PASSED", done.stdout, re.MULTILINE))
        assert own in GROUPS
        seen += own
    assert sorted(seen) == sorted(chain.from_iterable(GROUPS))


@pytest.mark.nightly
def test_the_slices_of_this_suite_hold_every_nightly_test_once() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    count, tests = map(int, done.stdout.split()[-2:])
    assert count > 1
    assert tests > 100


@pytest.mark.parametrize("text", ["4/3", "0/3", "three", "1/three"])
def test_a_slice_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"--nightly-slice {text}: expected auto or K/N with K from 1 to N"):
        slices.parse(text)


def test_a_slice_of_other_tests_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--nightly-slice=1/3")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "add -m nightly" in done.stderr


def test_slices_take_turns_by_commits_and_by_days_without_git(tmp_path: Path) -> None:
    today = datetime.datetime.now(tz=datetime.UTC).timetuple().tm_yday
    assert slices.turn(tmp_path) in (today, today + 1, 1)  # midnight may pass meanwhile
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for commits in (1, 2):
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "a"], check=True)
        assert slices.turn(tmp_path) == commits


def test_durations_are_measured_by_group(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "nightly", "--write-durations=durations.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*json.loads((tmp_path / "durations.json").read_text())] == [
        "test_a.py[large]",
        "test_a.py[small]",
        "test_b.py",
    ]
