from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import unetc
from tests.house.test_imports import BLOCK
from tests.house.test_imports import run as run_alone
from tests.triton.server import Refused, Server
from unetc.artifacts.manifest import MANIFEST, Manifest
from unetc.device import Array
from unetc.errors import CorruptArtifactError
from unetc.report.pictures import to_pixels
from unetc.triton import sampling
from unetc.triton.asked import MOST_IMAGES

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("level", ["full", None, "90%"])
def test_images_are_those_of_a_session(level: str | None, server: Server, ladder_bundle: Path) -> None:
    expected = unetc.load(ladder_bundle, level=level).sample(3, seed=5, steps=4)
    got = server.infer(seed=5, count=3, steps=4, **({"quality": level} if level else {}))
    np.testing.assert_allclose(got["samples"], expected, **CLOSE)
    assert np.abs(got["images"][..., 0].astype(int) - to_pixels(expected)).max() <= 1
    assert got["images"].shape == (3, *expected.shape[2:], 1)
    assert got["seed"].tolist() == [5, 5, 5]


def test_levels_differ(server: Server, ladder_bundle: Path) -> None:
    names = [level.name for level in Manifest.load(ladder_bundle / MANIFEST).levels]
    images = [server.infer(seed=1, quality=name)["samples"] for name in ("full", *names)]
    assert not np.allclose(images[0], images[1], atol=1e-3)
    assert not np.allclose(images[1], images[2], atol=1e-3)
    np.testing.assert_array_equal(server.infer(seed=1)["samples"], images[1])
    np.testing.assert_array_equal(server.infer(seed=1, quality="auto")["samples"], images[1])
    np.testing.assert_array_equal(server.infer(seed=1, quality="0.9")["samples"], images[2])


def test_prompts_are_guided_and_decoded_as_in_a_session(prompted_server: Server, prompted_bundle: Path) -> None:
    session = unetc.load(prompted_bundle)
    got = prompted_server.infer(seed=2, count=2)
    np.testing.assert_allclose(got["samples"], session.sample(2, seed=2), **CLOSE)
    assert got["images"].dtype == np.uint8
    assert got["images"].shape[-1] == 3
    assert prompted_server.models["prompted-decoder"].calls[-2:] == [1, 1]
    one = prompted_server.infer(seed=2, count=2, prompt="#1")["samples"]
    np.testing.assert_allclose(one, session.sample(2, seed=2, conditions=session.conditions.take([1, 1])), **CLOSE)
    assert not np.allclose(one, got["samples"], atol=1e-3)
    plain = prompted_server.infer(seed=2, count=2, guidance_scale=1.0)["samples"]
    assert not np.allclose(plain, got["samples"], atol=1e-3)


def test_several_seeds_make_one_image_each(server: Server, prompted_server: Server) -> None:
    for one in (server, prompted_server):
        together = one.infer(seed=[3, 8])
        alone = [one.infer(seed=seed)["samples"] for seed in (3, 8)]
        np.testing.assert_allclose(together["samples"], np.concatenate(alone), **CLOSE)
        assert together["seed"].tolist() == [3, 8]


def test_a_seed_is_drawn_and_returned(server: Server) -> None:
    first, second = server.infer(), server.infer()
    assert first["seed"].tolist() != second["seed"].tolist()
    again = server.infer(seed=int(first["seed"][0]))
    np.testing.assert_array_equal(again["samples"], first["samples"])


def test_more_rows_than_an_engine_takes_make_several_calls(
    ladder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unetc.triton.export.best_batch", lambda times: 2)
    unetc.export_triton(ladder_bundle, tmp_path / "r", unetc.ExportOptions(name="m"))
    server = Server(tmp_path / "r")
    got = server.infer(seed=4, count=5)["samples"]
    assert {rows for model in server.models.values() for rows in model.calls} == {1, 2}
    np.testing.assert_allclose(got, unetc.load(ladder_bundle).sample(5, seed=4), **CLOSE)


def test_only_requested_outputs_are_sent(server: Server) -> None:
    assert server.infer(outputs=["images"], seed=0).keys() == {"images"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": MOST_IMAGES + 1}, f"Expected 1 to {MOST_IMAGES} images"),
        ({"count": 2, "seed": [1, 2]}, "one image each"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 3000}, "This model has tables for"),
        ({"quality": "best"}, "Expected one of: auto, full"),
        ({"quality": b"\xff"}, "not valid UTF-8"),
    ],
)
def test_a_wrong_input_is_refused_by_name(wrong: dict[str, object], message: str, server: Server) -> None:
    with pytest.raises(Refused, match=f"INVALID_ARG: .*{message}"):
        server.infer(**wrong)


