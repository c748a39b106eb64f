"""What no folder can replace is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unetc.compiler.store import check_destination
from unetc.errors import ArtifactError


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "volume"
    mounted.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    with pytest.raises(ArtifactError, match=r"volume is a mount point.* Choose a folder inside it"):
        check_destination(mounted)
    check_destination(mounted / "bundle")
