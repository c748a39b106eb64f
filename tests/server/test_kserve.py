"""KServe's protocol, spoken by NVIDIA's client to a real server process."""

from __future__ import annotations

import gzip
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import unetc
from tests.server.live import Live
from tests.server.local import in_loop, local
from unetc.report.pictures import to_pixels
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.server import kserve

triton = pytest.importorskip("tritonclient.http")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException

DATATYPES = {np.dtype(np.int64): "INT64", np.dtype(np.int32): "INT32", np.dtype(np.float32): "FP32"} | {
    np.dtype(np.float16): "FP16",
    np.dtype(np.uint8): "UINT8",
    np.dtype(object): "BYTES",
}


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    """Connect the client."""
    with triton.InferenceServerClient(live.host) as connected:
        yield connected


def tensors(*, binary: bool = True, **values: Any) -> list[Any]:
    """Describe inputs to the client."""
    made = []
    for name, value in values.items():
        array = np.asarray(value, object if isinstance(value, str) else None)
        array = array.reshape(1) if array.ndim == 0 else array
        tensor = triton.InferInput(name, list(array.shape), DATATYPES[array.dtype])
        tensor.set_data_from_numpy(array, binary_data=binary)
        made.append(tensor)
    return made


def only(*names: str, binary: bool = True) -> list[Any]:
    """Request outputs by name."""
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def refusal(client: Any, model: str, inputs: list[Any], status: int = 400, **options: Any) -> str:
    """Return the message of a refusal."""
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs, **options)
    assert caught.value.status() == str(status)
    return str(caught.value.message())


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> NDArray[np.float32]:
    """Sample two images of the model without prompts in this process, with the full model."""
    return np.asarray(unetc.load(tiny_bundle).sample(2, seed=7, full_model=True))


