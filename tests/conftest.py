"""Settings of the whole test run, and a tiny model and bundle that many tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from tests import slices
from tests.every_day import AT_NIGHT
from tests.tiny_build import build_tiny_bundle, once, save_tiny_model

# One thread per process: -n 2 does not oversubscribe two cores, and sums are the same with and without -n. torch reads
# this when it is first imported; pytest-xdist workers and other child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, so that a failure in CI can be reproduced. --hypothesis-profile=default explores, with
# more of them.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("deterministic")


LONG_RUN = 2000
"""Number of tests from which a run surely needs the builds that tests share."""

REQUIRED = {"gpu": "an NVIDIA GPU", "rtx": "tensorrt_rtx"}
"""Marks of tests that skip themselves when a requirement is missing, with the requirement."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --require-gpu, --require-rtx, --shared, --nightly-slice and --write-durations."""
    for mark, what in REQUIRED.items():
        parser.addoption(
            f"--require-{mark}", action="store_true", help=f"fail tests that skip themselves without {what}"
        )
    parser.addoption("--shared", metavar="FOLDER", help="folder for files that tests share; existing ones are used")
    parser.addoption("--nightly-slice", metavar="K/N", help="with -m nightly: only this slice; auto takes turns")
    parser.addoption("--write-durations", metavar="FILE", help="with -m nightly: measure the groups that slices hold")


CHOSEN = pytest.StashKey[slices.Slice]()
"""The slice of --nightly-slice."""


def pytest_configure(config: pytest.Config) -> None:
    """Read the slice; run Triton kernels in its interpreter without a GPU; draw more examples in a nightly run.

    Triton reads its setting when kernels are imported.
    """
    if not finds_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("markexpr") != "not nightly":
        os.environ[AT_NIGHT] = "1"  # modules of tests read it
    if text := config.getoption("nightly_slice"):
        if config.getoption("markexpr") != "nightly":
            raise pytest.UsageError("--nightly-slice takes only nightly tests: add -m nightly")
        config.stash[CHOSEN] = slices.parse(text)
    if file := config.getoption("write_durations"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--write-durations measures in one process: leave out -n")
        config.pluginmanager.register(Stopwatch(Path(file)), "durations")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the slice that runs."""
    return f"nightly slice: {config.stash[CHOSEN]}" if CHOSEN in config.stash else None


class Stopwatch:
    """Measures groups of nightly tests in CPU seconds, fixtures and child processes included.

    They depend less than wall time on what else the machine does, and a test has one thread.
    """

    def __init__(self, file: Path) -> None:
        """Start at zero; `file` is updated at the end."""
        self.file = file
        self.seconds: dict[str, float] = {}
        """CPU seconds of each group."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Add the time of one test to its group."""
        before = sum(os.times()[:4])
        done = yield
        group = slices.group_of(item)
        self.seconds[group] = self.seconds.get(group, 0.0) + sum(os.times()[:4]) - before
        return done

    def pytest_sessionfinish(self) -> None:
        """Update the groups that have run, and leave the others."""
        slices.write_durations(self.file, self.seconds)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one slice, deselect tests that are pointless with a GPU, and record architecture and aspects of tests.

    --junitxml writes the latter.
    """
    if CHOSEN in config.stash:
        chosen = set(slices.select(items, config.stash[CHOSEN]))
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    if (pointless := [item for item in items if item.get_closest_marker("without_gpu")]) and finds_gpu():
        config.hook.pytest_deselected(items=pointless)
        items[:] = [item for item in items if item not in pointless]
    for item in items:
        architecture, shown = (item.get_closest_marker(name) for name in ("architecture", "shows"))
        if architecture and shown:
            item.user_properties += [("architecture", architecture.args[0]), *(("shows", own) for own in shown.args)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of tensorrt_rtx without it, before its fixtures build bundles for a minute."""
    if item.get_closest_marker("rtx") and find_spec("tensorrt_rtx") is None:
        pytest.skip("could not import 'tensorrt_rtx'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under --require-gpu, fail a gpu test that skips itself, so that a GPU job cannot pass empty; likewise for others.

    A test that needs several requirements may skip itself as long as one of them is not enforced.
    """
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        needed = [mark for mark in REQUIRED if item.get_closest_marker(mark)]
        if all(item.config.getoption(f"require_{mark}") for mark in needed):
            for mark in needed:
                forbid_skip(report, item.config, mark)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Under --require-gpu and the others, fail a file that skips itself, because its marks are never read."""
    report = yield
    if report.skipped:
        for mark in REQUIRED:
            forbid_skip(report, collector.config, mark)
    return report


def forbid_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config, mark: str) -> None:
    """Turn a skip into a failure if the missing requirement is enforced.

    If torch finds a GPU, a gpu test that skips itself lacks something else, such as the library of another target.
    """
    if report.skipped and config.getoption(f"require_{mark}") and not (mark == "gpu" and finds_gpu()):
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"--require-{mark}, but {reason}"


def finds_gpu() -> bool:
    """Check whether torch finds a GPU."""
    import torch  # imported late, because it reads the environment set above

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all pytest-xdist workers share: the folder of --shared, or a temporary one of this run."""
    if given := request.config.getoption("shared"):
        folder = Path(given).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def named(shared: Path) -> None:
    """Publish the shared folder to functions that are not fixtures, through `tests.models.shared_folder`."""
    os.environ["UNETC_TESTS_SHARED"] = str(shared)


@pytest.fixture(scope="session", autouse=True)
def brief() -> Iterator[None]:
    """Time engines in few rounds, and prepare few numbers of steps.

    A build repeats the timing for seconds, as long as a disturbance of the machine may last, and prepares a hundred
    schedules. A run makes dozens of builds; no test needs exact times, and the tiny bundle has all schedules. Nothing
    is imported for tests that leave the compiler alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "unetc.compiler" in sys.modules:
            patch.setattr("unetc.compiler.prepare.STEP_COUNTS", (*range(1, 21), 50))
            patch.setattr("unetc.compiler.search.bench.ENGINE_SECONDS", 0.0)
            patch.setattr("unetc.compiler.search.bench.BATCH_SECONDS", 0.0)
            patch.setattr("unetc.compiler.search.bench.SAMPLING_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def ahead(request: pytest.FixtureRequest, shared: Path, brief: None) -> None:
    """Begin a long run on several processes with the builds that most tests share, so that none waits for another."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker or request.session.testscollected < LONG_RUN:
        return
    if worker == "gw0":
        request.getfixturevalue("tiny_build")
    elif worker == "gw1":
        from tests.server.bundles import make_prompted_server  # imports torch

        make_prompted_server(shared)


@pytest.fixture(scope="session")
def tiny_model(shared: Path) -> Path:
    """Save a diffusers pipeline with 45 000 weights, drawn so that every component matters."""
    return once(shared / "tiny-model", save_tiny_model)


@pytest.fixture(scope="session")
def tiny_build(shared: Path, tiny_model: Path) -> Path:
    """Analyse the tiny model and build a bundle with two phases, into profile.json, plan.json and bundle/."""
    return once(shared / "tiny-build", lambda folder: build_tiny_bundle(tiny_model, folder, shared / "cache"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_build: Path) -> Path:
    """Return the bundle of the tiny model, which tests must copy before changing it."""
    return tiny_build / "bundle"


@pytest.fixture(scope="session")
def cache(shared: Path, tiny_build: Path) -> Path:
    """Return the cache with the capture of the tiny model."""
    return shared / "cache"
