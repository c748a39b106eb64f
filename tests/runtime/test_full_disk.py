"""A disk that takes no more is said where something is written on the way: nothing is lost, and nothing is left."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import unetc.diffusers
from tests.small_files import small_files
from tests.tree import tree
from unetc.backend import WEIGHTS
from unetc.compiler.tensorrt.private_folder import private_folder
from unetc.errors import ArtifactError, SessionError, UnetcError
from unetc.models.folder import view
from unetc.nvidia.cache import EngineCache
from unetc.runtime.backends.onnxruntime import MappingLoader


def link() -> None:
    with view([], {}):
        raise AssertionError("there is no folder")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("write", "refusal"),
    [(lambda data: MappingLoader(data, 1), SessionError), (private_folder, ArtifactError)],
    ids=["session", "engines"],
)
def test_temporary_weights_that_do_not_fit_are_refused_and_removed(
    write: Callable[[bytes], object], refusal: type[UnetcError], tiny_bundle: Path, temporary: Path
) -> None:
    weights = (tiny_bundle / WEIGHTS).read_bytes()
    said = rf"cannot write {len(weights)} bytes of weights to {re.escape(str(temporary))}: File too large. Set TMPDIR"
    with pytest.raises(refusal, match=said) as raised, small_files(len(weights) - 1):
        write(weights)
    del raised
    assert tree(temporary) == {}
    write(weights)


@pytest.mark.parametrize(
    ("write", "refusal"),
    [
        (lambda: MappingLoader(b"", 1), SessionError),
        (lambda: private_folder(b""), ArtifactError),
        (link, ArtifactError),
    ],
    ids=["session", "engines", "links"],
)
def test_a_machine_without_any_temporary_folder_is_refused(
    write: Callable[[], object], refusal: type[UnetcError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    said = r"cannot write .* to a temporary folder: No usable temporary directory found in .*Set TMPDIR"
    with pytest.raises(refusal, match=said), small_files(0):
        write()


def test_a_secret_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines")
    with pytest.raises(ArtifactError, match=r"cannot write .*engines: File too large"), small_files(16):
        cache.seal(b"data")
    assert tree(cache.root) == {}
    assert cache.seal(b"data") == EngineCache(cache.root).seal(b"data")


def test_a_saved_drop_in_survives_the_next_one_that_does_not_fit(tiny_bundle: Path, tmp_path: Path) -> None:
    unet = unetc.diffusers.load(tiny_bundle)
    unet.save_pretrained(tmp_path / "unet")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot write the bundle .*unet.*: File too large"), small_files(100_000):
        unet.save_pretrained(tmp_path / "unet")
    assert tree(tmp_path) == before