def test_health_and_metadata(client: Any) -> None:
    """The client finds the server, the models and their inputs and outputs."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for model in ("plain", "prompted", "plain.denoiser"):
        assert client.is_model_ready(model)
        assert client.is_model_ready(model, "1")
        assert client.get_model_metadata(model, "1")["name"] == model
    assert not client.is_model_ready("absent")
    assert not client.is_model_ready("plain", "2")
    plain = client.get_model_metadata("plain")
    assert plain["outputs"][0] == {"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}
    assert "prompt" not in {one["name"] for one in plain["inputs"]}
    assert "prompt" in {one["name"] for one in client.get_model_metadata("prompted")["inputs"]}


@pytest.mark.parametrize("binary", [True, False])
def test_sampling_as_json_and_as_bytes(client: Any, expected: NDArray[np.float32], binary: bool) -> None:
    """Both ways give the images of a session."""
    inputs = tensors(binary=binary, seed=7, count=np.int32(2), quality="full")
    answer = client.infer("plain", inputs, outputs=only("images", "seed", binary=binary), request_id="mine")
    images = answer.as_numpy("images")
    assert images.dtype == np.uint8
    np.testing.assert_allclose(images[..., 0].astype(int), to_pixels(expected).astype(int), atol=1)
    assert answer.as_numpy("seed").tolist() == [7, 7]
    facts = answer.get_response()
    assert facts["id"] == "mine"
    assert (facts["parameters"]["level"], facts["parameters"]["steps"]) == ("full", 4)


def test_scalars_may_be_parameters(client: Any, expected: NDArray[np.float32]) -> None:
    """Inputs are optional, and so are outputs: all are sent as bytes then."""
    parameters = {"seed": 7, "count": 2, "quality": "full", "output_datatype": "FP32"}
    images = client.infer("plain", [], parameters=parameters, timeout=60_000_000, priority=1).as_numpy("images")
    np.testing.assert_allclose(np.moveaxis(images, -1, 1), expected, atol=1e-4)
    half = client.infer("plain", [], parameters={**parameters, "output_datatype": "FP16"}).as_numpy("images")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, images, atol=2e-3)


def test_several_seeds_make_one_image_each(client: Any) -> None:
    """Each is the first image of its seed."""
    several = client.infer("plain", tensors(seed=np.array([3, 9])))
    alone = client.infer("plain", tensors(seed=9))
    assert several.as_numpy("seed").tolist() == [3, 9]
    np.testing.assert_allclose(several.as_numpy("images")[1].astype(int), alone.as_numpy("images")[0], atol=1)


def test_prompts_are_read(client: Any) -> None:
    """A bundle without text encoders takes its own prompts, and names them in a refusal."""
    one = client.infer("prompted", tensors(prompt="a red square", seed=1)).as_numpy("images")
    other = client.infer("prompted", tensors(prompt="a blue circle", seed=1)).as_numpy("images")
    assert one.shape == (1, 32, 32, 3)
    assert (one != other).any()
    assert "'a red square'" in refusal(client, "prompted", tensors(prompt="a green lake"))
    assert "prompt" in refusal(client, "plain", tensors(prompt="a red square"))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_one_call_of_the_denoiser(client: Any, tiny_bundle: Path, kind: type[np.floating[Any]]) -> None:
    """A call predicts as the engine of the bundle does; half precision is converted both ways."""
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((3, 1, 16, 16)).astype(kind)
    times = np.array([10, 500, 900], np.float32)
    prediction = client.infer("plain.denoiser", tensors(sample=sample, timestep=times)).as_numpy("prediction")
    assert prediction.dtype == kind
    bundle, backend = Bundle.open(tiny_bundle), open_backend("onnxruntime:cpu", threads=1)
    program = backend.open_weights(bundle.weights).load(bundle.graph_of(bundle.manifest.full))
    expected = np.empty(sample.shape, np.float32)
    program({"sample": sample.astype(np.float32), "timestep": times}, expected)
    np.testing.assert_allclose(prediction, expected, atol=2e-2 if kind == np.float16 else 1e-4)


def test_the_denoiser_takes_conditions_and_one_timestep_for_all(client: Any) -> None:
    """Conditions change the prediction; JSON and bytes agree."""
    described = {one["name"]: one["shape"] for one in client.get_model_metadata("prompted.denoiser")["inputs"]}
    rng = np.random.default_rng(1)
    sample = rng.standard_normal((2, *described["sample"][1:2], 16, 16)).astype(np.float32)
    words = rng.standard_normal((2, 6, described["encoder_hidden_states"][2])).astype(np.float32)
    inputs = {"sample": sample, "timestep": np.array([40], np.int64), "encoder_hidden_states": words}
    given = client.infer("prompted.denoiser", tensors(**inputs)).as_numpy("prediction")
    as_json = client.infer(
        "prompted.denoiser", tensors(binary=False, **inputs), outputs=only("prediction", binary=False)
    ).as_numpy("prediction")
    np.testing.assert_allclose(as_json, given, atol=1e-6)
    changed = client.infer("prompted.denoiser", tensors(**inputs | {"encoder_hidden_states": -words}))
    assert np.abs(changed.as_numpy("prediction") - given).max() > 1e-3


def test_compressed_requests_are_unpacked_within_the_limit(client: Any, live: Live) -> None:
    """The client may compress; a small body that becomes a large one is refused."""
    for algorithm in ("gzip", "deflate"):
        answer = client.infer("plain", tensors(seed=7), request_compression_algorithm=algorithm)
        assert answer.as_numpy("images").shape == (1, 16, 16, 1)
    large = np.zeros((17 * 1024, 1, 16, 16), np.float32)
    options = {"request_compression_algorithm": "gzip"}
    message = refusal(client, "plain.denoiser", tensors(sample=large, timestep=np.float32(1)), 413, **options)
    assert f"{16 * 2**20} bytes" in message
    followed = gzip.compress(json.dumps({"inputs": []}).encode()) + b"more"
    for encoding, body in (("br", b"{}"), ("gzip", b"{}"), ("gzip", b""), ("gzip", followed)):
        answer = live.post("/v2/models/plain/infer", headers={"Content-Encoding": encoding}, content=body)
        assert answer.status_code == 400


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sed": 1}, ["sed: is not a known input; expected some of seed"]),
        ({"seed": np.float32(1.5)}, ["seed: expected a whole number"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"steps": np.array([3, 4]), "count": "2"}, ["steps: has shape [2]", "count: expected a whole number"]),
        ({"count": 99}, ["count is 99"]),
        ({"quality": "11%"}, ["quality", "full"]),
        ({"height": 17}, ["height"]),
        ({"strength": np.float32(0.5)}, ["strength needs an image"]),
        ({"image": np.zeros((4, 4), np.uint8)}, ["image: is UINT8 of shape [4, 4]"]),
        ({"seed": np.array([1, 2]), "count": 2}, ["count: is given with several seeds"]),
    ],
)
def test_wrong_inputs_are_named(client: Any, values: dict[str, Any], named: list[str]) -> None:
    """All wrong inputs are named at once, in the protocol's form."""
    message = refusal(client, "plain", tensors(**values))
    for words in named:
        assert words in message


