"""Converted GLIDE checkpoints compute the same results as OpenAI's network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unetc
from tests.glide_twin import BASE, SHAPES, GlideTwin, small, tokens_of, twin
from tests.models import relative_error
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.artifacts import Assignment, Phase, Plan, Prediction
from unetc.artifacts.profile import STEP, ModelReference
from unetc.compiler.engines import compile_full
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.prepare import Prepared, prepare
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.errors import MissingDependency, ModelError
from unetc.models.find import ModelSource, find_model, usual_sampling
from unetc.models.glide import LOW_RES, VARIANTS, GlideModel, Variant, enlarge, find_glide, tokenize
from unetc.models.glide_checkpoint import convert
from unetc.models.glide_text import TextTransformer, text_transformer
from unetc.models.openai_checkpoint import read
from unetc.models.openai_unet import load_unet
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise, step_noise
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

pytestmark = pytest.mark.nightly

TOLERANCE = 3e-5
"""Relative error. Both sides compute in float32, with the same kernels except for attention; measured: 8e-6."""

SAMPLE_TOLERANCE = 5e-3
"""Error of samples in -1 to 1: the first step divides the rounding error by a small signal; measured: 1e-3."""


@dataclass(frozen=True, kw_only=True)
class Twins:
    """OpenAI's network, and the UNet that unetc makes from its checkpoint."""

    original: GlideTwin
    unet: nn.Module
    text: nn.Module
    variant: Variant


@pytest.fixture(scope="module", params=SHAPES)
def twins(request: pytest.FixtureRequest) -> Twins:
    original, variant = twin(request.param), small(request.param)
    checkpoint = convert(original.state_dict(), variant.unet)
    return Twins(
        original=original,
        unet=load_unet(variant.denoiser, variant.unet, checkpoint.unet),
        text=text_transformer(checkpoint.text, variant.text_heads),
        variant=variant,
    )


