"""Nothing that unetc loads marks the machine or contacts anyone by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
from unetc.runtime.backends.registry import open_backend
open_backend("onnxruntime:cpu", threads=1)
"""


@pytest.mark.parametrize(("wish", "written"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_onnxruntime_writes_nothing_to_the_home_folder_unless_asked(
    wish: dict[str, str], written: bool, tmp_path: Path
) -> None:
    # CI switches the telemetry off as well, so the process must not know of it
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    kept = {name: value for name, value in kept.items() if not name.startswith(("TF_BUILD", "GITHUB_", "GITLAB_"))}
    environment = {**kept, "HOME": str(tmp_path), "XDG_CACHE_HOME": "", **wish}
    subprocess.run([sys.executable, "-c", LOAD], check=True, env=environment)
    assert any(path.is_file() for path in tmp_path.rglob("*")) is written
