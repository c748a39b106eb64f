"""Requests that differ from valid ones, for every door of the server."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.promises.mutation import documents
from unetc.server.open_inference import HEADER_LENGTH

JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request."""

    method: str = "POST"
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": JSON})


def picture() -> str:
    """Make a small image, as base64."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


_MADE: Mapping[str, Any] = {
    "model": "plain",
    "n": 1,
    "size": "16x16",
    "quality": "auto",
    "min_quality": "full",
    "degrade": True,
    "seed": [7],
    "num_inference_steps": 4,
    "timeout": 5.0,
    "output_format": "webp",
    "output_compression": 50,
    "user": "somebody",
    "background": "auto",
}
_FROM_IMAGE = {"image": picture(), "strength": 0.75, "num_inference_steps": 4}
_DRAWN = {
    "prompt": "",
    "seed": 3,
    "steps": 4,
    "width": 16,
    "height": 16,
    "batch_size": 1,
    "n_iter": 1,
    "cfg_scale": 7,
    "sampler_name": "Automatic",
    "styles": [],
    "override_settings": {"sd_model_checkpoint": "plain"},
    "alwayson_scripts": {"ControlNet": {"args": []}},
    "eta": 0,
}


def _tensor(name: str, datatype: str, *data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": [*data]}


_ROWS = np.linspace(-1, 1, 256).round(3).tolist()
BODIES: Mapping[str, tuple[Any, ...]] = {
    "/v1/images/generations": (_MADE, _FROM_IMAGE, {"seed": 1, "stream": True, "partial_images": 1}),
    "/v1/jobs": (_MADE, _FROM_IMAGE),
    "/sdapi/v1/txt2img": (_DRAWN,),
    "/sdapi/v1/img2img": (_DRAWN | {"init_images": [picture()], "denoising_strength": 0.75},),
    "/sdapi/v1/options": ({"sd_model_checkpoint": "plain", "samples_format": "png"},),
    "/v2/models/plain/infer": (
        {
            "id": "a",
            "inputs": [
                _tensor("seed", "INT64", 1),
                _tensor("steps", "INT32", 4),
                _tensor("quality", "BYTES", "auto"),
            ],
            "parameters": {"timeout": 10**6, "output_datatype": "FP32", "binary_data_output": True},
            "outputs": [{"name": "images", "parameters": {"binary_data": False}}, {"name": "seed"}],
        },
        {"inputs": [_tensor("image", "UINT8", *range(256)) | {"shape": [16, 16, 1]}], "parameters": {"steps": 4}},
    ),
    "/v2/models/plain.denoiser/infer": (
        {
            "inputs": [
                _tensor("sample", "FP32", *_ROWS) | {"shape": [1, 1, 16, 16]},
                _tensor("timestep", "FP32", 500.0),
            ]
        },
    ),
}
"""A few valid bodies for each address that takes one."""
_TEXTS = {"prompt": "a cat, and a dog", "negative_prompt": "rain", "seed": 1}
PROMPTED: Mapping[str, tuple[Any, ...]] = {
    "/v1/images/generations": (_TEXTS | {"guidance_scale": 3.0}, _TEXTS | {"image": picture(), "strength": 0.5}),
    "/sdapi/v1/txt2img": (_TEXTS | {"cfg_scale": 3, "steps": 4},),
    "/sdapi/v1/img2img": (_TEXTS | {"init_images": [picture()], "denoising_strength": 0.5},),
    "/v2/models/plain/infer": (
        {"inputs": [_tensor(name, "BYTES", text) for name, text in _TEXTS.items() if isinstance(text, str)]},
    ),
}
"""The same for a model that takes prompts."""

_ODD_HEADERS: tuple[Mapping[str, str], ...] = (
    {},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": JSON, "Content-Encoding": "gzip"},
    {"Content-Type": JSON, "Content-Encoding": "deflate"},
    {"Content-Type": JSON, "Content-Encoding": "zstd"},
    {"Content-Type": JSON, HEADER_LENGTH: "1"},
    {"Content-Type": JSON, HEADER_LENGTH: "-1"},
    {"Content-Type": JSON, "Authorization": "Basic %%%"},
    {"Content-Type": JSON, "X-Request-Id": "a" * 500},
    {"Content-Type": JSON, "Content-Length": "99999999999999999999"},
    {"Content-Type": JSON, "Accept": "text/event-stream", "Range": "bytes=9-1"},
)


@st.composite
def bodies(draw: st.DrawFn, examples: Mapping[str, tuple[Any, ...]], *paths: str) -> Sent:
    """Change a valid body for one of several addresses, and now and then the headers."""
    path = draw(st.sampled_from(paths))
    body = draw(documents(*map(json.dumps, examples[path])))
    if draw(st.integers(0, 9)):
        return Sent(path=path, body=body)
    headers = draw(st.sampled_from(_ODD_HEADERS))
    if headers.get("Content-Encoding") == "deflate":
        body = zlib.compress(body)
    return Sent(path=path, body=body, headers=headers)


@st.composite
def tensors(draw: st.DrawFn) -> Sent:
    """Change a body with tensors as bytes: the JSON, the bytes, or their stated lengths."""
    values = np.linspace(-1, 1, 256, dtype=np.float32).tobytes() + struct.pack("<f", 500.0)
    head = [
        {"name": "sample", "datatype": "FP32", "shape": [1, 1, 16, 16], "parameters": {"binary_data_size": 1024}},
        {"name": "timestep", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}},
    ]
    text = json.dumps({"inputs": head, "outputs": [{"name": "prediction", "parameters": {"binary_data": True}}]})
    changed = draw(documents(text)) if draw(st.booleans()) else text.encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(values)))
        values = values[:at] + draw(st.binary(max_size=8)) + values[at + draw(st.integers(0, 8)) :]
    length = len(changed) + draw(st.sampled_from((0, 0, 0, 1, -1, 100)))
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(length)}
    return Sent(path="/v2/models/plain.denoiser/infer", body=changed + values, headers=headers)


def is_error(path: str, answer: httpx2.Response) -> bool:
    """Check whether an answer is an error in the form of the API that an address belongs to."""
    try:
        body = answer.json()
    except ValueError:
        return path.startswith("/v2/health")
    if path.startswith("/sdapi"):
        return sorted(body) == ["body", "detail", "error", "errors"] and bool(body["detail"])
    if path.startswith("/v2"):
        return sorted(body) == ["error"] and isinstance(body["error"], str)
    wanted = ["code", "message", "param", "type"] if path.startswith("/v1") else ["code", "message"]
    return sorted(body["error"]) == wanted and bool(body["error"]["message"])
