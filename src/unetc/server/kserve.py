"""KServe's Open Inference Protocol v2: whole sampling, and single calls of the denoiser.

A served model `m` is two models here. `m` samples: it takes the inputs in `inputs.py`, and returns `images` and `seed`.
`m.denoiser` makes one call of the full model: it takes the inputs of the denoiser, and returns `prediction`.

Source:
    https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import unetc
from unetc.artifacts.call_input import CallInput
from unetc.call import TIMESTEP
from unetc.errors import RequestError, ShapeMismatch
from unetc.report.pictures import to_pixels

from .door import Door, answer_unless_gone
from .errors import Problem, UnknownModel
from .inputs import INPUTS, applies
from .limits import LARGEST_WHOLE
from .open_inference import BYTES, HEADER_LENGTH, BodyError, InferRequest, TensorInput, read_infer, write_infer
from .service import ImageAnswer, ImageRequest, Served, Service, State

DENOISER = ".denoiser"
"""End of the name of the model that makes single calls."""
VERSION = "1"
"""The only version of every model."""
_OUTPUT_DATATYPE = "output_datatype"
"""Parameter that chooses the datatype of images or predictions."""
_OUTPUT_KINDS: Mapping[str, type[np.generic]] = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
_MOST_JSON = 4 * 2**20
"""Most bytes of values in an answer as JSON: there, a value takes twenty times its memory while it is written."""
_ROWS_PER_IMAGE = 3
"""Most rows that guidance calls the denoiser with, per image."""
_LARGEST_FP32 = float(np.finfo(np.float32).max)
_IGNORED = frozenset({"priority"})
"""Parameters of the protocol that change no output."""


def make_router(service: Service) -> APIRouter:
    """Make the routes of the protocol."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("")
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {"name": "unetc", "version": unetc.__version__, "extensions": ["binary_tensor_data"]}

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> Response:
        """Check whether the process can go on."""
        return Response(status_code=503 if service.state is State.FAILED else 200)

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready")
    async def ready() -> Response:
        """Succeed when all models take requests."""
        service.check_ready()
        return Response()

    @router.get("/models/{model}")
    @router.get("/models/{model}/versions/{version}")
    async def metadata(model: str, version: str = VERSION) -> dict[str, Any]:
        """Describe the inputs and outputs of a model."""
        served, denoiser = _find(service, model, version)
        described = _denoiser_metadata(served) if denoiser else _sampling_metadata(served)
        return {"name": model, "versions": [VERSION], "platform": "unetc", **described}

    @router.get("/models/{model}/ready")
    @router.get("/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str = VERSION) -> Response:
        """Succeed when a model takes requests."""
        _find(service, model, version)
        service.check_ready()
        return Response()

    @router.post("/models/{model}/infer")
    @router.post("/models/{model}/versions/{version}/infer")
    async def infer(model: str, request: Request, version: str = VERSION) -> Response:
        """Sample images, or call the denoiser once."""
        served, denoiser = _find(service, model, version)
        body, limit = await request.body(), service.settings.body_bytes
        if denoiser:
            asked = await service.in_thread(_asked, body, request.headers, limit)
            outputs, facts = await _call(service, served, asked)
        else:
            with service.counting_refusals(model):
                asked = await service.in_thread(_asked, body, request.headers, limit)
                wanted = await service.in_thread(_image_request, asked, served)
            answer = await answer_unless_gone(request, await service.submit(wanted))
            outputs, facts = await service.in_thread(_images_of, answer, asked)
        data, header = await service.in_thread(write_infer, asked, model, outputs, facts)
        if header is None:
            return Response(data, media_type="application/json")
        return Response(data, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header)})

    return router


def error_body(problem: Problem) -> dict[str, Any]:
    """Write an error in the protocol's form."""
    return {"error": problem.message}


DOOR = Door(prefixes=("/v2",), router=make_router, error=error_body, open=("/v2/health/live", "/v2/health/ready"))


def _find(service: Service, model: str, version: str) -> tuple[Served, bool]:
    """Look up a model, and whether its denoiser is meant."""
    if version != VERSION:
        raise UnknownModel(f"model {model[:100]} has no version {version[:20]!r}. Expected {VERSION}.")
    if model not in service.models and model.endswith(DENOISER):
        return service.find(model.removesuffix(DENOISER)), True
    return service.find(model), False


def _asked(body: bytes, headers: Mapping[str, str], limit: int) -> InferRequest:
    """Read the body of a request."""
    return read_infer(_decompressed(body, headers, limit), headers.get(HEADER_LENGTH))


