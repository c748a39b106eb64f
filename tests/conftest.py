"""Settings of the whole test run."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# One thread per process: -n 2 does not oversubscribe two cores, and sums come out alike with and without -n. torch
# reads this when it is first imported; the workers of pytest-xdist and other child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, so that a failure in CI is a failure here. --hypothesis-profile=default explores.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --require-gpu."""
    parser.addoption("--require-gpu", action="store_true", help="fail the tests marked gpu that would skip themselves")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under --require-gpu, fail a gpu test that skips itself: a GPU job cannot pass empty."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu"):
        forbid_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Under --require-gpu, fail a file that skips itself: it never gets as far as its marks."""
    report = yield
    if report.skipped:
        forbid_skip(report, collector.config)
    return report


def forbid_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """Make a skip a failure under --require-gpu."""
    if config.getoption("require_gpu"):
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"--require-gpu, but {reason}"