def texts(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(BASE.tokens)[None] < torch.tensor([[2], [BASE.tokens], [0]])[:rows]
    return torch.randint(BASE.vocabulary, (rows, BASE.tokens), generator=generator), mask


def call(unet: nn.Module, x: Tensor, timesteps: Tensor, states: Tensor, summary: Tensor) -> Tensor:
    prediction: Tensor = unet(x, timesteps, encoder_hidden_states=states, class_labels=summary).sample
    return prediction


@torch.no_grad()
def test_a_converted_checkpoint_is_the_network(twins: Twins) -> None:
    x = torch.randn(3, twins.variant.unet["in_channels"], 16, 24, generator=torch.Generator().manual_seed(2))
    timesteps, text = torch.tensor([0.0, 500.0, 999.0]), texts(3)
    expected_states, expected_summary = twins.original.encode(*text)
    states, summary = twins.text(*text)
    expected = twins.original(x, timesteps, *text)
    actual = call(twins.unet, x, timesteps, states, summary)
    assert relative_error(states.numpy(), expected_states.permute(0, 2, 1).numpy()) < TOLERANCE
    assert relative_error(summary.numpy(), expected_summary.numpy()) < TOLERANCE
    assert relative_error(actual.numpy(), expected.numpy()) < TOLERANCE
    for other in (  # otherwise an error in an unused part would go unnoticed
        call(twins.unet, x, timesteps, states.flip(0), summary),
        call(twins.unet, x, timesteps, states, summary.flip(0)),
        call(twins.unet, x, timesteps.flip(0), states, summary),
    ):
        assert relative_error(other.numpy(), expected.numpy()) > 20 * TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_has_one_place(name: str) -> None:
    weights, config = twin(name).state_dict(), small(name).unet
    checkpoint = convert(weights, config)
    assert sum(value.numel() for part in (checkpoint.unet, checkpoint.text) for value in part.values()) == sum(
        value.numel() for value in weights.values()
    )
    with pytest.raises(ModelError, match=r"out\.3\.weight, which has no place"):
        convert({**weights, "out.3.weight": torch.zeros(1)}, config)
    for missing in ("middle_block.1.qkv.weight", "input_blocks.0.0.bias", "output_blocks.0.0.in_layers.2.weight"):
        with pytest.raises(ModelError, match=f"has no {missing}"):
            convert({key: value for key, value in weights.items() if key != missing}, config)


def test_a_weight_of_another_shape_is_refused() -> None:
    weights, variant = dict(twin("glide:base").state_dict()), small("glide:base")
    checkpoint = convert({**weights, "out.2.bias": torch.zeros(3)}, variant.unet)
    with pytest.raises(ModelError, match=r"conv_out\.bias"):
        load_unet(variant.denoiser, variant.unet, checkpoint.unet)
    checkpoint = convert({key: value for key, value in weights.items() if key != "final_ln.bias"}, variant.unet)
    with pytest.raises(ModelError, match=r"final_ln\.bias"):
        text_transformer(checkpoint.text, variant.text_heads)


def test_a_checkpoint_is_read_without_running_it(tmp_path: Path) -> None:
    weights = {"one": torch.ones(2)}
    torch.save(weights, tmp_path / "good.pt")
    assert torch.equal(read(tmp_path / "good.pt")["one"], weights["one"])

    class Harmful:
        def __reduce__(self) -> Any:
            return print, ("harm",)

    torch.save({"one": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=r"cannot read weights from .*bad.pt"):
        read(tmp_path / "bad.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="not a state dict"):
        read(tmp_path / "list.pt")


def test_a_checkpoint_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Pass it with --weights"):
        find_glide("glide:base", None)
    with pytest.raises(ModelError, match="No such file"):
        find_glide("glide:base", tmp_path / "base.pt")


def test_only_a_model_without_weights_is_given_some(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="digits includes its weights"):
        find_model(ModelSource("digits", weights=tmp_path / "base.pt"))
    torch.save({}, tmp_path / "base.pt")
    source = ModelSource("glide:base", weights=tmp_path / "base.pt")
    model = find_model(source)
    assert model.sample_shape == (3, 64, 64)
    assert model.load_decoder() is None
    with pytest.raises(ModelError, match=r"the checkpoint has no time_embed\.0\.weight"):
        model.load_denoiser()
    (tmp_path / "base.pt").write_bytes(b"other")
    assert find_model(source).reference.sha256 != model.reference.sha256


def test_glide_is_sampled_as_it_was_published() -> None:
    sampling = {name: usual_sampling(name) for name in (*VARIANTS, "digits")}
    assert [(own.scheduler, own.steps) for own in sampling.values()] == [("ddpm", 100), ("ddim", 27), ("ddim", 50)]


def test_the_published_networks_have_the_published_number_of_weights() -> None:
    counts = {"glide:base": 385_030_726, "glide:upsample": 398_361_286}
    for name, variant in VARIANTS.items():
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**variant.unet)
            text = TextTransformer(vocabulary=50257, tokens=128, width=512, layers=16, heads=8, projected=768)
        assert sum(weight.numel() for model in (unet, text) for weight in model.parameters()) == counts[name]


def test_an_upsampler_needs_an_image_per_prompt(tmp_path: Path) -> None:
    variant = small("glide:upsample")
    torch.save(twin("glide:upsample").state_dict(), tmp_path / "weights.pt")
    reference = ModelReference(name="glide:upsample", sha256="0" * 64, pipeline="GLIDE", denoiser=variant.denoiser)
    model = GlideModel(reference=reference, variant=variant, weights=tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="Save samples of glide:base there"):
        model.encode(["a", "b"], 1.0)
    np.save(tmp_path / LOW_RES, np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(ModelError, match="Expected \\[2 or more, 3, height, width\\]"):
        model.encode(["a", "b"], 1.0)
    for values, message in (
        (np.full((2, 3, 4, 4), 200, np.uint8), "has values of type uint8"),
        (np.full((2, 3, 4, 4), 200.0), "has values from 200 to 200"),
        (np.full((2, 3, 4, 4), np.nan), "has values from nan to nan"),
        (np.zeros((2, 3, 0, 4)), "has shape"),
    ):
        np.save(tmp_path / LOW_RES, values)
        with pytest.raises(ModelError, match=message):
            model.encode(["a", "b"], 1.0)
    with (tmp_path / LOW_RES).open("wb") as file:
        np.savez(file, np.zeros((2, 3, 4, 4)))
    with pytest.raises(ModelError, match="holds several arrays"):
        model.encode(["a", "b"], 1.0)


def test_prompts_need_the_tokenizer_of_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "glide_text2im", None)
    with pytest.raises(MissingDependency, match="pip install git"):
        tokenize(["a hedgehog"], 128)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A small variant, from its checkpoint to its gated graph, with three encoded prompts."""

    original: GlideTwin
    prepared: Prepared
    conditions: Conditions

    @property
    def variant(self) -> Variant:
        """Settings of the variant."""
        model = self.prepared.model
        assert isinstance(model, GlideModel)
        return model.variant


PROMPTS = ("a hedgehog", "a red cube on a blue one", "a")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("glide:base", marks=pytest.mark.architecture("GLIDE, base")),
        pytest.param("glide:upsample", marks=pytest.mark.architecture("GLIDE, upsampler")),
    ],
)
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    folder, name = tmp_path_factory.mktemp("glide"), request.param
    original, variant = twin(name), small(name)
    torch.save(original.state_dict(), folder / "weights.pt")
    rng = np.random.default_rng(0)
    np.save(folder / LOW_RES, rng.uniform(-1, 1, (len(PROMPTS), 3, 4, 4)).astype(np.float32))
    reference = ModelReference(name=name, sha256="0" * 63 + str(len(name) % 10), pipeline="GLIDE", denoiser="UNet")
    model = GlideModel(reference=reference, variant=variant, weights=folder / "weights.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unetc.models.glide.tokenize", tokens_of)
        patch.setattr("unetc.models.glide.cut_prompts", lambda texts, length: ())
        conditions = model.encode(PROMPTS, variant.guidance_scale)
    return Captured(original=original, prepared=prepare(model, folder / "cache"), conditions=conditions)


def test_components_match_the_network(captured: Captured) -> None:
    shape = SHAPES[captured.prepared.model.reference.name]
    levels, blocks = len(shape.multipliers), shape.blocks
    residuals = levels * (2 * blocks + 1) + 2 * (levels - 1) + 2
    attentions = sum(shape.attending) * (2 * blocks + 1) + 1
    skips = levels * (blocks + 1)
    kinds = [component.kind for component in captured.prepared.gated.components]
    assert kinds.count("residual") == residuals + attentions
    assert kinds.count("skip") == skips
    assert kinds.count("level") == levels
    assert kinds.count("step") == 1


@pytest.mark.shows("capture", "export", "law")
def test_an_engine_is_the_gated_graph_at_its_gates(captured: Captured) -> None:
    gated, backend = captured.prepared.gated, open_backend("onnxruntime:cpu", threads=1)
    rng = np.random.default_rng(5)
    names = [component.name for component in gated.components if component.name != STEP]
    treatments = {
        name: Treatment.DROP if rng.random() < 0.5 else Treatment.MEAN for name in names if rng.random() < 0.3
    }
    assert treatments
    means = 0.5 * rng.standard_normal(gated.channels, dtype=np.float32)
    sample = rng.standard_normal((3, 3, 16, 16), dtype=np.float32)
    denoiser = GatedDenoiser(gated, backend, captured.conditions)
    expected = denoiser.predict(sample, 300.0, gates=denoiser.gates(treatments, 3), means=means)
    program = backend.open_weights(gated.weights.read_bytes()).load(specialise(gated, treatments, means))
    inputs = captured.conditions.widen(sample, 300.0)
    prediction = np.empty((len(inputs["sample"]), 6, 16, 16), dtype=np.float32)
    program(inputs, prediction)
    assert relative_error(captured.conditions.guide(prediction, 3), expected) < 1e-4
    full = denoiser.predict(sample, 300.0, gates=denoiser.gates({}, 3), means=means)
    assert relative_error(expected, full) > 0.01


@pytest.mark.shows("sample")
def test_a_session_samples_like_the_network(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original network with manual guidance and the diffusers scheduler, on unetc's noise."""
    steps, seed, rows = 4, 3, range(len(PROMPTS))
    variant, gated = captured.variant, captured.prepared.gated
    config = captured.prepared.model.scheduler_config
    program = (
        open_backend("onnxruntime:cpu", threads=1).open_weights(gated.weights.read_bytes()).load(compile_full(gated))
    )
    plan = Plan(
        unetc=unetc.__version__,
        model=captured.prepared.model.reference,
        profile_sha256="0" * 64,
        budget=0.0,
        max_engines=1,
        engines=(Assignment(treatments={}),),
        phases=(Phase(low=-30.0, high=30.0, cycle=(0,)),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )
    session = Session(
        plan=plan,
        full=program,
        programs=[program],
        scheduler=extract_all(make_scheduler(variant.scheduler, config), variant.scheduler, [steps]),
        sample_shape=(3, 16, 16),
        steps=steps,
        predicted_channels=gated.predicted_channels,
        conditions=captured.conditions,
    )
    source = iter([step_noise(seed, rows, step, (3, 16, 16)) for step in range(steps)])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.from_numpy(next(source))
    )
    scheduler: Any = make_scheduler(variant.scheduler, config)
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(initial_noise(seed, rows, (3, 16, 16)))
    for timestep in scheduler.timesteps:
        prediction = predict_by_hand(captured, sample, float(timestep))
        output = prediction if variant.scheduler == "ddpm" else prediction[:, :3]
        sample = scheduler.step(output, timestep, sample).prev_sample
    assert np.abs(session.sample(3, seed=seed) - sample.numpy()).max() < SAMPLE_TOLERANCE
    others = captured.conditions.take([1, 2, 0])
    assert np.abs(session.sample(3, seed=seed, conditions=others) - sample.numpy()).max() > 4 * SAMPLE_TOLERANCE


@torch.no_grad()
def predict_by_hand(captured: Captured, sample: Tensor, timestep: float) -> Tensor:
    """Call the network with and without the prompts; guide the noise, but not the variance."""
    rows = len(PROMPTS)
    if captured.variant.unet["in_channels"] == 6:
        low_res = enlarge(np.load(captured.prepared.model.weights.with_name(LOW_RES)), 16)  # type: ignore[attr-defined]
        sample = torch.cat([sample, torch.from_numpy(low_res)], dim=1)
    own = captured.original(sample, torch.full((rows,), timestep), *tokens_of(PROMPTS, BASE.tokens))
    scale = captured.variant.guidance_scale
    if scale == 1:
        return own
    empty = captured.original(sample, torch.full((rows,), timestep), *tokens_of([""] * rows, BASE.tokens))
    return torch.cat([(empty + scale * (own - empty))[:, :3], own[:, 3:]], dim=1)
