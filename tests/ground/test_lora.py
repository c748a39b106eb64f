"""LoRAs are fused into the UNet and the text encoders by the definition of their strength; other files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import peft as untyped_peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.loras import (
    RANK,
    load_unfused,
    save_lora,
)
from tests.models import relative_error
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from unetc.call import CallSignature
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.gate import gate_values
from unetc.conditions import Conditions
from unetc.errors import ModelError
from unetc.models.find import ModelSource, find_model
from unetc.models.lora import Lora
from unetc.models.pipelines import PIPELINES
from unetc.models.text import encode_prompts

diffusers: Any = untyped_diffusers
peft: Any = untyped_peft

TOLERANCE = 1e-5
"""Error relative to the largest element, in float32: (W + BA) x and W x + B (A x) add up in different orders."""

CONTEXT = "encoder_hidden_states"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
"""A layer of the tiny UNet, [8, 8]."""
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
"""A 3x3 convolution of the tiny UNet, [8, 8, 3, 3]."""
TEXT_LAYER = "encoder.layers.0.self_attn.q_proj"
"""A layer of the tiny text encoder, [16, 16]."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
PROMPTS = ["a red square", "a blue circle"]


def encoded_by(pipeline: Any, calls: CallSignature, scale: float) -> Conditions:
    """Encode the prompts with the text encoders of a pipeline, for images of 32x32 pixels."""
    kind = PIPELINES[type(pipeline).__name__]
    return encode_prompts(pipeline, PROMPTS, guidance_scale=scale, size=(32, 32), kind=kind, calls=calls)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("lora") / "pipeline")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return save_lora(folder, folder.parent / "style.safetensors")


def predict(unet: Any) -> np.ndarray[Any, Any]:
    """Compute a prediction with a diffusers UNet."""
    with torch.no_grad():
        prediction: np.ndarray[Any, Any] = unet(*inputs(unet)).sample.numpy()
    return prediction


def inputs(unet: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 6, unet.config.cross_attention_dim, generator=generator)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([981.0, 21.0]), text


def modules(model: nn.Module) -> list[tuple[str, type, bool]]:
    return [(name, type(module), module.training) for name, module in model.named_modules()]


def changes(folder: Path, *loras: Lora) -> dict[str, Tensor]:
    """Compute the nonzero changes that LoRAs make to the weights of the UNet, by weight name."""
    plain = find_model(str(folder)).load_denoiser()
    fused = dict(find_model(ModelSource(str(folder), loras=tuple(loras))).load_denoiser().named_parameters())
    added = {name: fused[name] - value for name, value in plain.named_parameters()}
    return {name: value for name, value in added.items() if value.any()}


def refusal(action: Callable[[], object]) -> str:
    """Return the message of the ModelError that an action raises; check that it is one line of readable length."""
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert message.endswith(".")
    return message


@pytest.mark.nightly
def test_the_captured_graph_is_the_unet_with_an_unfused_lora(folder: Path, path: Path) -> None:
    denoiser = find_model(ModelSource(str(folder), loras=(Lora(path=path, scale=0.7),))).load_denoiser()
    captured = capture(denoiser)
    keep = torch.from_numpy(np.stack([gate_values(captured.components, {})] * 2))
    means = torch.zeros(sum(component.channels for component in captured.components))
    with torch.no_grad():
        actual = captured.reference()(*inputs(denoiser), keep, means).numpy()
    assert relative_error(actual, predict(load_unfused(folder, (path, 0.7)).unet)) < TOLERANCE


def test_the_unet_predicts_as_with_an_unfused_lora(folder: Path, path: Path) -> None:
    actual = predict(find_model(ModelSource(str(folder), loras=(Lora(path=path, scale=0.7),))).load_denoiser())
    expected = predict(load_unfused(folder, (path, 0.7)).unet)
    assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(predict(load_unfused(folder, (path, 0.8)).unet), expected) > 100 * TOLERANCE


