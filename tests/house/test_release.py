"""A release can be made again bit by bit, and lists the packages that it was tested with."""

from __future__ import annotations

import json
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.house import release
from tests.house.bounds import name_of

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.build_wheel(tmp_path_factory.mktemp("release"))


def test_the_same_commit_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert release.build_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def test_the_bill_has_every_dependency_in_the_version_that_is_installed(wheel: Path) -> None:
    bill = json.loads(release.write_bill(wheel).read_text())
    product = bill["metadata"]["component"]
    assert (product["name"], product["version"]) == ("unetc", version("unetc"))
    assert product["hashes"] == [{"alg": "SHA-256", "content": release.sha256(wheel)}]
    listed = {part["name"].lower().replace("_", "-"): part["version"] for part in bill["components"]}
    needed = tomllib.loads((release.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {name_of(one): version(name_of(one)) for one in needed}.items() <= listed.items()


def test_the_hashes_are_checked_by_the_usual_program(wheel: Path) -> None:
    sums = release.write_sums((wheel, release.write_bill(wheel)))
    check = ["sha256sum", "--check", "--strict", sums.name]
    assert subprocess.run(check, cwd=sums.parent, check=False).returncode == 0
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    assert subprocess.run(check, cwd=sums.parent, check=False).returncode == 1