def test_wrong_parameters_and_outputs_are_named(client: Any) -> None:
    """A parameter that would be ignored is refused."""
    parameters = {"stepz": 3, "output_datatype": "INT8", "seed": 2}
    message = refusal(client, "plain", tensors(seed=1), outputs=only("image"), parameters=parameters)
    for name in ("stepz", "output_datatype", "seed: is an input and a parameter", "image: is not an output"):
        assert name in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"timestep": 1.0}, "sample: is missing"),
        ({"sample": np.zeros((1, 1, 16, 16), np.float32)}, "timestep: is missing"),
        ({"sample": np.zeros((1, 2, 16, 16), np.float32), "timestep": 1.0}, "sample has shape [1, 2, 16, 16]"),
        ({"sample": np.zeros((16, 16), np.float32), "timestep": 1.0}, "sample has shape [16, 16]"),
        ({"sample": np.zeros((0, 1, 16, 16), np.float32), "timestep": 1.0}, "sample has shape [0, 1, 16, 16]"),
        ({"sample": np.zeros((1, 1, 15, 16), np.float32), "timestep": 1.0}, "15"),
        (
            {"sample": np.zeros((2, 1, 16, 16), np.float32), "timestep": np.zeros(3, np.float32)},
            "timestep: has shape [3]",
        ),
        (
            {"sample": np.zeros((49, 1, 16, 16), np.float32), "timestep": 1.0},
            "sample: has 49 rows; expected at most 48",
        ),
        ({"sample": "a", "timestep": 1.0}, "sample: is BYTES"),
        ({"sample": np.zeros((1, 1, 16, 16), np.float32), "timestep": 1.0, "class_labels": 3}, "class_labels"),
    ],
)
def test_wrong_calls_of_the_denoiser_are_named(client: Any, values: dict[str, Any], words: str) -> None:
    """A call that would break an engine never reaches it."""
    values = {name: np.float32(value) if isinstance(value, float) else value for name, value in values.items()}
    assert words in refusal(client, "plain.denoiser", tensors(**values))


@in_loop
async def test_numbers_of_many_digits_are_named(tiny_bundle: Path) -> None:
    """Python neither prints a number of thousands of digits nor makes a float of it."""
    whole = ("height", "width", "count", "steps", "seed", "label", "timeout")
    async with local(tiny_bundle) as (client, _):
        for number in ("9" * 400, "9" * 4000, "-" + "9" * 4000):
            names = (*whole, "guidance_scale", "strength")
            values = ", ".join(f'"{name}": {number}' for name in names)
            content = f'{{"parameters": {{{values}}}}}'
            answer = await client.post("/v2/models/plain/infer", content=content)
            assert answer.status_code == 400
            for name in names:
                assert f"{name}: expected a " in answer.json()["error"]


