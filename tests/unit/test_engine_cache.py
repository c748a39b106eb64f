"""An engine is given out only if everything is what was asked for, what was written, and from here."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from unetc.compiler.engine_cache import ENGINE, RECORD, EngineCache, EngineKey, EngineRecord
from unetc.compiler.precision import Precision
from unetc.compiler.tensorrt.messages import Effort, Gpu
from unetc.compiler.tensorrt.shapes import Range, Sizes
from unetc.errors import StaleEngineError

ENGINE_BYTES = b"not an engine, but bytes that nobody may change"
ONE, TWO = Range(least=1, usual=1, most=1), Range(least=1, usual=2, most=2)
KEY = EngineKey(
    unetc="0.1.0",
    target="tensorrt",
    library="11.4.1",
    platform="Linux x86_64",
    gpu=Gpu(name="NVIDIA L40S", compute_capability="8.9", driver="580.65.06"),
    graph_sha256="1" * 64,
    weights_sha256="2" * 64,
    precision=Precision.FP32,
    sizes=Sizes(batch=TWO, height=ONE, width=ONE),
    rows={"encoder_hidden_states": (77, 768)},
    effort=Effort(),
)
OTHER: dict[str, Any] = {
    "unetc": "0.1.1",
    "target": "tensorrt-rtx",
    "library": "11.4.2",
    "platform": "Windows AMD64",
    "gpu": msgspec.structs.replace(KEY.gpu, driver="580.65.07"),
    "graph_sha256": "3" * 64,
    "weights_sha256": "3" * 64,
    "precision": Precision.FP16,
    "sizes": Sizes(batch=ONE, height=ONE, width=ONE),
    "rows": {"encoder_hidden_states": (78, 768)},
    "effort": Effort(optimization_level=2),
}
"""For every field of the key a value that differs as little as it can."""


def record(key: EngineKey = KEY) -> EngineRecord:
    return EngineRecord(
        key=key,
        engine_sha256=hashlib.sha256(ENGINE_BYTES).hexdigest(),
        engine_bytes=len(ENGINE_BYTES),
        layers=3,
        shapes={"sample": ((1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 1))},
        spent=Effort(),
        tries=1,
        seconds=1.5,
        peak_bytes=7,
    )


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    cache = EngineCache(tmp_path / "engines")
    cache.put(record(), ENGINE_BYTES)
    return cache


def test_an_engine_that_was_put_in_comes_out(cache: EngineCache) -> None:
    found, engine = EngineCache(cache.root).open(KEY)
    assert (found.key, engine) == (KEY, ENGINE_BYTES)
    assert sorted(path.name for path in cache.folder(KEY).iterdir()) == [ENGINE, RECORD]
    assert (cache.root / "secret").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("field", EngineKey.__struct_fields__)
def test_a_key_that_differs_in_one_field_is_refused(cache: EngineCache, field: str) -> None:
    other = msgspec.structs.replace(KEY, **{field: OTHER[field]})
    with pytest.raises(StaleEngineError, match="there is no engine"):
        cache.open(other, trust=True)
    shutil.copytree(cache.folder(KEY), cache.folder(other))  # as if two keys had one hash, or someone moved it
    with pytest.raises(StaleEngineError, match=f"differs in {field} from what is asked for"):
        cache.open(other, trust=True)


@pytest.mark.parametrize("field", ["name", "compute_capability", "driver"])
def test_another_gpu_or_driver_is_refused(cache: EngineCache, field: str) -> None:
    assert KEY.gpu is not None
    other = msgspec.structs.replace(KEY, gpu=msgspec.structs.replace(KEY.gpu, **{field: "another"}))
    with pytest.raises(StaleEngineError):
        cache.open(other, trust=True)


def test_a_changed_byte_is_refused(cache: EngineCache) -> None:
    path = cache.folder(KEY) / ENGINE
    for changed in (ENGINE_BYTES[:-1] + b"!", ENGINE_BYTES[:-1], ENGINE_BYTES + b"!", b""):
        path.write_bytes(changed)
        with pytest.raises(StaleEngineError):
            cache.open(KEY, trust=True)
    path.unlink()
    with pytest.raises(StaleEngineError, match="there is no engine"):
        cache.open(KEY, trust=True)


@pytest.mark.parametrize("field", sorted({*EngineRecord.__struct_fields__} - {"seal"}))
def test_an_edited_record_is_refused(cache: EngineCache, field: str) -> None:
    path = cache.folder(KEY) / RECORD
    edited = json.loads(path.read_text())
    match edited[field]:
        case int() | float() as number:
            edited[field] = number + 1
        case str() as text:
            edited[field] = text[::-1] + "0"
        case dict() as fields if field == "key":
            fields["library"] = "11.4.2"
        case dict() as fields if field == "spent":
            fields["optimization_level"] = 1
        case dict() as fields:
            fields["timestep"] = [[1], [1], [1]]
    path.write_text(json.dumps(edited))
    with pytest.raises(StaleEngineError):
        cache.open(KEY)


def test_an_engine_from_elsewhere_needs_trust(cache: EngineCache, tmp_path: Path) -> None:
    here = EngineCache(tmp_path / "here")
    shutil.copytree(cache.folder(KEY), here.folder(KEY))
    with pytest.raises(StaleEngineError, match="was not built here, and loading one runs code"):
        here.open(KEY)
    assert here.open(KEY, trust=True)[1] == ENGINE_BYTES


def test_the_same_key_has_the_same_folder_whatever_the_order_of_its_mappings(cache: EngineCache) -> None:
    rows = {"a": (1,), "b": (2,)}
    one, other = (msgspec.structs.replace(KEY, rows=dict(pairs)) for pairs in (rows.items(), reversed(rows.items())))
    assert cache.folder(one) == cache.folder(other)
