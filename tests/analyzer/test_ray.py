"""An analysis on a Ray cluster gives the same profile as one in this process, even if workers die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_processes import WORKER, processes

from tests.analyzer.on_ray import TARGET, check_kills, options_of
from tests.bare_cluster import bare_cluster
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts.profile import Profile
from unetc.environment import machine_for
from unetc.errors import ProfileError, SessionError
from unetc.jobs import Cluster
from unetc.models.find import find_model


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share a cluster whose processes cannot import the libraries of a capture."""
    with bare_cluster(tmp_path_factory.mktemp("absent"), cpus=2):
        yield


def test_the_profile_is_the_same_as_in_this_process_though_workers_are_killed(tmp_path: Path) -> None:
    reports = check_kills(2, options_of(samples=2), tmp_path)
    for stage in ("screen", "ablations"):
        done = [report.done for report in reports if report.stage == stage]
        assert done == sorted(done)
        assert len(done) > 3
        assert done[-1] == next(report.total for report in reports if report.stage == stage)


@pytest.mark.nightly
def test_fifty_killed_workers_lose_no_job(tmp_path: Path) -> None:
    check_kills(50, options_of(steps=12, samples=8, bins=6, decisive=None), tmp_path)


@pytest.mark.nightly
def test_a_driver_that_is_killed_leaves_no_process_and_the_next_one_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unetc", "analyze", "digits", "--ray", "local", "--threads", "1"]
    command += ["--steps", "8", "--samples", "4", "--bins", "4", "--batch", "1", "--components", "mid_block.*"]
    command += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "profile.json")]

    whole = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"].partition(os.pathsep)[2]}  # the driver needs torch

    def finished() -> int:
        return len([*(tmp_path / "cache").rglob("bin*.json")])

    driver = subprocess.Popen(command, env=whole, start_new_session=True)
    while finished() < 5 and driver.poll() is None:
        time.sleep(0.02)
    mine = processes(WORKER, of=driver.pid)
    driver.kill()
    driver.wait()
    before = finished()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in mine) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mine
    assert not any(Path(f"/proc/{worker}").exists() for worker in mine)
    again = subprocess.run(command, env=whole, capture_output=True, text=True, check=True)
    assert 5 <= before < finished()
    assert Profile.load(tmp_path / "profile.json").timed_on == machine_for(TARGET)
    assert "ray" not in again.stderr.lower().replace("--ray", ""), "Ray is quiet"


@pytest.mark.parametrize("target", ["tensorrt-rtx:fp16", "onnxruntime:tensorrt"])
def test_targets_whose_engines_differ_are_refused_before_a_cluster_is_joined(tmp_path: Path, target: str) -> None:
    with pytest.raises(ProfileError, match=r"builds engines, which differ from machine to machine.*without --ray"):
        analyze_model(
            find_model("digits"), AnalysisOptions(target=target), cache=tmp_path, cluster=Cluster(address="nowhere")
        )
    with pytest.raises(SessionError, match="no backend for target 'cpu'"):
        analyze_model(
            find_model("digits"), AnalysisOptions(target="cpu"), cache=tmp_path, cluster=Cluster(address="nowhere")
        )
