"""LoRAs are fused into the UNet and the text encoders; other files and LoRAs of other models are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.loras import RANK, load_unfused, save_as_kohya, save_lora
from tests.models import relative_error
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.gate import gate_values
from unetc.errors import MissingDependency, ModelError
from unetc.models.find import ModelSource, find_model
from unetc.models.lora import Lora
from unetc.models.text import encode_prompts, load_text_encoders

TOLERANCE = 1e-5
"""Error relative to the largest element, in float32: (W + BA) x and W x + B (A x) add up in different orders."""

CONTEXT = "encoder_hidden_states"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
"""A layer of the tiny UNet, [8, 8]."""
PROMPTS = ["a red square", "a blue circle"]


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
    expected = encode_prompts(unfused, PROMPTS, guidance_scale=3.0, size=(32, 32))
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
    encoded = encode_prompts(unfused, PROMPTS, guidance_scale=1.0, size=(32, 32)).own
    own, plain = (one.encode(PROMPTS, 1.0).own for one in (model, find_model(str(folder))))
    one, other = np.split(plain[CONTEXT] - encoded[CONTEXT], 2, axis=-1)  # each encoder makes one half of the channels
    assert all(np.abs(difference).max() > 100 * TOLERANCE for difference in (one, other))
    assert encoded.keys() == own.keys() == {CONTEXT, "text_embeds", "time_ids"}
    for name, value in encoded.items():
        assert relative_error(own[name], value) < TOLERANCE


def test_files_of_kohya_are_read_with_an_alpha_for_every_layer(folder: Path, path: Path) -> None:
    """The expected weight is the definition, W + scale · alpha / rank · B A."""
    kohya = folder.parent / "kohya.safetensors"
    added = save_as_kohya(path, kohya, {".to_q": 4.0, ".conv1": 1.0, ".fc1": 0.5})
    fused = changes(folder, lora := Lora(path=kohya, scale=0.5))
    assert {f"unet.{name}" for name in fused} == {name for name in added if name.startswith("unet.")}
    for name, value in fused.items():
        torch.testing.assert_close(value, 0.5 * added[f"unet.{name}"], rtol=0, atol=TOLERANCE)
    pipeline = load_text_encoders(folder, "StableDiffusionPipeline")
    for name, value in pipeline.text_encoder.named_parameters():
        value.data += 0.5 * added.get(f"text_encoder.{name}", 0)
    expected = encode_prompts(pipeline, PROMPTS, guidance_scale=1.0, size=(32, 32)).own[CONTEXT]
    assert (
        relative_error(find_model(ModelSource(str(folder), loras=(lora,))).encode(PROMPTS, 1.0).own[CONTEXT], expected)
        < TOLERANCE
    )


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


def test_factors_without_alpha_are_multiplied_unchanged(folder: Path, tmp_path: Path) -> None:
    down, up = torch.ones(3, 8), torch.arange(8.0)[:, None].repeat(1, 3)
    save_file({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, tmp_path / "bare.safetensors")
    (added,) = changes(folder, Lora(path=tmp_path / "bare.safetensors")).items()
    assert added[0] == f"{LAYER}.weight"
    torch.testing.assert_close(added[1], up @ down, rtol=0, atol=1e-5)


def test_the_numbers_of_sdxl_blocks_are_translated(tmp_path: Path) -> None:
    """Trainers of SDXL use Stability AI's block numbers: block 3 is the first one after the downsampler."""
    folder = save_stable_diffusion_xl(tmp_path / "pipeline")
    layer = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 16), f"{layer}.lora_up.weight": torch.ones(16, 1)}
    save_file(factors, tmp_path / "style.safetensors")
    (name,) = changes(folder, Lora(path=tmp_path / "style.safetensors"))
    assert name == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"


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


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "cannot read LoRA"),
        (lambda path: path.mkdir(), "cannot read LoRA"),
        (lambda path: path.write_bytes(b"PK" * 100), "Expected a .safetensors file"),
        (lambda path: save_file({}, path), "holds no tensors"),
        (lambda path: save_file({"unet.conv_in.weight": torch.ones(1)}, path), "holds 'unet.conv_in.weight'"),
        (
            lambda path: save_file(
                {f"lora_unet_x.{name}": torch.ones(1) for name in ("lora_down.weight", "dora_scale")}, path
            ),
            "is a DoRA",
        ),
    ],
    ids=["missing", "folder", "other format", "empty", "weights", "dora"],
)
def test_files_without_a_lora_are_refused_when_the_model_is_found(
    folder: Path, tmp_path: Path, write: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "style.safetensors"
    write(path)
    message = refusal(lambda: find_model(ModelSource(str(folder), loras=(Lora(path=path),))))
    assert reason in message
    assert str(path) in message


def factors(layer: str, *, inputs: int = 8, outputs: int = 8, value: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.weight": torch.full((2, inputs), value),
        f"{layer}.lora_B.weight": torch.full((outputs, 2), value),
    }


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (factors("unet.down_blocks.7.to_q"), "'down_blocks.7.to_q.lora_A.weight'"),
        (factors("unet.down_blocks.0"), "'down_blocks.0.lora_A.weight'"),
        (factors("transformer.blocks.0.to_q"), "'transformer.blocks.0.to_q.lora_A.weight'"),
        (factors("text_encoder_2.encoder.layers.0.mlp.fc1"), "'text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight'"),
        (dict(list(factors(f"unet.{LAYER}").items())[:1]), f"'{LAYER}.lora_A.weight'"),
        (factors(f"unet.{LAYER}") | {f"unet.{LAYER}.lora_B.bias": torch.ones(8)}, f"'{LAYER}.lora_B.bias'"),
        ({f"unet.{LAYER}.lokr_w1": torch.ones(2, 2)}, "is not a LoRA"),
        ({"lora_unet_mid_block_x.hada_w1_a": torch.ones(2, 2)}, "lora_unet_mid_block_x.hada_w1_a"),
        ({"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 2)}, "lora_unet_mid_block_x.lora_up.weight"),
        (factors(f"unet.{LAYER}", inputs=9), "[2, 9] and [8, 2], but the layer has [8, 8]"),
        (factors(f"unet.{LAYER}", outputs=9), "[2, 8] and [9, 2], but the layer has [8, 8]"),
        (factors(f"unet.{LAYER}", value=float("inf")), "holds NaN or infinity"),
    ],
)
def test_factors_without_a_place_are_named(
    folder: Path, tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    message = refusal(lambda: find_model(ModelSource(str(folder), loras=(Lora(path=path),))).load_denoiser())
    assert reason in message
    assert str(path) in message


def test_factors_without_a_place_in_a_text_encoder_are_named_when_prompts_are_encoded(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(factors("text_encoder.text_model.encoder.layers.5.self_attn.q_proj", inputs=16, outputs=16), path)
    model = find_model(ModelSource(str(folder), loras=(Lora(path=path),)))
    assert "'encoder.layers.5.self_attn.q_proj.lora_A.weight'" in refusal(lambda: model.encode(PROMPTS, 1.0))


@pytest.mark.parametrize("configuration", ["[1]", "{", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 1}}'])
def test_an_invalid_header_is_refused(folder: Path, tmp_path: Path, configuration: str) -> None:
    path = tmp_path / "style.safetensors"
    save_file(factors(f"unet.{LAYER}"), path, {"lora_adapter_metadata": configuration})
    message = refusal(lambda: find_model(ModelSource(str(folder), loras=(Lora(path=path),))).load_denoiser())
    assert f"cannot fuse LoRA {path}" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("digits", "digits is a DDPMPipeline; a LoRA is supported with Stable"),
        ("glide:base", "glide:base takes no LoRA"),
    ],
)
def test_models_without_loras_say_so(name: str, reason: str, path: Path) -> None:
    assert reason in refusal(lambda: find_model(ModelSource(name, loras=(Lora(path=path),))))


def test_without_peft_its_extra_is_named(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependency, match=r"pip install 'unetc\[lora\]'"):
        find_model(ModelSource(str(folder), loras=(Lora(path=path),)))


def test_a_lora_that_is_not_fused_is_not_captured(folder: Path, path: Path) -> None:
    with pytest.raises(ModelError, match=r"has an adapter \(LoRA\) on .*fuse and unload it"):
        capture(load_unfused(folder, (path, 1.0)).unet)
