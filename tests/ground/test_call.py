"""One place knows what a call of a denoiser may be: it agrees with diffusers, and refuses the rest by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch

from unetc.artifacts.classes import Classes
from unetc.call import CallSignature
from unetc.errors import ModelError, SessionError, ShapeMismatch

diffusers: Any = untyped_diffusers

SMALL: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
CONDITIONAL: Mapping[str, Any] = {**SMALL, "cross_attention_dim": 8}
SIZES = {"height": 8, "width": 6, "tokens": 3}

DENOISERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "plain": ("UNet2DModel", SMALL),
    "classes": ("UNet2DModel", {**SMALL, "num_class_embeds": 5}),
    "timestep labels": ("UNet2DModel", {**SMALL, "class_embed_type": "timestep"}),
    "identity labels": ("UNet2DModel", {**SMALL, "class_embed_type": "identity"}),
    "text": ("UNet2DConditionModel", CONDITIONAL),
    "projected text": ("UNet2DConditionModel", {**CONDITIONAL, "encoder_hid_dim": 5}),
    "classes and text": ("UNet2DConditionModel", {**CONDITIONAL, "num_class_embeds": 5}),
    "projected labels": (
        "UNet2DConditionModel",
        {**CONDITIONAL, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
    ),
    "simply projected labels": (
        "UNet2DConditionModel",
        {**CONDITIONAL, "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 7},
    ),
    "vector labels": ("UNet2DConditionModel", {**CONDITIONAL, "class_embed_type": "identity"}),
    "numbers as labels": ("UNet2DConditionModel", {**CONDITIONAL, "class_embed_type": "timestep"}),
    "guidance": ("UNet2DConditionModel", {**CONDITIONAL, "time_cond_proj_dim": 10}),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **CONDITIONAL,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 4 * 6 + 9,
        },
    ),
    "inpainting": ("UNet2DConditionModel", {**CONDITIONAL, "in_channels": 9}),
}


def denoiser_of(name: str) -> tuple[Any, CallSignature]:
    kind, config = DENOISERS[name]
    unet = getattr(diffusers, kind)(**config).eval()
    return unet, CallSignature.of(kind, unet.config, channels=4 if name == "inpainting" else None)


def values_of(calls: CallSignature) -> dict[str, Any]:
    """Make values that fit, as tensors."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], classes: Classes | None) -> Any:
        return torch.from_numpy(
            rng.standard_normal(shape, dtype=np.float32) if classes is None else rng.integers(0, classes.count, shape)
        )

    return {
        item.name: draw((2, *(SIZES.get(str(axis), axis) for axis in item.axes)), item.classes)  # type: ignore[arg-type]
        for item in calls.inputs
    }


