"""An engine in a cache, and keys that differ from its own in one field."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import Effort, EngineKey, Gpu, Origin
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision

ENGINE_BYTES = b"not an engine, but bytes that nobody may change"
ONE, TWO = Range(least=1, usual=1, most=1), Range(least=1, usual=2, most=2)
GPU = Gpu(name="NVIDIA L40S", compute_capability="8.9", driver="580.65.06")
ORIGIN = Origin(unetc="0.1.0", recipe=2, target="tensorrt", library="11.4.1", platform="Linux x86_64", gpu=GPU)
KEY = EngineKey(
    origin=ORIGIN,
    graph_sha256="1" * 64,
    weights_sha256="2" * 64,
    precision=Precision.FP32,
    sizes=Sizes(batch=TWO, height=ONE, width=ONE),
    rows={"encoder_hidden_states": (77, 768)},
    effort=Effort(),
)
OTHER_ORIGIN: dict[str, Any] = {
    "unetc": "0.1.1",
    "recipe": 1,
    "target": "tensorrt-rtx",
    "library": "11.4.2",
    "platform": "Windows AMD64",
    "gpu": msgspec.structs.replace(GPU, driver="580.65.07"),
}
OTHER: dict[str, Any] = {
    "graph_sha256": "3" * 64,
    "weights_sha256": "3" * 64,
    "precision": Precision.FP16,
    "sizes": Sizes(batch=ONE, height=ONE, width=ONE),
    "rows": {"encoder_hidden_states": (78, 768)},
    "effort": Effort(optimization_level=2),
}
"""For every field of a key, a value that differs as little as possible."""
FIELDS = [*Origin.__struct_fields__, *sorted({*EngineKey.__struct_fields__} - {"origin"})]


def differing(field: str) -> EngineKey:
    """Make a key that differs in one field."""
    if field in OTHER:
        return msgspec.structs.replace(KEY, **{field: OTHER[field]})
    return msgspec.structs.replace(KEY, origin=msgspec.structs.replace(ORIGIN, **{field: OTHER_ORIGIN[field]}))


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
        scratch_bytes=None,
    )


def cache_in(folder: Path) -> EngineCache:
    """Make a cache with one engine."""
    cache = EngineCache(folder / "engines")
    cache.put(record(), ENGINE_BYTES)
    return cache
