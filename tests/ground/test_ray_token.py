"""A cluster that unetc starts for itself takes no work from others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NEW = """
import os
from unetc.ray_token import guard
{before}
guard({address!r})
print(os.environ.get("RAY_AUTH_MODE"), len(os.environ.get("RAY_AUTH_TOKEN", "")))
"""

STARTED = """
import os, subprocess, sys
from unetc.ray_token import guard
guard("local")
import ray
from unetc.ray_workers import joined
with joined("local"):
    address = ray.get_runtime_context().gcs_address
    join = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('joined')"
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    for environment in (os.environ, stranger):
        joining = subprocess.run([sys.executable, "-c", join], env=environment, capture_output=True, text=True)
        print("joined" if "joined" in joining.stdout else "AuthenticationError" in joining.stderr)
"""


def alone(code: str, **environment: str) -> str:
    """Run code in a process whose environment has no settings of Ray but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_cluster_that_is_started_gets_a_token() -> None:
    assert alone(NEW.format(before="", address="local")) == "token 64"


@pytest.mark.parametrize("address", ["local", pytest.param("10.0.0.1:6379", marks=pytest.mark.nightly)])
def test_commands_that_measure_draw_it_before_they_import_ray(address: str) -> None:
    """Ray would not read it later."""
    code = """
import os, sys
from unetc.cli.options import ClusterGroup
cluster = ClusterGroup(ray={address!r}).cluster()
print(cluster.address, "ray" in sys.modules, os.environ.get("RAY_AUTH_MODE"))
"""
    expected = "token" if address == "local" else None
    assert alone(code.format(address=address)) == f"{address} True {expected}"


def test_a_cluster_that_runs_already_has_its_own_rules() -> None:
    assert alone(NEW.format(before="", address="10.0.0.1:6379")) == "None 0"


def test_settings_of_the_user_stay() -> None:
    assert alone(NEW.format(before="", address="local"), RAY_AUTH_MODE="disabled") == "disabled 0"


@pytest.mark.nightly
def test_it_does_nothing_where_it_would_come_too_late() -> None:
    assert alone(NEW.format(before="import ray", address="local")) == "None 0"


@pytest.mark.nightly
def test_nobody_else_joins_it() -> None:
    assert alone(STARTED).splitlines() == ["joined", "True"]