@in_loop
async def test_null_leaves_the_datatype_to_the_server(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (client, _):
        answer = await client.post("/v2/models/plain/infer", json={"parameters": {"output_datatype": None}})
        assert answer.status_code == 200
        assert answer.json()["outputs"][0]["datatype"] == "UINT8"


def test_unknown_models_and_large_bodies(client: Any, live: Live) -> None:
    """Failures have the statuses of HTTP, and every message has the protocol's form."""
    assert "absent" in refusal(client, "absent", tensors(seed=1), 404)
    assert "version" in refusal(client, "plain", tensors(seed=1), 404, model_version="2")
    large = tensors(sample=np.zeros((1, 1, 2200, 2200), np.float32), timestep=np.float32(1))
    assert "limit" in refusal(client, "plain.denoiser", large, 413)
    answer = live.post("/v2/models/plain/infer", content=b"{")
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert list(live.get("/v2/nothing").json()) == ["error"]


def test_predictions_that_json_cannot_hold(client: Any) -> None:
    """NaN is sent as bytes; JSON has none."""
    inputs = tensors(sample=np.full((1, 1, 16, 16), np.nan, np.float32), timestep=np.float32(1))
    assert np.isnan(client.infer("plain.denoiser", inputs).as_numpy("prediction")).any()
    assert "NaN" in refusal(client, "plain.denoiser", inputs, 400, outputs=only("prediction", binary=False))


@in_loop
async def test_large_tensors_are_no_json(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before they are computed; as bytes they may be larger."""
    monkeypatch.setattr("unetc.server.kserve._MOST_JSON", 1000)
    async with local(tiny_bundle) as (client, service):
        path = "/v2/models/plain/infer"
        parameters = {"count": 1, "output_datatype": "FP32"}
        refused = await client.post(path, json={"parameters": parameters})
        assert refused.status_code == 400
        assert "images: has 1024 bytes; expected at most 1000 in JSON" in refused.json()["error"]
        for parameter in ({"output_datatype": "UINT8"}, {"binary_data_output": True}):
            answer = await client.post(path, json={"parameters": parameters | parameter})
            assert answer.status_code == 200
        shapes = {"sample": [1, 1, 16, 16], "timestep": [1]}
        inputs = [
            {"name": name, "datatype": "FP32", "shape": shape, "data": [1.0] * math.prod(shape)}
            for name, shape in shapes.items()
        ]
        refused = await client.post("/v2/models/plain.denoiser/infer", json={"inputs": inputs})
        assert refused.status_code == 400
        assert "prediction: has 1024 bytes" in refused.json()["error"]
        assert service.unfinished == 0


@in_loop
async def test_tensors_are_read_and_made_on_threads(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop goes on meanwhile."""
    seen: dict[str, str] = {}

    def noted(name: str) -> None:
        function = getattr(kserve, name)

        def run(*arguments: Any) -> Any:
            seen[name] = threading.current_thread().name
            return function(*arguments)

        monkeypatch.setattr(kserve, name, run)

    names = ("_decompressed", "_read_image", "_images_of", "_call_inputs", "_prediction_of")
    for name in names:
        noted(name)
    image = {"name": "image", "datatype": "UINT8", "shape": [16, 16, 1], "data": [0] * 256}
    call = [
        {"name": name, "datatype": "FP32", "shape": shape, "data": [1.0] * math.prod(shape)}
        for name, shape in {"sample": [1, 1, 16, 16], "timestep": [1]}.items()
    ]
    async with local(tiny_bundle) as (client, _):
        for model, inputs in (("plain", [image]), ("plain.denoiser", call)):
            answer = await client.post(f"/v2/models/{model}/infer", json={"inputs": inputs})
            assert answer.status_code == 200, answer.text
    assert seen.keys() == set(names)
    assert all(thread.startswith("unetc-door") for thread in seen.values()), seen


def test_an_image_may_be_where_sampling_starts(client: Any) -> None:
    """The result depends on the image and on the strength."""
    image = np.zeros((16, 16, 1), np.uint8)
    made = [
        client.infer("plain", tensors(image=one, strength=np.float32(strength), seed=1)).as_numpy("images")
        for one, strength in ((image, 0.5), (255 - image, 0.5), (image, 1.0))
    ]
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()


def test_metadata_is_plain_json(live: Live) -> None:
    """Without a client, too."""
    described = json.loads(live.get("/v2/models/plain.denoiser").text)
    assert [one["name"] for one in described["inputs"]] == ["sample", "timestep"]
