"""Servers that the tests of several APIs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import once
from tests.server.bundles import build_prompted_bundle
from tests.server.live import Live, serving


@pytest.fixture(scope="session")
def prompted_bundle(shared: Path) -> Path:
    """Build a bundle with encoded prompts, guidance and a decoder."""
    return once(shared / "prompted-build", build_prompted_bundle) / "bundle"


@pytest.fixture(scope="session")
def live(tiny_bundle: Path, prompted_bundle: Path) -> Iterator[Live]:
    """Serve a model without prompts and one with prompts."""
    with serving(f"plain={tiny_bundle}", f"prompted={prompted_bundle}", "--max-images", 4, "--max-body", 1) as server:
        yield server