def _decompressed(body: bytes, headers: Mapping[str, str], limit: int) -> bytes:
    """Undo gzip or deflate, within the limit on bodies."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise RequestError(f"Content-Encoding is {encoding[:20]!r}. Expected gzip, deflate or none.")
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: recognise gzip and zlib
    try:
        data = unpack.decompress(body, limit)
    except zlib.error as error:
        raise RequestError(f"the body is not valid {encoding}: {error}.") from error
    if unpack.unconsumed_tail:
        raise HTTPException(413, f"the body exceeds the limit of {limit} bytes when it is unpacked. Send less.")
    if not unpack.eof:
        raise RequestError(f"the body is not valid {encoding}: it is cut off.")
    if unpack.unused_data:
        raise RequestError(f"the body is not valid {encoding}: {len(unpack.unused_data)} bytes follow its end.")
    return data


# Whole sampling


def _sampling_metadata(served: Served) -> dict[str, Any]:
    """Describe the inputs and outputs of sampling; an axis of any size is -1."""
    channels = _channels(served)
    return {
        "inputs": [
            {"name": name, "datatype": one.datatype, "shape": list(one.shape), "parameters": {"optional": True}}
            for name, one in INPUTS.items()
            if applies(name, served.prompts)
        ],
        "outputs": [
            {"name": "images", "datatype": _default_datatype(channels), "shape": [-1, -1, -1, channels]},
            {"name": "seed", "datatype": "INT64", "shape": [-1]},
        ],
    }


def _channels(served: Served) -> int:
    manifest = served.bundle.manifest
    return manifest.sample_shape[0] if manifest.decoder is None else 3


def _default_datatype(channels: int) -> str:
    """Return the datatype of images; latents, which no bytes can hold, are float32."""
    return "UINT8" if channels in (1, 3) else "FP32"


def _image_request(asked: InferRequest, served: Served) -> ImageRequest:
    """Turn tensors and parameters into a request for images.

    Raises:
        BodyError: If one of them is wrong. It names all wrong ones.
    """
    problems: dict[str, str] = {}
    values: dict[str, Any] = {}
    parameters = dict(asked.parameters)
    if (kind := parameters.pop(_OUTPUT_DATATYPE, None)) is not None:
        allowed = _OUTPUT_KINDS if _channels(served) in (1, 3) else ("FP16", "FP32")
        if kind not in tuple(allowed):
            problems[_OUTPUT_DATATYPE] = f"expected one of {', '.join(allowed)}, got {kind!r}"
    if (limit := parameters.pop("timeout", None)) is not None:
        if type(limit) is not int or not 1 <= limit <= LARGEST_WHOLE:
            problems["timeout"] = f"expected a whole number of microseconds, got {str(limit)[:60]!r}"
        else:
            values["seconds"] = limit / 1e6
    for name, value in parameters.items():
        if name in asked.inputs:
            problems[name] = "is an input and a parameter; send one of them"
        elif name not in INPUTS or name == "image":
            if name not in _IGNORED:
                problems[name] = f"is not a known parameter; expected one of {', '.join(_known(served))}"
        else:
            _read(name, value, values, problems)
    for name, tensor in asked.inputs.items():
        if name not in INPUTS:
            problems[name] = f"is not a known input; expected some of {', '.join(_known(served))}"
        elif name == "image":
            _read_image(tensor, values, problems)
        else:
            _read_tensor(name, tensor, values, problems)
    _check_outputs(asked, ("images", "seed"), problems)
    if problems:
        raise BodyError(problems)
    seeds = values.pop("seed", None)
    if isinstance(seeds, tuple) and len(seeds) > 1:
        if values.pop("count", None) is not None:
            raise BodyError({"count": "is given with several seeds, which make one image each; omit it"})
        request = ImageRequest(model=served.name, seeds=seeds, **values)
    else:
        request = ImageRequest(model=served.name, seed=seeds[0] if isinstance(seeds, tuple) else seeds, **values)
    height, width = (given or own for given, own in zip((request.height, request.width), served.size, strict=True))
    channels = _channels(served)
    kind = kind or _default_datatype(channels)
    _check_json(asked, "images", request.total * height * width * channels * np.dtype(_OUTPUT_KINDS[kind]).itemsize)
    return request


def _known(served: Served) -> list[str]:
    return [name for name in INPUTS if applies(name, served.prompts)]


def _read(name: str, value: Any, values: dict[str, Any], problems: dict[str, str]) -> None:
    """Read one scalar."""
    wanted = INPUTS[name]
    if wanted.datatype == BYTES:
        good, expected = isinstance(value, str), "a string"
    elif wanted.datatype.startswith("INT"):
        good, expected = type(value) is int and abs(value) <= LARGEST_WHOLE, "a whole number that INT64 can hold"
    else:
        good, expected = (
            type(value) in (int, float) and abs(value) <= _LARGEST_FP32,
            "a finite number that FP32 can hold",
        )
    if good:
        values[wanted.field] = value
    else:
        problems[name] = f"expected {expected}, got {str(value)[:60]!r}"


def _read_tensor(name: str, tensor: TensorInput, values: dict[str, Any], problems: dict[str, str]) -> None:
    """Read a tensor of one element, or several seeds."""
    several = name == "seed"
    if tensor.array.size < 1 or (tensor.array.size > 1 and not several):
        problems[name] = f"has shape {list(tensor.array.shape)}; expected {'[count]' if several else '[1]'}"
        return
    listed = tensor.array.ravel().tolist()
    if tensor.datatype == BYTES:
        try:
            listed = [one.decode() for one in listed]
        except UnicodeDecodeError:
            problems[name] = "is not valid UTF-8"
            return
    for value in listed:
        _read(name, value, values, problems)
    if several and name not in problems:
        values[INPUTS[name].field] = tuple(listed)


def _read_image(tensor: TensorInput, values: dict[str, Any], problems: dict[str, str]) -> None:
    """Read an image to start from, as the bytes of a file."""
    array = tensor.array[0] if tensor.array.ndim == 4 and len(tensor.array) == 1 else tensor.array
    if tensor.datatype != "UINT8" or array.ndim != 3 or array.shape[2] not in (1, 3) or array.size == 0:
        shape = list(tensor.array.shape)
        problems["image"] = f"is {tensor.datatype} of shape {shape}; expected UINT8 of [height, width, 1 or 3]"
        return
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, "PNG", compress_level=0)
    values["image"] = file.getvalue()


def _check_outputs(asked: InferRequest, outputs: tuple[str, ...], problems: dict[str, str]) -> None:
    for name in asked.outputs or ():
        if name not in outputs:
            problems[name] = f"is not an output; expected {' or '.join(outputs)}"


def _check_json(asked: InferRequest, output: str, size: int) -> None:
    """Refuse an output as JSON that takes too much memory, before it is computed.

    Args:
        asked: The request.
        output: Name of the output.
        size: Its bytes.

    Raises:
        BodyError: If it is requested as JSON and too large.
    """
    requested = asked.outputs is None or output in asked.outputs
    if requested and not asked.is_binary(output) and size > _MOST_JSON:
        smaller = "UINT8 or fewer images" if output == "images" else "FP16 or fewer rows"
        raise BodyError(
            {output: f"has {size} bytes; expected at most {_MOST_JSON} in JSON. Ask for binary_data, {smaller}"}
        )


def _images_of(answer: ImageAnswer, asked: InferRequest) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Convert images to an output tensor, [image, height, width, channel], and say how they were made.

    Bytes are pixels from 0 to 255; other datatypes hold the samples, mostly between -1 and 1.
    """
    channels = answer.images.shape[1]
    kind = asked.parameters.get(_OUTPUT_DATATYPE) or _default_datatype(channels)
    if kind == "UINT8":
        pixels = to_pixels(answer.images)
        images: NDArray[Any] = pixels[..., None] if channels == 1 else pixels
    else:
        images = np.moveaxis(answer.images, 1, -1).astype(_OUTPUT_KINDS[kind])
    level = answer.level
    facts: dict[str, Any] = {
        "level": level.name,
        "time_ratio": level.time_ratio,
        "relative_l2": level.relative_l2,
        **({} if level.psnr is None else {"psnr": level.psnr}),
        **({"notes": " ".join(answer.notes)} if answer.notes else {}),
        "degraded": answer.degraded,
        "steps": answer.steps,
        "non_finite_steps": answer.non_finite_steps,
        "queue_seconds": answer.waited,
        "seconds": answer.took,
    }
    return {"images": images, "seed": np.array(answer.seeds, np.int64)}, facts


