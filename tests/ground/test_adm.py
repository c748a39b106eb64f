"""Converted checkpoints of guided-diffusion and its relatives agree with their networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.adm_twin import AdmTwin, Form, adm_twin
from tests.models import relative_error
from unetc.compiler.engines import compile_full
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.make import scheduler_for
from unetc.errors import ModelError
from unetc.models.adm import AdmOptions, find_adm
from unetc.models.adm_checkpoint import read_network
from unetc.models.find import ModelSource, find_model, usual_sampling
from unetc.runtime.backends.registry import open_backend

TOLERANCE = 1e-9
"""Relative error in float64, where only the embedding of the time is float32. Seen: 7e-13."""
SCALED = 1e-3
"""Relative error where both sides round timesteps differently, in float32. Seen: 4e-4."""

GUIDED = Form(head_channels=16, out_channels=6, multipliers=(1, 2, 2), attending=(False, True, True), blocks=2)
FORMS: Mapping[str, tuple[Form, str]] = {
    "guided": (GUIDED, "num_head_channels=16"),
    "guided, by part": (replace(GUIDED, by_part=True), "num_head_channels=16,use_new_attention_order=true"),
    "guided, classes": (replace(GUIDED, classes=7), "num_head_channels=16"),
    "improved": (Form(heads=4, scale_shift=False, residual_resampling=False), "num_heads=4,noise_schedule=cosine"),
    "improved, scale and shift": (Form(heads=2, residual_resampling=False, blocks=2), "num_heads=2"),
    "one head": (Form(heads=1, in_channels=1, out_channels=1), "num_heads=1"),
    "four thousand steps": (
        Form(heads=4, residual_resampling=False),
        "num_heads=4,diffusion_steps=4000,rescale_timesteps=true",
    ),
    "consistency": (
        Form(head_channels=32, by_part=True, square_projections=True, classes=5),
        "num_head_channels=32,use_new_attention_order=true,process=edm",
    ),
}
"""Forms of networks, and the options that the weights do not say."""


def name_of(options: str) -> str:
    return f"adm:image_size=16,{options}"


def saved(form: Form, folder: Path) -> tuple[AdmTwin, Path]:
    twin, path = adm_twin(form), folder / "model.pt"
    torch.save(twin.state_dict(), path)
    return twin, path


def labels_of(form: Form) -> Tensor | None:
    return None if form.classes is None else torch.tensor([0, form.classes - 1, 2])


@torch.no_grad()
@pytest.mark.parametrize("case", FORMS)
def test_a_converted_checkpoint_is_the_network(case: str, tmp_path: Path) -> None:
    form, options = FORMS[case]
    twin, path = saved(form, tmp_path)
    model = find_adm(name_of(options), path)
    unet, twin = model.load_denoiser().double(), twin.double()
    x = torch.randn(3, form.in_channels, 16, 24, generator=torch.Generator().manual_seed(2)).double()
    steps, scale = torch.tensor([0.25, 500.0, 999.0]), model.options.time_scale
    expected, labels = twin(x, steps, labels_of(form)), labels_of(form)

    def error(times: Tensor, classes: Tensor | None) -> float:
        given = {} if classes is None else {"class_labels": classes}
        return relative_error(unet(x, times / scale, **given).sample.numpy(), expected.numpy())

    assert error(steps, labels) < (TOLERANCE if scale == 1 else SCALED)
    assert error(steps.flip(0), labels) > 20 * SCALED  # otherwise an error in an unused part would go unnoticed
    if labels is not None:
        assert error(steps, labels.flip(0)) > 20 * SCALED


@pytest.mark.parametrize("case", FORMS)
def test_the_form_is_read_off_the_weights(case: str) -> None:
    form, _ = FORMS[case]
    network = read_network(adm_twin(form).state_dict())
    assert network.widths == tuple(form.channels * factor for factor in form.multipliers)
    assert (network.attends, network.blocks, network.classes) == (form.attending, form.blocks, form.classes)
    assert (network.scale_shift, network.residual_resampling) == (form.scale_shift, form.residual_resampling)
    assert (network.in_channels, network.out_channels) == (form.in_channels, form.out_channels)


@torch.no_grad()
@pytest.mark.parametrize("case", ["guided", "improved"])
@pytest.mark.parametrize("wrong", ["num_head_channels=8", "num_head_channels=16,use_new_attention_order=true"])
def test_heads_and_their_order_matter(case: str, wrong: str, tmp_path: Path) -> None:
    """They cannot be read off the weights, so a wrong option gives another network."""
    form, _ = FORMS[case]
    twin, path = saved(form, tmp_path)
    x, steps = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([20.0, 700.0])
    actual = find_adm(name_of(wrong), path).load_denoiser()(x, steps).sample
    assert relative_error(actual.numpy(), twin(x, steps).numpy()) > 1e-3


@pytest.mark.nightly
@pytest.mark.parametrize("case", ["guided, classes", "improved"])
def test_engines_compute_what_the_network_computes(case: str, tmp_path: Path) -> None:
    form, options = FORMS[case]
    twin, path = saved(form, tmp_path)
    model = find_model(ModelSource(name_of(options), weights=path))
    prepared = prepare(model, tmp_path / "cache")
    x, steps = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 20.0, 700.0])
    labels = labels_of(form)
    with torch.no_grad():
        expected = twin(x, steps, labels).numpy()
    weights = prepared.gated.weights.read_bytes()
    program = open_backend("onnxruntime:cpu", threads=1).open_weights(weights).load(compile_full(prepared.gated))
    inputs: dict[str, Any] = {"sample": x.numpy(), "timestep": steps.numpy()}
    inputs |= {} if labels is None else {"class_labels": labels.numpy()}
    output = np.full(expected.shape, np.nan, np.float32)
    program(inputs, output)
    assert relative_error(output, expected) < SCALED


def test_classes_are_conditions(tmp_path: Path) -> None:
    _, path = saved(replace(GUIDED, classes=7), tmp_path)
    model = find_adm(name_of("num_head_channels=16"), path)
    assert sorted(model.prompts()) == list("0123456")
    (values,) = model.encode(["3", "6"], 1.0).own.values()
    assert values.tolist() == [3, 6]
    with pytest.raises(ModelError, match="labels of its 7 classes, got '7'"):
        model.encode(["7"], 1.0)


def test_prompts_without_classes_are_refused(tmp_path: Path) -> None:
    _, path = saved(GUIDED, tmp_path)
    model = find_adm(name_of("num_head_channels=16"), path)
    assert model.prompts() == ()
    with pytest.raises(ModelError, match="takes no prompts"):
        model.encode(["a cat"], 1.0)


@pytest.mark.parametrize(
    ("options", "scheduler", "expected"),
    [
        ("num_heads=4", "ddpm", {"beta_schedule": "linear", "variance_type": "fixed_large", "beta_end": 0.02}),
        ("num_heads=4,noise_schedule=cosine", "ddim", {"beta_schedule": "squaredcos_cap_v2"}),
        ("num_heads=4,diffusion_steps=4000", "ddpm", {"num_train_timesteps": 4000, "beta_end": 0.005}),
        ("num_heads=4,predict_xstart=true", "ddim", {"prediction_type": "sample"}),
        ("num_heads=4,process=edm,use_new_attention_order=false", "edm-euler", {"sigma_max": 80.0, "sigma_data": 0.5}),
    ],
)
def test_flags_describe_the_process(options: str, scheduler: str, expected: dict[str, object], tmp_path: Path) -> None:
    _, path = saved(Form(heads=4), tmp_path)
    model = find_adm(name_of(options), path)
    config: Any = scheduler_for(scheduler, model).config
    assert {key: config[key] for key in expected} == pytest.approx(expected)


def test_a_learned_variance_is_seen_in_the_weights(tmp_path: Path) -> None:
    _, path = saved(GUIDED, tmp_path)
    config = find_adm(name_of("num_head_channels=16"), path).scheduler_config
    assert config["variance_type"] == "learned_range"


def test_an_edm_network_is_sampled_with_its_scheduler_unless_told_otherwise() -> None:
    edm = "num_heads=4,process=edm,use_new_attention_order=false"
    assert usual_sampling(name_of(edm)).scheduler == "edm-euler"
    assert usual_sampling(name_of("num_heads=4")).scheduler == "ddim"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adm:", "has no image_size"),
        ("adm:num_heads=4", "has no image_size"),
        ("adm:image_size=64", "either num_heads or num_head_channels"),
        ("adm:image_size=64,num_heads=4,num_head_channels=64", "either num_heads or num_head_channels"),
        ("adm:image_size=64,num_heads=four", "Expected `int"),
        ("adm:image_size=64,num_heads=0", "num_heads is 0. Expected a whole number above 0"),
        ("adm:image_size=64,heads=4", "'heads=4' is no option"),
        (
            "adm:image_size=64,image_size=64,num_heads=4",
            "Expected each of these at most once",
        ),
        ("adm:64,num_heads=4", "'64' is no option"),
        ("adm:image_size=64,num_heads=4,class_cond=true", "class_cond is read off the weights"),
        ("adm:image_size=64,num_heads=4,noise_schedule=square", "'square'"),
        ("adm:image_size=64,num_heads=4,process=edm", "needs use_new_attention_order"),
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        AdmOptions.parse(name)


def changed(form: Form, **weights: Tensor | None) -> dict[str, Tensor]:
    """Replace weights of a twin, or leave them out; "/" stands for a dot."""
    own = dict(adm_twin(form).state_dict())
    for name, value in weights.items():
        own.pop(name.replace("/", "."), None)
        if value is not None:
            own[name.replace("/", ".")] = value
    return own


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "has no time_embed.0.weight"),
        (changed(GUIDED, **{"out/2/weight": None}), "has no out.2.weight"),
        (changed(GUIDED, **{"middle_block/1/proj_out/bias": None}), "has no middle_block.1.proj_out.bias"),
        (changed(GUIDED, **{"encoder_kv/weight": torch.zeros(3)}), "has encoder_kv.weight, which has no place"),
        (changed(replace(GUIDED, out_channels=4)), "takes 3 channels and predicts 4"),
        (changed(replace(GUIDED, in_channels=6, out_channels=3)), "takes 6 channels and predicts 3"),
        (changed(GUIDED, **{"time_embed/0/weight": torch.zeros(128, 64)}), "embeds the time in 64"),
        (changed(Form(heads=4, multipliers=(1,), attending=(True,))), "Expected a UNet of two levels or more"),
    ],
)
def test_another_checkpoint_is_refused_by_name(weights: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=re.escape(message)):
        find_adm(name_of("num_head_channels=16"), tmp_path / "model.pt")


def test_a_weight_of_another_shape_is_refused_when_the_network_is_loaded(tmp_path: Path) -> None:
    torch.save(changed(GUIDED, **{"out/2/bias": torch.zeros(3)}), tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"conv_out\.bias"):
        find_adm(name_of("num_head_channels=16"), tmp_path / "model.pt").load_denoiser()


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    _, path = saved(GUIDED, tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot read weights from"):
        find_adm(name_of("num_head_channels=16"), path)


def test_other_mistakes_are_refused_by_name(tmp_path: Path) -> None:
    _, path = saved(GUIDED, tmp_path)
    with pytest.raises(ModelError, match="Pass it with --weights"):
        find_model(name_of("num_head_channels=16"))
    with pytest.raises(ModelError, match=r"cannot read .*missing\.pt"):
        find_adm(name_of("num_head_channels=16"), tmp_path / "missing.pt")
    with pytest.raises(ModelError, match="64 channels cannot have heads of 24"):
        find_adm(name_of("num_head_channels=24"), path)
    with pytest.raises(ModelError, match="3 levels takes multiples of 4 pixels"):
        find_adm("adm:image_size=18,num_head_channels=16", path)
    with pytest.raises(ModelError, match="takes no ControlNet"):
        find_model(ModelSource(name_of("num_head_channels=16"), weights=path, controlnet=True))
