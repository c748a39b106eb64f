"""Files that are no LoRA, LoRAs of other models and other methods are refused when a model is opened."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.loras import Factors, save_as
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from unetc.errors import ModelError
from unetc.models.find import ModelSource, find_model
from unetc.models.lora import Lora

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
"""A layer of the tiny UNet, [8, 8]."""
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
CONVOLUTION = "lora_unet_down_blocks_0_downsamplers_0_conv"
"""A 3x3 convolution of the tiny UNet, [8, 8, 3, 3]."""
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
"""A layer of the tiny text encoder, [16, 16]."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("refusals") / "pipeline")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion_xl(tmp_path_factory.mktemp("refusals") / "pipeline")


def find(folder: Path, path: Path) -> Any:
    return find_model(ModelSource(str(folder), loras=(Lora(path=path),)))


def refusal(action: Callable[[], object], path: Path) -> str:
    """Return the message of the ModelError that an action raises; check that it names the file on one readable line."""
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 800
    assert message.endswith(".")
    assert str(path) in message
    return message


def pair(layer: str, down: tuple[int, ...] = (2, 8), up: tuple[int, ...] = (8, 2)) -> dict[str, Tensor]:
    ends = ("lora_down", "lora_up") if layer.startswith("lora_") else ("lora_A", "lora_B")
    return {f"{layer}.{end}.weight": torch.ones(shape) for end, shape in zip(ends, (down, up), strict=True)}


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "cannot read LoRA"),
        (lambda path: path.mkdir(), "cannot read LoRA"),
        (lambda path: path.write_bytes(b""), "Expected a complete .safetensors file"),
        (lambda path: path.write_bytes(b"PK" * 100), "Expected a complete .safetensors file"),
        (lambda path: save_file({}, path), "holds no tensors"),
        (lambda path: save_file({"unet.conv_in.weight": torch.ones(1)}, path), "holds 'unet.conv_in.weight'. Expected"),
        (
            lambda path: save_file(pair(KOHYA) | {f"{KOHYA}.scalar": torch.ones(1)}, path),
            f"also holds '{KOHYA}.scalar', which is no factor of a layer",
        ),
    ],
    ids=["missing", "folder", "empty", "other format", "no tensors", "weights", "unknown tensor"],
)
def test_files_without_a_lora_are_refused(
    folder: Path, tmp_path: Path, write: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "style.safetensors"
    write(path)
    assert reason in refusal(lambda: find(folder, path), path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_file_is_refused(share: float, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(pair(KOHYA) | {f"{KOHYA}.alpha": torch.tensor(1.0)}, path)
    find(folder, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot read LoRA" in refusal(lambda: find(folder, path), path)


def test_a_pointer_of_git_lfs_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(lambda: find(folder, path), path)


METHODS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "LoKr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
    "IA3": ("on_input", "weight"),
    "OFT": ("oft_blocks", "alpha"),
    "BOFT": ("boft_R", "boft_s"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    "full difference of weights": ("diff", "diff_b"),
    "norm weights": ("w_norm", "b_norm"),
    "AdaLoRA": ("lora_A.weight", "lora_B.weight", "lora_E"),
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(method: str, beside: bool, folder: Path, tmp_path: Path) -> None:
    """The method covers the whole file, or a single layer of a LoRA."""
    path = tmp_path / "style.safetensors"
    other = {f"lora_unet_mid_block_attentions_0_proj_in.{end}": torch.ones(2, 2) for end in METHODS[method]}
    save_file(other | (pair(KOHYA) if beside else {}), path)
    message = refusal(lambda: find(folder, path), path)
    assert f"another method than LoRA or DoRA: {method} ('lora_unet_mid_block" in message
    assert "Merge it into the model with the tool that trained it" in message


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (pair("unet.down_blocks.7.to_q"), "the unet of this model has no place for 'unet.down_blocks.7.to_q.lora_A"),
        (pair("unet.down_blocks.0"), "no place for 'unet.down_blocks.0.lora_A.weight'"),
        (pair("lora_unet_input_blocks_99_1_proj_in"), "no place for 'lora_unet_input_blocks_99_1_proj_in.lora_down"),
        (pair("unet.conv_norm_out"), "no place for 'unet.conv_norm_out.lora_A.weight'"),
        (pair("text_encoder.text_model.embeddings.token_embedding"), "the text_encoder of this model has no place for"),
        (pair("lora_te_text_projection"), "the text_encoder of this model has no place for 'lora_te_text_projection"),
        (pair("lora_te_text_model_encoder_layers_5_mlp_fc1"), "no place for 'lora_te_text_model_encoder_layers_5_mlp"),
        (pair("transformer.blocks.0.to_q"), "this pipeline has no place for 'transformer.blocks.0.to_q.lora_A.weight'"),
        (pair("lora_transformer_blocks_0_to_q"), "this pipeline has no place for 'lora_transformer_blocks_0_to_q"),
        (pair("text_encoder_2.encoder.layers.0.mlp.fc1"), "this pipeline has no place for 'text_encoder_2.encoder"),
        (pair("lora_te2_text_projection"), "this pipeline has no place for 'lora_te2_text_projection.lora_down"),
        (pair(KOHYA) | pair("lora_te3_x"), "this pipeline has no place for 'lora_te3_x.lora_down.weight'"),
        (dict(list(pair(KOHYA).items())[:1]), f"'{KOHYA}.lora_down.weight' but no up factor for unet.{LAYER}"),
        (dict(list(pair(KOHYA).items())[1:]), f"'{KOHYA}.lora_up.weight' but no down factor for unet.{LAYER}"),
        ({f"{KOHYA}.alpha": torch.ones(())}, f"'{KOHYA}.alpha' but no down and no up factor for unet.{LAYER}"),
        (pair(KOHYA, (2, 9)), "[2, 9] and [8, 2], but the layer has [8, 8]"),
        (pair(KOHYA, up=(9, 2)), "[2, 8] and [9, 2], but the layer has [8, 8]"),
        (pair(KOHYA, (3, 8)), "[3, 8] and [8, 2], but the layer has [8, 8]"),
        (pair(KOHYA, (8,), (8, 8)), "[8] and [8, 8], but the layer has [8, 8]"),
        (pair(KOHYA, (), ()), "[] and [], but the layer has [8, 8]"),
        (pair(KOHYA, (0, 8), (8, 0)), "[0, 8] and [8, 0], but the layer has [8, 8]"),
        (pair(KOHYA, (2, 8, 3, 3)), "[2, 8, 3, 3] and [8, 2], but the layer has [8, 8]"),
        (pair(CONVOLUTION), "[2, 8] and [8, 2], but the layer has [8, 8, 3, 3]"),
        (pair(CONVOLUTION, (2, 8, 3, 3), (8, 2, 3, 3)), "but the layer has [8, 8, 3, 3]"),
        (pair(CONVOLUTION, (2, 8, 3, 1), (8, 2, 1, 1)), "but the layer has [8, 8, 3, 3]"),
        (
            pair(CONVOLUTION, (2, 8, 1, 1), (8, 2, 1, 1)) | {f"{CONVOLUTION}.lora_mid.weight": torch.ones(2, 3, 3, 3)},
            "[2, 8, 1, 1] and [2, 3, 3, 3] and [8, 2, 1, 1], but the layer has [8, 8, 3, 3]",
        ),
        (pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(2)}, f"'{KOHYA}.alpha' of shape [2]. Expected one number"),
        (pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(0)}, f"'{KOHYA}.alpha' of shape [0]. Expected one number"),
        (pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(8, 1)}, "of shape [8, 1]. Expected one number"),
        (pair(KOHYA) | {f"{KOHYA}.dora_scale": torch.ones(8)}, "of shape [8]. Expected [8, 1] or [1, 8], a norm for"),
        (pair(KOHYA) | {f"{KOHYA}.dora_scale": torch.ones(9, 1)}, "of shape [9, 1]. Expected [8, 1] or [1, 8]"),
        (
            pair(f"unet.{LAYER}") | {f"unet.{LAYER}.lora_magnitude_vector": torch.ones(9)},
            "of shape [9]. Expected [8], a norm for each output",
        ),
        (
            pair(f"unet.{LAYER}")
            | {f"unet.{LAYER}.lora_magnitude_vector": torch.ones(8), f"unet.{LAYER}.dora_scale": torch.ones(8, 1)},
            "has the norms of one layer twice",
        ),
        (pair(f"unet.{LAYER}") | {f"unet.{LAYER}.lora_B.bias": torch.ones(8)}, f"but unet.{LAYER} has none"),
        (
            pair("unet.conv_in", (2, 4, 3, 3), (8, 2, 1, 1)) | {"unet.conv_in.lora_B.bias": torch.ones(9)},
            "'unet.conv_in.lora_B.bias' of shape [9]. Expected [8]",
        ),
        (
            pair("unet.conv_in", (2, 4, 3, 3), (8, 2, 1, 1))
            | {"unet.conv_in.lora_B.bias": torch.ones(8), "unet.conv_in.dora_scale": torch.ones(8, 1, 1, 1)},
            "A DoRA with a bias is not supported",
        ),
        (pair(KOHYA) | pair(f"unet.{LAYER}"), f"names the same tensor of unet.{LAYER} twice"),
        ({name: value.to(torch.int8) for name, value in pair(KOHYA).items()}, "as I8. Expected floating-point numbers"),
    ],
)
def test_tensors_that_fit_no_layer_are_named_when_the_model_is_opened(
    folder: Path, tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    assert reason in refusal(lambda: find(folder, path), path)


def test_bare_names_of_a_text_encoder_are_refused_where_there_are_two(xl: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(pair("text_model.encoder.layers.0.mlp.fc1", (2, 16), (32, 2)), path)
    assert "does not say which of two text encoders" in refusal(lambda: find(xl, path), path)


def test_a_lora_of_sdxl_is_refused_by_stable_diffusion(folder: Path, tmp_path: Path) -> None:
    """Contexts of SDXL are wider: 32 channels against 16 in the tiny models."""
    path = tmp_path / "style.safetensors"
    save_file(pair(KOHYA.replace("attn1_to_q", "attn2_to_k"), (1, 32), (8, 1)), path)
    message = refusal(lambda: find(folder, path), path)
    assert "was made for another model" in message
    assert "[1, 32] and [8, 1], but the layer has [8, 16]" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lora_down.weight", "lora_up.weight", "alpha", "dora_scale"])
def test_numbers_that_are_not_finite_are_refused_before_capture(
    name: str, value: float, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    tensors = pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(()), f"{KOHYA}.dora_scale": torch.ones(8, 1)}
    tensors[f"{KOHYA}.{name}"].view(-1)[0] = value
    save_file(tensors, path)
    message = refusal(lambda: find(folder, path).load_denoiser(), path)
    assert f"holds NaN or infinity in '{KOHYA}.{name}'" in message


def test_numbers_of_a_text_encoder_are_checked_with_the_unet(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    broken = {name: value * math.nan for name, value in pair(TEXT, (2, 16), (16, 2)).items()}
    save_file(pair(KOHYA) | broken, path)
    model = find(folder, path)
    for action in (model.load_denoiser, lambda: model.encode(["a red square"], 1.0)):
        assert f"holds NaN or infinity in '{TEXT}.lora_A.weight'" in refusal(action, path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([1], "not a JSON object"),
        ("{", "Expecting"),
        ({"unet.r": 2}, "lora_alpha"),
        ({"unet.lora_alpha": "x"}, "an alpha is 'x', not a finite number"),
        ({"unet.lora_alpha": True}, "an alpha is True"),
        ({"unet.lora_alpha": math.nan}, "an alpha is nan"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}, "unterminated subpattern"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": None}}, "an alpha is None"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}, "alpha_pattern is not a JSON object"),
    ],
)
def test_an_invalid_configuration_is_refused(settings: object, reason: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(pair(f"unet.{LAYER}"), path, {"lora_adapter_metadata": text})
    message = refusal(lambda: find(folder, path), path)
    assert f"cannot read the strengths of LoRA {path} in its header" in message
    assert reason in message


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "LOHA"}, "sets peft_type 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changes the model itself"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"use_qalora": True}, "sets use_qalora 'True'"),
        ({"arrow_config": {"top_k": 2}}, "sets arrow_config"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_their_configuration(
    settings: dict[str, object], reason: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    own = {f"unet.{key}": value for key, value in ({"lora_alpha": 1} | settings).items()}
    save_file(pair(f"unet.{LAYER}"), path, {"lora_adapter_metadata": json.dumps(own)})
    assert reason in refusal(lambda: find(folder, path), path)


def test_a_dora_without_its_norms_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    settings = json.dumps({"unet.lora_alpha": 1, "unet.use_dora": True})
    save_file(pair(f"unet.{LAYER}"), path, {"lora_adapter_metadata": settings})
    assert f"has no lora_magnitude_vector for unet.{LAYER}" in refusal(lambda: find(folder, path), path)


def test_two_alphas_for_one_layer_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    tensors = pair(f"unet.{LAYER}") | {f"unet.{LAYER}.alpha": torch.tensor(2.0)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1})})
    assert f"has two alphas for unet.{LAYER}" in refusal(lambda: find(folder, path), path)


