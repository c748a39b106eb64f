"""Finished kernels are read only if unchanged, from here and for this engine; they never break a session."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import msgspec
import pytest

from tests.nvidia.test_cache import ENGINE_BYTES, GPU, KEY, ORIGIN, cache_in, record
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.kernels import MOST_BYTES, KernelFile
from unetc.runtime.backends.tensorrt import KernelCache

KERNELS = b"not kernels, but bytes that nobody may change"


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return cache_in(tmp_path)


def file_of(cache: EngineCache) -> KernelFile:
    """Open the file as a newly started process does."""
    return KernelFile(cache, record(), ORIGIN)


def test_what_was_kept_is_read_and_the_engine_stays_as_it_is(cache: EngineCache) -> None:
    assert file_of(cache).read() is None
    file_of(cache).keep(KERNELS)
    assert file_of(cache).read() == KERNELS
    assert cache.open(KEY)[1] == ENGINE_BYTES
    file_of(cache).keep(KERNELS * 2)
    assert file_of(cache).read() == KERNELS * 2
    assert len([*cache.folder(KEY).glob("kernels-*")]) == 1


def test_the_same_kernels_are_not_written_again(cache: EngineCache) -> None:
    file_of(cache).keep(KERNELS)
    path = file_of(cache).path
    before = path.stat().st_mtime_ns, path.stat().st_ino
    again = file_of(cache)
    again.read()
    again.keep(KERNELS)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    again.keep(KERNELS + b"!")
    again.keep(KERNELS + b"!")
    assert path.stat().st_ino != before[1]
    assert file_of(cache).read() == KERNELS + b"!"


@pytest.mark.parametrize("damage", ["first", "last", "short", "long", "seal", "empty"])
def test_damaged_kernels_are_made_anew(cache: EngineCache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    file_of(cache).keep(KERNELS)
    path = file_of(cache).path
    whole = path.read_bytes()
    changed = {
        "first": bytes([whole[0] ^ 1]) + whole[1:],
        "last": whole[:-1] + b"!",
        "short": whole[:-1],
        "long": whole + b"!",
        "seal": whole[:20],
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    damaged = file_of(cache)
    assert damaged.read() is None
    assert "is damaged or was not written here" in caplog.text
    damaged.keep(KERNELS)
    assert path.read_bytes() == whole


def test_a_file_that_is_too_large_is_not_read(cache: EngineCache) -> None:
    path = file_of(cache).path
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    assert file_of(cache).read() is None
    file_of(cache).keep(KERNELS)
    assert file_of(cache).read() == KERNELS


def test_kernels_of_another_cache_are_not_read(cache: EngineCache, tmp_path: Path) -> None:
    file_of(cache).keep(KERNELS)
    here = EngineCache(tmp_path / "here")
    shutil.copytree(cache.folder(KEY), here.folder(KEY))
    assert file_of(here).read() is None
    shutil.copyfile(cache.root / "secret", here.root / "secret")
    assert file_of(here).read() == KERNELS


def test_kernels_of_another_engine_are_not_read(cache: EngineCache) -> None:
    file_of(cache).keep(KERNELS)
    other = msgspec.structs.replace(record(), engine_sha256="3" * 64)  # the same key, built again
    assert KernelFile(cache, other, ORIGIN).path == file_of(cache).path
    assert KernelFile(cache, other, ORIGIN).read() is None


@pytest.mark.parametrize("field", ["name", "compute_capability", "driver"])
def test_every_gpu_and_driver_has_kernels_of_its_own(cache: EngineCache, field: str) -> None:
    file_of(cache).keep(KERNELS)
    there = msgspec.structs.replace(ORIGIN, gpu=msgspec.structs.replace(GPU, **{field: "another"}))
    other = KernelFile(cache, record(), there)
    assert other.read() is None
    shutil.copyfile(file_of(cache).path, other.path)
    assert other.read() is None


def test_a_folder_that_cannot_be_written_is_only_logged(cache: EngineCache, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(cache.folder(KEY))
    cache.folder(KEY).write_bytes(b"")  # no folder can be made here, not even by root
    kernels = file_of(cache)
    assert kernels.read() is None
    kernels.keep(KERNELS)
    assert "finished kernels cannot be stored" in caplog.text
    cache.folder(KEY).unlink()
    kernels.keep(KERNELS)
    assert file_of(cache).read() == KERNELS


def test_a_damaged_secret_is_only_logged(cache: EngineCache, caplog: pytest.LogCaptureFixture) -> None:
    file_of(cache).keep(KERNELS)
    (cache.root / "secret").write_bytes(b"short")
    caplog.set_level(logging.INFO)
    assert file_of(cache).read() is None
    file_of(cache).keep(KERNELS)
    assert caplog.text.count("secret is damaged") == 2


@pytest.mark.rtx
@pytest.mark.parametrize("fits", [True, False])
def test_the_library_is_asked_in_its_own_words(cache: EngineCache, fits: bool) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    engine = create_autospec(trt.ICudaEngine, instance=True)  # without a GPU there is no engine; it has only real names
    config = engine.create_runtime_config.return_value = create_autospec(trt.IRuntimeConfig, instance=True)
    runtime_cache = config.create_runtime_cache.return_value = create_autospec(trt.IRuntimeCache, instance=True)
    runtime_cache.deserialize.return_value = fits
    runtime_cache.serialize.return_value = KERNELS
    first = KernelCache(trt, engine, file_of(cache))
    runtime_cache.deserialize.assert_not_called()
    config.set_runtime_cache.assert_called_once_with(runtime_cache)
    config.set_execution_context_allocation_strategy.assert_called_once_with(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    assert first.config is config
    assert config.dynamic_shapes_kernel_specialization_strategy is trt.DynamicShapesKernelSpecializationStrategy.EAGER
    one, other = ((1, 8),), ((2, 8),)
    for _ in range(2):
        first.keep(one)
    runtime_cache.serialize.assert_called_once_with()
    runtime_cache.serialize.return_value = KERNELS * 2
    later = KernelCache(trt, engine, file_of(cache))
    runtime_cache.deserialize.assert_called_once_with(KERNELS)
    later.keep(one)
    assert file_of(cache).read() == KERNELS * 2
    runtime_cache.serialize.return_value = None
    later.keep(other)
    assert file_of(cache).read() == KERNELS * 2
