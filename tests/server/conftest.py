"""A server with two bundles, which many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.bundles import make_prompted_server
from tests.server.live import Live, pair, serving


@pytest.fixture(scope="session")
def prompted_bundle(shared: Path) -> Path:
    """Build a bundle with encoded prompts, guidance and a decoder."""
    return make_prompted_server(shared) / "bundle"


@pytest.fixture(scope="session")
def live(tiny_bundle: Path, prompted_bundle: Path) -> Iterator[Live]:
    """Serve a model without prompts as `plain`, and one with encoded prompts as `prompted`."""
    with serving(*pair(tiny_bundle, prompted_bundle), "--degrade-to", "99%", "--deadline", "9999") as server:
        yield server
