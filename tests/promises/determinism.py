"""The same input gives the same bytes, in any process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import unetc
from tests.command import run_alone
from tests.models import relative_error
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.tree import tree
from unetc.artifacts import Profile
from unetc.artifacts.manifest import DIGEST, MANIFEST

TIMES = {"batch_ms", "full_ms", "saved_ms", "step_ms", "time_ratio"}
"""Fields with measured times."""
ANALYSIS = ("--steps", "4", "--samples", "2", "--bins", "2", "--batch", "2", "--exhaustive")
"""Every ablation is carried to the final output: otherwise the measured times choose which."""
BUILD = ("--steps", "4", "--no-controls", "--repair", "0")
"""Controls are fitted to the measured time of the plan, and repairs choose among plans by their measured times."""
SEEDS = ("0", "1")
"""Seeds of the hashes of strings, which set the order in which Python iterates over sets."""


def without_times(value: Any) -> Any:
    """Leave out the measured times."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def contents(path: Path) -> Mapping[str, Any]:
    """Read a file or a folder; artifacts that hold times are read without them, and without the hash of the whole."""
    files = tree(path) if path.is_dir() else {path.name: path.read_bytes()}
    return {
        name: without_times(json.loads(data)) if data is not None and name in (MANIFEST, "profile.json") else data
        for name, data in files.items()
        if name != DIGEST and not name.endswith(".lock")
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the files that differ."""
    names = sorted(first.keys() | second.keys())
    return tuple(f"{name} differs" for name in names if name not in first or first.get(name) != second.get(name))


def in_two_processes(
    folder: Path, *arguments: object, output: str, threads: tuple[int, int] | None = None
) -> list[Path]:
    """Run a command in two processes with different hashes of strings, each with an empty cache.

    Args:
        folder: Where to write.
        arguments: The command.
        output: Name of its result.
        threads: Numbers of threads of the two processes; None if the command has none.

    Returns:
        The folders of the two processes.
    """
    folders = []
    for turn, seed in enumerate(SEEDS):
        folders.append(own := folder / f"{output}-{turn}")
        given = () if threads is None else ("--threads", threads[turn])
        environment = {"PYTHONHASHSEED": seed, "UNETC_CACHE": str(own / "cache")}
        done = run_alone(*arguments, *given, "-o", own / output, **environment)
        if done.code:
            raise AssertionError(f"{arguments[0]} ended with {done.code}: {done.err[-600:]}")
    return folders


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """List the commands."""
    model, built = place.tiny_model, place.tiny_build
    bundle, profile, plan = built / "bundle", built / "profile.json", built / "plan.json"

    def same(number: int, *arguments: object, output: str, threads: int | None = None) -> Outcome:
        """Compare the results of a command, and the graph and weights that it captured."""
        both = None if threads is None else (threads, threads)
        folders = in_two_processes(place.own / str(number), *arguments, output=output, threads=both)
        results = [contents(folder / output) for folder in folders]
        captured = [
            {path.name: path.read_bytes() for path in folder.glob("cache/*/graph/*") if path.suffix != ".json"}
            for folder in folders
        ]
        broken = differences(*results) + differences(*captured)
        return Outcome(tries=1, broken=tuple(f"{arguments[0]}: {one}" for one in broken))

    def threads_of_analysis(number: int) -> Outcome:
        """Compare the damages of analyses with one thread and with two."""
        folders = in_two_processes(
            place.own / str(number), "analyze", model, *ANALYSIS, output="profile.json", threads=(1, 2)
        )
        one, two = (Profile.load(folder / "profile.json") for folder in folders)
        damages = [np.array([effect.relative_l2.mean for effect in each.effects]) for each in (one, two)]
        return Outcome(figures={"damage with 1 or 2 threads, relative": relative_error(*damages)})

    def threads_of_samples(number: int) -> Outcome:
        """Compare samples with one thread and with two."""
        one, two = (unetc.load(bundle, threads=threads).sample(4, seed=number) for threads in (1, 2))
        return Outcome(figures={"samples with 1 or 2 threads, relative": relative_error(one, two)})

    tried: tuple[Callable[[int], Outcome], ...] = (
        lambda number: same(number, "plan", profile, "--budget", 0.1 + 0.01 * number, output="plan.json"),
        threads_of_samples,
        lambda number: same(number, "export", "triton", bundle, output="repository"),
        lambda number: same(number, "sample", bundle, "--seed", number, output="samples.png"),
        lambda number: same(number, "analyze", model, *ANALYSIS, "--seed", number, output="profile.json", threads=1),
        lambda number: same(number, "build", model, "--profile", profile, "--plan", plan, *BUILD, output="bundle"),
        threads_of_analysis,
    )
    yield lambda number: tried[number % len(tried)](number)


PROMISE = Promise(
    name="determinism",
    promised="The same input gives the same bytes, but for measured times and all that they choose: captured graph, "
    "profile, plan, bundle, repository and pictures.",
    tried="Commands in two processes with different hash seeds and empty caches: plan, export, sample, analyze "
    "--exhaustive, and build --plan without repairs and controls, as measured times choose those. With another number "
    "of threads, the difference is measured.",
    prepare=prepare,
    trials=28,
    short=2,
    seconds=18,
    limits={"samples with 1 or 2 threads, relative": 1e-5, "damage with 1 or 2 threads, relative": 1e-3},
)
