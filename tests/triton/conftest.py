"""Exported repositories, which many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import unetc
from tests.server.bundles import make_class_server, make_free_server, make_prompted_server
from tests.tiny_build import once
from tests.triton.bundles import add_level
from tests.triton.server import Server


@pytest.fixture(scope="session")
def ladder_bundle(shared: Path, tiny_bundle: Path) -> Path:
    """Add a quality level to the bundle of the tiny model."""
    return once(shared / "triton-ladder", lambda folder: add_level(tiny_bundle, folder / "bundle")) / "bundle"


@pytest.fixture(scope="session")
def prompted_bundle(shared: Path) -> Path:
    """Build a bundle with encoded prompts, guidance and a decoder."""
    return make_prompted_server(shared) / "bundle"


@pytest.fixture(scope="session")
def free_bundle(shared: Path) -> Path:
    """Build a bundle that takes any prompt."""
    return make_free_server(shared) / "bundle"


@pytest.fixture(scope="session")
def class_bundle(shared: Path) -> Path:
    """Build a bundle with classes."""
    return make_class_server(shared) / "bundle"


@pytest.fixture(scope="session")
def repository(ladder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the bundle with two levels."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    unetc.export_triton(ladder_bundle, folder, unetc.ExportOptions(name="tiny"))
    return folder


@pytest.fixture(scope="session")
def server(repository: Path) -> Server:
    """Load it."""
    return Server(repository)


@pytest.fixture(scope="session")
def prompted_repository(prompted_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the bundle with prompts."""
    folder = tmp_path_factory.mktemp("triton") / "prompted"
    unetc.export_triton(prompted_bundle, folder, unetc.ExportOptions(name="prompted"))
    return folder


@pytest.fixture(scope="session")
def prompted_server(prompted_repository: Path) -> Server:
    """Load it."""
    return Server(prompted_repository)