def test_nothing_but_weights_is_changed(folder: Path, path: Path) -> None:
    """Components keep their names when a LoRA is fused."""
    plain, fused = (
        find_model(ModelSource(str(folder), loras=tuple(loras))).load_denoiser() for loras in ((), [Lora(path=path)])
    )
    assert modules(fused) == modules(plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    layers = {name.partition(".lora_")[0] for name in load_file(path) if name.startswith("unet.")}
    assert {f"unet.{name}" for name in changes(folder, Lora(path=path))} == {f"{layer}.weight" for layer in layers}


def test_several_loras_change_prompts_too(folder: Path, path: Path) -> None:
    second = save_lora(folder, folder.parent / "second.safetensors", seed=1, text=False)
    model = find_model(
        ModelSource(
            str(folder),
            loras=(
                Lora(path=path, scale=0.5),
                Lora(path=second, scale=-1.5),
            ),
        )
    )
    unfused = load_unfused(folder, (path, 0.5), (second, -1.5))
    plain_prediction = predict(find_model(str(folder)).load_denoiser())
    actual_prediction, expected_prediction = predict(model.load_denoiser()), predict(unfused.unet)
    # two LoRAs, one of them large and subtracted, leave more rounding error than one: 5e-5 measured
    assert relative_error(actual_prediction, expected_prediction) < 20 * TOLERANCE
    assert relative_error(plain_prediction, expected_prediction) > 1000 * TOLERANCE
    expected = encoded_by(unfused, model.calls, 3.0)
    actual, plain = model.encode(PROMPTS, 3.0), find_model(str(folder)).encode(PROMPTS, 3.0)
    assert expected.guided
    for kind in ("own", "negative"):
        own, encoded, other = (getattr(conditions, kind)[CONTEXT] for conditions in (actual, expected, plain))
        assert relative_error(own, encoded) < TOLERANCE, kind
        assert relative_error(other, encoded) > 100 * TOLERANCE, kind


def test_both_text_encoders_of_sdxl_are_changed(tmp_path: Path) -> None:
    folder = save_stable_diffusion_xl(tmp_path / "pipeline")
    path = save_lora(folder, tmp_path / "style.safetensors")
    model = find_model(ModelSource(str(folder), loras=(Lora(path=path, scale=0.7),)))
    unfused = load_unfused(folder, (path, 0.7))
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.full((2, 6), 32.0)}
    with torch.no_grad():
        prediction, expected = (
            unet(*inputs(unet), added_cond_kwargs=added).sample.numpy()
            for unet in (model.load_denoiser(), unfused.unet)
        )
    assert relative_error(prediction, expected) < TOLERANCE
    encoded = encoded_by(unfused, model.calls, 1.0).own
    own, plain = (one.encode(PROMPTS, 1.0).own for one in (model, find_model(str(folder))))
    one, other = np.split(plain[CONTEXT] - encoded[CONTEXT], 2, axis=-1)  # each encoder makes one half of the channels
    assert all(np.abs(difference).max() > 100 * TOLERANCE for difference in (one, other))
    assert encoded.keys() == own.keys() == {CONTEXT, "text_embeds", "time_ids"}
    for name, value in encoded.items():
        assert relative_error(own[name], value) < TOLERANCE


def test_a_root_stabilises_the_rank_if_the_file_says_so(folder: Path, path: Path, tmp_path: Path) -> None:
    """With `use_rslora` in peft's configuration, the factor is alpha / sqrt(rank) instead of alpha / rank."""
    with safe_open(path, framework="pt") as file:
        configuration = json.loads(file.metadata()["lora_adapter_metadata"])
    configuration["unet.use_rslora"] = True
    other = tmp_path / "stabilised.safetensors"
    save_file(load_file(path), other, {"lora_adapter_metadata": json.dumps(configuration)})
    usual, stabilised = (changes(folder, Lora(path=lora)) for lora in (path, other))
    assert usual.keys() == stabilised.keys()
    for name, value in usual.items():
        torch.testing.assert_close(stabilised[name], RANK**0.5 * value, rtol=0, atol=TOLERANCE)


def test_the_reference_tells_models_with_other_loras_apart(folder: Path, path: Path) -> None:
    second = save_lora(folder, folder.parent / "other.safetensors", seed=2)
    one, other = Lora(path=path), Lora(path=second, scale=0.5)
    sets = ((), (one,), (Lora(path=path, scale=0.5),), (other,), (one, other), (other, one), (one, one))
    references = [find_model(ModelSource(str(folder), loras=tuple(loras))).reference for loras in sets]
    assert len({reference.sha256 for reference in references}) == len(sets)
    assert references[4].loras == (f"{path}:1.0", f"{second}:0.5")
    assert references[4].title == f"{folder} + {path}:1.0 + {second}:0.5"
    moved = Path(shutil.copy(path, folder.parent / "moved.safetensors"))
    assert find_model(ModelSource(str(folder), loras=(Lora(path=moved),))).reference.sha256 == references[1].sha256


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a:b/c:1.safetensors", "a:b/c:1.safetensors", 1.0),
        ("a.safetensors:2/style.safetensors:-1e-1", "a.safetensors:2/style.safetensors", -0.1),
    ],
)
def test_a_scale_follows_the_path(text: str, path: str, scale: float) -> None:
    lora = Lora.parse(text)
    assert lora == Lora(path=Path(path), scale=scale)
    assert Lora.parse(str(lora)) == lora


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("style.bin", "Other formats can run code"),
        ("style.safetensors.pt", "Expected a .safetensors file"),
        ("style.safetensors:", "must be a finite number, got ''"),
        ("style.safetensors:strong", "must be a finite number, got 'strong'"),
        ("style.safetensors:nan", "got 'nan'"),
        ("style.safetensors:1:2", "got '1:2'"),
    ],
)
def test_text_other_than_path_and_scale_is_refused(text: str, reason: str) -> None:
    assert reason in refusal(lambda: Lora.parse(text))


def factors(layer: str, *, inputs: int = 8, outputs: int = 8, value: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.weight": torch.full((2, inputs), value),
        f"{layer}.lora_B.weight": torch.full((outputs, 2), value),
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("digits", "digits is a DDPMPipeline; a LoRA is supported with Stable"),
        ("glide:base", "glide:base takes no LoRA"),
    ],
)
def test_models_without_loras_say_so(name: str, reason: str, path: Path) -> None:
    assert reason in refusal(lambda: find_model(ModelSource(name, loras=(Lora(path=path),))))


def test_a_lora_that_is_not_fused_is_not_captured(folder: Path, path: Path) -> None:
    with pytest.raises(ModelError, match=r"has an adapter \(LoRA\) on .*fuse and unload it"):
        capture(load_unfused(folder, (path, 1.0)).unet)