def call_unet(unet: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn values into the call that a pipeline makes."""
    rest = dict(values)
    sample = rest.pop("sample")
    if "extra_channels" in rest:
        sample = torch.cat([sample, rest.pop("extra_channels")], dim=1)
    if added := {name: rest.pop(name) for name in ("text_embeds", "time_ids") if name in rest}:
        rest["added_cond_kwargs"] = added
    return sample, rest


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_what_is_allowed_is_what_diffusers_takes(name: str) -> None:
    unet, calls = denoiser_of(name)
    values = values_of(calls)
    sample, arguments = call_unet(unet, values)
    unet(sample, 5.0, **arguments)  # diffusers takes it
    own, conditions = calls.of_unet_call(sample, {**arguments, "cross_attention_kwargs": None})
    assert conditions.keys() == calls.names
    torch.testing.assert_close({"sample": own, **conditions}, values)
    calls.check(own, conditions)


@pytest.mark.parametrize("name", DENOISERS)
def test_every_other_shape_is_refused_with_the_name_of_the_input(name: str) -> None:  # D5
    _, calls = denoiser_of(name)
    values = {key: value.numpy() for key, value in values_of(calls).items()}
    sample = values.pop("sample")
    calls.check(sample, values)
    for item in calls.conditions:
        shape = values[item.name].shape
        for axis in range(len(shape)):
            if axis and item.axes[axis - 1] == "tokens":
                continue
            wrong = np.resize(values[item.name], [size + (i == axis) for i, size in enumerate(shape)])
            with pytest.raises(ShapeMismatch, match=rf"^{item.name} has shape .*; expected \["):
                calls.check(sample, {**values, item.name: wrong})
        with pytest.raises(ShapeMismatch, match=f"needs {item.name} "):
            calls.check(sample, {key: value for key, value in values.items() if key != item.name})
    with pytest.raises(ShapeMismatch, match="no input style; it takes"):
        calls.check(sample, {**values, "style": np.zeros((2, 1), np.float32)})
    for wrong in (sample[0], sample[:, :2], sample[:0]):
        with pytest.raises(ShapeMismatch, match=r"sample has shape .*; expected \[batch, "):
            calls.check(wrong, values)


def test_a_missing_guidance_embedding_is_zero_as_in_diffusers() -> None:
    unet, calls = denoiser_of("guidance")
    values = values_of(calls)
    zero = torch.zeros_like(values.pop("timestep_cond"))
    sample, arguments = call_unet(unet, values)
    with torch.no_grad():
        expected, actual = unet(sample, 5.0, **arguments), unet(sample, 5.0, **arguments, timestep_cond=zero)
    torch.testing.assert_close(actual.sample, expected.sample)
    _, conditions = calls.of_unet_call(sample, arguments)
    np.testing.assert_array_equal(calls.fill(conditions, 2)["timestep_cond"], zero.numpy())


@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel"])
def test_every_argument_of_a_unet_is_used_or_refused_by_name(kind: str) -> None:
    name = {"UNet2DModel": "classes", "UNet2DConditionModel": "text"}[kind]
    unet, calls = denoiser_of(name)
    sample, arguments = call_unet(unet, values_of(calls))
    others = set(inspect.signature(unet.forward).parameters) - {"sample", "timestep", "return_dict", *arguments}
    for other in others:
        named = "(down_block_additional_residuals|mid_block_additional_residual)" if "residual" in other else other
        with pytest.raises(SessionError, match=f"cannot take {named if 'intra' not in other else other}"):
            calls.of_unet_call(sample, {**arguments, other: {"image_embeds": 1} if "cond_kwargs" in other else (1,)})
        calls.of_unet_call(sample, {**arguments, other: None})


def test_residuals_of_a_controlnet_get_the_names_of_the_graph() -> None:
    unet, plain = denoiser_of("text")
    calls = CallSignature.of("UNet2DConditionModel", unet.config, controlnet=True)
    sample, arguments = call_unet(unet, values_of(calls))
    values = [np.zeros(one.shape(2, 8, 6), np.float32) for one in calls.controlnet]
    residuals = {"down_block_additional_residuals": values[:-1], "mid_block_additional_residual": values[-1]}
    _, conditions = calls.of_unet_call(sample, {**arguments, **residuals})
    calls.check(sample, conditions)
    assert conditions["input_control_middle"] is values[-1]
    pooled = [value[:, :, :1, :1] + 1 for value in values]  # as with global_pool_conditions
    for kind in (np.asarray, torch.from_numpy):
        middle = kind(pooled[-1])
        given = {"down_block_additional_residuals": [kind(one) for one in pooled[:-1]]}
        _, spread = calls.of_unet_call(sample, {**arguments, **given, "mid_block_additional_residual": middle})
        calls.check(sample, spread)
        for one, value in zip(calls.controlnet, values, strict=True):
            np.testing.assert_array_equal(spread[one.name], value + 1)
    with pytest.raises(ShapeMismatch, match="input_control_01 has shape"):
        calls.check(sample, {**conditions, "input_control_01": values[0][:, :1]})
    with pytest.raises(SessionError, match="got 1 and 1"):
        calls.of_unet_call(sample, {**arguments, **residuals, "down_block_additional_residuals": values[:1]})
    for kind in (3, values[0], torch.from_numpy(values[0]), dict(enumerate(values))):
        with pytest.raises(SessionError, match=f"residuals is of class {type(kind).__name__}. Expected a sequence"):
            calls.of_unet_call(sample, {**arguments, **residuals, "down_block_additional_residuals": kind})
    with pytest.raises(SessionError, match="--controlnet"):
        plain.of_unet_call(sample, {**arguments, **residuals})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, "image_proj conditions"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"class_embed_type": "other"}, "class_embed_type 'other'"),
        ({"in_channels": 2}, "2 input channels cannot denoise samples of 4"),
    ],
)
def test_inputs_that_are_not_supported_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        CallSignature.of("UNet2DConditionModel", {**CONDITIONAL, **config}, channels=4)


def test_values_get_the_types_that_graphs_read() -> None:
    _, calls = denoiser_of("classes and text")
    read = calls.read({"class_labels": [1, 2], "encoder_hidden_states": np.zeros((2, 3, 8))})
    assert (read["class_labels"].dtype, read["encoder_hidden_states"].dtype) == (np.int64, np.float32)
    with pytest.raises(ShapeMismatch, match="Expected numbers"):
        calls.read({"encoder_hidden_states": np.array(["a"])})