# Single calls of the denoiser


def _denoiser_metadata(served: Served) -> dict[str, Any]:
    """Describe the inputs and the output of a call; an axis of any size is -1."""
    calls, manifest = served.bundle.calls, served.bundle.manifest

    def described(item: CallInput) -> dict[str, Any]:
        shape = [-1, *(axis if isinstance(axis, int) else -1 for axis in item.axes)]
        entry = {"name": item.name, "datatype": "FP32" if item.classes is None else "INT64", "shape": shape}
        return {**entry, "parameters": {"optional": True}} if item.optional else entry

    inputs = [described(item) for item in calls.inputs]
    inputs.insert(1, {"name": TIMESTEP, "datatype": "FP32", "shape": [-1]})
    for extra in calls.controlnet:
        shape = [-1, extra.shape(1, 1024, 1024)[1], -1, -1]
        inputs.append({"name": extra.name, "datatype": "FP32", "shape": shape, "parameters": {"optional": True}})
    prediction = {"name": "prediction", "datatype": "FP32", "shape": [-1, manifest.predicted_channels, -1, -1]}
    return {"inputs": inputs, "outputs": [prediction]}


async def _call(
    service: Service, served: Served, asked: InferRequest
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Call the full model once; it predicts in the datatype of the sample if that is `FP16`, or as asked.

    Args:
        service: The service.
        served: The model.
        asked: Inputs of the call.
    """
    inputs = await service.in_thread(_call_inputs, service, served, asked)
    service.check_ready()  # only now, as it may have changed meanwhile
    kind = asked.parameters.get(_OUTPUT_DATATYPE)
    if kind is None:
        kind = "FP16" if asked.inputs["sample"].datatype == "FP16" else "FP32"
    rows, _, height, width = inputs["sample"].shape
    values = rows * served.bundle.manifest.predicted_channels * height * width
    _check_json(asked, "prediction", values * np.dtype(_OUTPUT_KINDS[kind]).itemsize)
    prediction = await service.calls.run(served, inputs)
    return await service.in_thread(_prediction_of, prediction, asked, kind), {}


def _prediction_of(prediction: NDArray[Any], asked: InferRequest, kind: str) -> dict[str, NDArray[Any]]:
    """Convert a prediction to an output tensor.

    Raises:
        RequestError: If it is requested as JSON, and has values that JSON cannot hold.
    """
    with np.errstate(over="ignore"):  # a number too large for float16 becomes infinity
        prediction = prediction.astype(_OUTPUT_KINDS[kind], copy=False)
    if not (asked.is_binary("prediction") or np.isfinite(prediction).all()):
        raise RequestError(
            f"the prediction for these inputs has values that {kind} in JSON cannot hold: NaN, infinity or beyond its "
            "range. Send smaller inputs, or ask for binary_data.",
            "sample",
        )
    return {"prediction": prediction}


def _call_inputs(service: Service, served: Served, asked: InferRequest) -> dict[str, NDArray[Any]]:
    """Check the inputs of a call, and add absent ones that are zero.

    Raises:
        BodyError: If an input is wrong.
    """
    calls = served.bundle.calls
    problems: dict[str, str] = {}
    for name, value in asked.parameters.items():
        if name == _OUTPUT_DATATYPE:
            if value not in ("FP16", "FP32"):
                problems[name] = f"expected FP16 or FP32, got {value!r}"
        elif name not in _IGNORED:
            problems[name] = f"is not a known parameter; expected {_OUTPUT_DATATYPE}"
    _check_outputs(asked, ("prediction",), problems)
    by_name = {item.name: item for item in calls.inputs}
    known = [calls.inputs[0].name, TIMESTEP, *(item.name for item in calls.conditions)]
    known += [extra.name for extra in calls.controlnet]
    given: dict[str, NDArray[Any]] = {}
    for name, tensor in asked.inputs.items():
        if name not in known:
            problems[name] = f"is not an input; expected {', '.join(known)}"
        elif tensor.datatype == BYTES:
            problems[name] = "is BYTES; expected numbers"
        else:
            try:
                given[name] = by_name.get(name, CallInput(name=name, axes=())).read(tensor.array)
            except ShapeMismatch as error:
                problems[name] = str(error).removeprefix(f"{name} ")
    for name in ("sample", TIMESTEP):
        if name not in asked.inputs:
            problems[name] = "is missing"
    if problems:
        raise BodyError(problems)
    sample, timestep = given.pop("sample"), given.pop(TIMESTEP)
    given = calls.fill(given, len(sample) if sample.ndim else 0)
    try:
        calls.check(sample, given)
    except ShapeMismatch as error:
        raise RequestError(str(error), "sample") from error
    batch, _, height, width = sample.shape
    if timestep.shape not in ((), (1,), (batch,)):
        raise BodyError({TIMESTEP: f"has shape {list(timestep.shape)}; expected [{batch}] or [1]"})
    limits = service.settings
    if batch > _ROWS_PER_IMAGE * limits.images:
        raise BodyError({"sample": f"has {batch} rows; expected at most {_ROWS_PER_IMAGE * limits.images}"})
    if problem := served.problem_of_size(height * served.scale, width * served.scale, limits.pixels):
        raise BodyError({"sample": f"is of height {height} and width {width}; {problem.removesuffix('.')}"})
    zeros = {one.name: np.zeros(one.shape(batch, height, width), np.float32) for one in calls.controlnet}
    times = np.ascontiguousarray(np.broadcast_to(timestep.reshape(-1), (batch,)), np.float32)
    return {"sample": sample, TIMESTEP: times, **zeros, **given}
