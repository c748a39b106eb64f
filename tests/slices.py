"""Slices of the nightly suite. `.ci/run` runs one slice per commit, in turn, so that no test lies unused for weeks.

    python -m pytest -q -n 2 -m nightly --nightly-slice auto    # the slice whose turn it is
    python -m pytest -q -n 2 -m nightly --nightly-slice 3/10    # the third of ten
    python -m pytest -q -p no:randomly -m nightly --write-durations tests/durations.json    # measure

Slices consist of groups: the tests of one file that share a parameter of a fixture wider than one test. Most of the
time goes into such fixtures, which capture models and build bundles, so a group stays together. Slices depend only on
the names and durations of groups, and not on the order of collection, which pytest-randomly shuffles.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

DURATIONS = Path(__file__).with_name("durations.json")
"""CPU seconds of nightly groups, about the time that they take on a free core."""

LIMIT = 60.0
"""Seconds that a slice may take on two cores, collection left out. A longer group is a slice by itself."""

PROCESSES = 2
"""Processes of a run, which share the files of a slice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Number of one slice."""

    number: int
    """From 1."""
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def group_of(item: pytest.Item) -> str:
    """Return a test's file, with the value of its first parameter that several tests share.

    pytest offers no public way to the scope of a parameter.
    """
    file = item.nodeid.partition("::")[0]
    if callspec := getattr(item, "callspec", None):
        for name, scope in callspec._arg2scope.items():
            if scope.value != "function":
                value = callspec.params[name]
                return f"{file}[{value[0] if isinstance(value, tuple) else value}]"
    return file


def read_durations(file: Path = DURATIONS) -> dict[str, float]:
    """Read the CPU seconds of groups; there are none without a file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_durations(file: Path, seconds: Mapping[str, float]) -> None:
    """Update the given groups in a file."""
    merged = read_durations(file) | {group: round(value, 1) for group, value in seconds.items()}
    file.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")


def divide(groups: Iterable[str], seconds: Mapping[str, float], count: int) -> list[list[str]]:
    """Divide groups into slices of similar duration: the longest group first, each into the slice that ends first.

    Args:
        groups: Groups to divide. A group without a duration is expected to take as long as the average one.
        seconds: Durations of groups.
        count: Number of slices.

    Returns:
        The groups of each slice.
    """
    groups = set(groups)
    average = statistics.fmean(seconds.values()) if seconds else 1.0
    slices: list[list[str]] = [[] for _ in range(count)]
    expected = {group: seconds.get(group, average) for group in groups}
    for group in sorted(groups, key=lambda group: (-expected[group], group)):
        best = min(slices, key=lambda own: (wall_time([*own, group], expected), len(own)))
        best.append(group)
    return slices


def wall_time(groups: Iterable[str], seconds: Mapping[str, float]) -> float:
    """Estimate the duration of a slice in seconds, where each file runs in one process (`--dist=loadfile`)."""
    files: dict[str, float] = defaultdict(float)
    for group in groups:
        files[group.partition("[")[0]] += seconds[group]
    return max([sum(files.values()) / PROCESSES, *files.values()])


def count_slices(seconds: Mapping[str, float]) -> int:
    """Return the smallest number of slices that take at most `LIMIT`, or hold one group."""
    for count in range(1, len(seconds) + 1):
        parts = divide(seconds, seconds, count)
        if all(wall_time(groups, seconds) <= LIMIT or len(groups) == 1 for groups in parts):
            return count
    return 1


def parse(text: str) -> Slice:
    """Read `auto` or `K/N`.

    Raises:
        pytest.UsageError: If the text is neither, or if K is not between 1 and N.
    """
    if text == "auto":
        count = count_slices(read_durations())
        return Slice(number=turn(Path(__file__).parent) % count + 1, of=count)
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise pytest.UsageError(f"--nightly-slice {text}: expected auto or K/N with K from 1 to N, such as 3/10")
    return Slice(number=int(number), of=int(of))


def turn(folder: Path) -> int:
    """Return the number of commits of a checkout, or today's day of the year where git cannot count them."""
    command = ["git", "-C", str(folder), "rev-list", "--count", "HEAD"]
    try:
        return int(subprocess.run(command, capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return datetime.datetime.now(tz=datetime.UTC).timetuple().tm_yday


def select(items: list[pytest.Item], own: Slice) -> list[pytest.Item]:
    """Return the nightly tests of a slice, in the order of collection."""
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    groups = divide({group_of(item) for item in nightly}, read_durations(), own.of)[own.number - 1]
    return [item for item in nightly if group_of(item) in groups]