# F2
@pytest.mark.parametrize("names", [("bundle_emb.cat.emb_params",), ("bundle_emb.a.clip_l", "bundle_emb.a.clip_g")])
def test_bundled_embeddings_are_left_out_with_a_warning(
    names: tuple[str, ...], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Factors.draw((8, 8), 2, 1.0, torch.Generator().manual_seed(0))
    path = save_as("kohya", tmp_path / "style.safetensors", {("unet", LAYER): own})
    plain = find_model(str(folder)).load_denoiser().get_parameter(f"{LAYER}.weight")
    save_file(load_file(path) | {name: torch.full((2, 16), math.nan) for name in names}, path)
    with caplog.at_level(logging.WARNING):
        model = find(folder, path)
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("unetc"))
    assert warning.startswith(f"{path} bundles embeddings, which are left out: ")
    assert all(name in warning for name in names)
    fused = model.load_denoiser().get_parameter(f"{LAYER}.weight")
    torch.testing.assert_close((fused - plain).double(), own.change(), rtol=0, atol=1e-6)


# F2
@pytest.mark.parametrize("names", [("bundle_emb.cat.emb_params",), ("emb_params",), ("clip_l", "clip_g")])
def test_an_embedding_alone_is_refused_by_name(names: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({name: torch.ones(2, 16) for name in names}, path)
    message = refusal(lambda: find(folder, path), path)
    assert f"it holds an embedding (textual inversion), {', '.join(map(repr, sorted(names)))}" in message


def test_a_file_without_embeddings_warns_of_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(pair(KOHYA), path)
    with caplog.at_level(logging.WARNING):
        find(folder, path)
    assert not [record for record in caplog.records if record.name.startswith("unetc")]