def test_wrong_prompts_are_refused(prompted_server: Server) -> None:
    for wrong, message in (
        ({"prompt": "nothing known"}, "The prompt must be one of"),
        ({"prompt": "a" * 5000}, "5000 characters"),
        ({"guidance_scale": float("nan")}, "Expected a finite number"),
        ({"guidance_scale": 500.0}, "Expected 0 to 100"),
    ):
        with pytest.raises(Refused, match=f"INVALID_ARG: .*{message}"):
            prompted_server.infer(**wrong)


def test_a_wrong_request_does_not_disturb_the_others(server: Server) -> None:
    seed = np.array([9], np.int64)
    good, bad, again = server.execute({"seed": seed}, {"count": np.array([0], np.int32)}, {"seed": seed})
    assert [one.has_error() for one in (good, bad, again)] == [False, True, False]
    first, second = (next(t.as_numpy() for t in one.output_tensors() if t.name() == "samples") for one in (good, again))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 7 GiB"), "the memory is used up"),
        (KeyError("x"), "Triton's log has the reason"),
    ],
    ids=["memory", "bug"],
)
def test_an_unexpected_failure_does_not_disturb_the_others(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    convert = sampling.images_of

    def fail(samples: Array) -> Array:
        if len(samples) == 2:
            raise error
        return convert(samples)

    monkeypatch.setattr(sampling, "images_of", fail)
    count = np.array([2], np.int32)
    good, bad, again = server.execute({}, {"count": count}, {})
    assert [one.has_error() for one in (good, bad, again)] == [False, True, False]
    assert bad.error().code() == "INTERNAL"
    assert message in bad.error().message()


def test_a_failing_engine_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise Refused("out of memory")

    monkeypatch.setattr(server.models["tiny-full"], "infer", fail)
    with pytest.raises(Refused, match="INTERNAL: the model tiny-full failed: out of memory"):
        server.infer(quality="full")


def test_a_changed_loop_is_refused(repository: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(repository, tmp_path / "r"))
    for path in (copied / "tiny/1/bundle").rglob("full.onnx"):
        path.write_bytes(path.read_bytes().replace(b"tiny-full", b"evil-full"))
    with pytest.raises(CorruptArtifactError, match="has changed since the build"):
        Server(copied)


WITHOUT_EXTRAS = """
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from unetc.triton.sampling import SamplingModel


def tensor(name, array):
    return SimpleNamespace(name=name, as_numpy=lambda: array)


def request(model_name, requested_output_names, inputs, **others):
    zeros = [tensor(name, np.zeros_like(inputs[0].as_numpy())) for name in requested_output_names]
    response = SimpleNamespace(tensors=zeros, has_error=lambda: False)
    return SimpleNamespace(exec=lambda: response)


utilities = SimpleNamespace(
    Tensor=tensor,
    InferenceRequest=request,
    InferenceResponse=lambda output_tensors: output_tensors,
    PreferredMemory=lambda *memory: memory,
    TRITONSERVER_MEMORY_CPU=0,
    get_input_tensor_by_name=lambda request, name: None,
    get_output_tensor_by_name=lambda response, name: next(one for one in response.tensors if one.name == name),
)
model = SamplingModel.open(Path(FOLDER), utilities)
((images, seed),) = model.execute([SimpleNamespace(requested_output_names=lambda: ["images", "seed"])])
print(images.as_numpy().shape, images.as_numpy().dtype)
"""


def test_the_loop_runs_in_the_base_installation(repository: Path) -> None:
    """Engines that predict zeros are enough to run it; onnxruntime, torch and the server's libraries are blocked."""
    code = WITHOUT_EXTRAS.replace("FOLDER", repr(str(repository / "tiny/1")))
    assert run_alone(f"{BLOCK}\n{code}") == "(1, 16, 16, 1) uint8\n"


@pytest.mark.nightly
def test_labels_choose_the_class(class_bundle: Path, tmp_path: Path) -> None:
    unetc.export_triton(class_bundle, tmp_path / "r", unetc.ExportOptions(name="classes"))
    server, session = Server(tmp_path / "r"), unetc.load(class_bundle)
    got = server.infer(seed=1, count=2, label=7)["samples"]
    np.testing.assert_allclose(got, session.sample(2, seed=1, conditions=session.encode_labels([7, 7])), **CLOSE)
    with pytest.raises(Refused, match="label 70 is not one of"):
        server.infer(label=70)


@pytest.mark.nightly
def test_any_prompt_is_encoded_by_models_of_the_server(free_bundle: Path, tmp_path: Path) -> None:
    unetc.export_triton(free_bundle, tmp_path / "r", unetc.ExportOptions(name="free"))
    server, session = Server(tmp_path / "r"), unetc.load(free_bundle)
    assert session.text is not None
    got = server.infer(seed=1, prompt="a new prompt", negative_prompt="nothing")["samples"]
    expected = session.sample(1, seed=1, conditions=session.text.encode(["a new prompt"], negative=["nothing"]))
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert server.models["free-text-encoder-0"].calls == [1, 1]
