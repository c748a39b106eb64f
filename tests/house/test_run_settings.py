"""`tests/conftest.py` turns some skips into failures, and sets the folder that tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Leaves out plugins, whose imports take most of the time of a short run."""
TESTS = """
import pytest

@pytest.mark.gpu
def test_of_a_gpu():
    pytest.skip("needs CUDAExecutionProvider")

def test_that_shares(shared):
    (shared / "made").touch()
"""


def run(folder: Path, *options: str, gpu: bool) -> subprocess.CompletedProcess[str]:
    """Run two tests with a fake torch that finds a GPU, or none."""
    (folder / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n")
    (folder / "test_few.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -p no:schemathesis\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "tests.conftest", str(folder), *options]
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        command,
        env=environment | {"PYTHONPATH": path, **QUICK},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("gpu", "code"), [(False, 1), (True, 0)])
def test_a_skip_without_a_gpu_is_a_failure_but_a_skip_without_a_library_is_not(
    tmp_path: Path, gpu: bool, code: int
) -> None:
    done = run(tmp_path, "--require-gpu", gpu=gpu)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("--require-gpu, but " in done.stdout) is not gpu
    assert ("SKIPPED" in done.stdout) is gpu


def test_shared_files_are_kept_in_the_folder_of_the_command(tmp_path: Path) -> None:
    kept, tests = tmp_path / "kept", tmp_path / "tests"
    tests.mkdir()
    assert run(tests, gpu=False).returncode == 0
    assert not kept.exists()
    assert run(tests, "--shared", str(kept), gpu=False).returncode == 0
    assert (kept / "made").exists()
