"""Every weight of a fused model is W + scale · alpha / rank · B A, whatever the format of the file."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import peft as untyped_peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.every_day import every_nth
from tests.loras import FORMATS, Factors, layers, load_unfused, lora_config, randomise, save_as, save_lora
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_2, save_stable_diffusion_xl
from unetc.errors import ModelError
from unetc.models.find import ModelSource, find_model
from unetc.models.lora import Lora
from unetc.models.lora_fusion import fuse_into_text_encoders, fuse_into_unet
from unetc.models.text import load_text_encoders

diffusers: Any = untyped_diffusers
peft: Any = untyped_peft

Place = tuple[str, str]
"""Part of a pipeline and path of a layer."""

PARTS = ("unet", "text_encoder", "text_encoder_2")
LINEAR = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
"""[8, 8] in the tiny pipeline."""
POINTWISE = ("unet", "down_blocks.0.attentions.0.proj_in")
"""[8, 8, 1, 1]."""
CONVOLUTION = ("unet", "down_blocks.0.downsamplers.0.conv")
"""[8, 8, 3, 3]."""
OBLONG = ("unet", "down_blocks.1.resnets.0.conv1")
"""[16, 8, 3, 3]."""
WIDE = ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj")
"""[128, 16]."""
TEXT = ("text_encoder", "encoder.layers.0.mlp.fc1")
"""[32, 16]."""
KINDS = {"linear": LINEAR, "1x1": POINTWISE, "3x3": CONVOLUTION, "oblong": OBLONG, "wide": WIDE, "text encoder": TEXT}

SAVE = {
    "Stable Diffusion": save_stable_diffusion,
    "Stable Diffusion 2": save_stable_diffusion_2,
    "SDXL": save_stable_diffusion_xl,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("strength")
    return {name: save(root / name / "pipeline") for name, save in SAVE.items()}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["Stable Diffusion"]


def models(folder: Path, *loras: Lora) -> dict[str, nn.Module]:
    """Load all parts of a pipeline that a LoRA can change, as a build loads them."""
    model: Any = find_model(ModelSource(str(folder), loras=loras))
    pipeline = load_text_encoders(folder, model.reference.pipeline)
    fuse_into_text_encoders(pipeline, loras)
    encoders = {part: getattr(pipeline, part, None) for part in PARTS[1:]}
    return {"unet": model.load_denoiser(), **{part: own for part, own in encoders.items() if own is not None}}


def values(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": own.data for part, model in parts.items() for name, own in model.named_parameters()}


@functools.cache
def plain_of(folder: Path) -> Mapping[str, Tensor]:
    """Load the parameters of a pipeline without a LoRA, once for all tests."""
    return values(models(folder))


@functools.cache
def places(folder: Path) -> Mapping[Place, tuple[int, ...]]:
    """List all layers of a pipeline with the shapes of their weights."""
    return {(part, path): shape for part, model in models(folder).items() for path, shape in layers(model)}


def check(folder: Path, loras: tuple[Lora, ...], changes: Mapping[Place, Tensor], bias: Mapping[Place, Tensor]) -> None:
    """Check all parameters of a fused pipeline: those with a change, layer by layer, and all others bit by bit."""
    plain, fused = plain_of(folder), values(models(folder, *loras))
    added = {f"{part}.{path}.weight": change for (part, path), change in changes.items()}
    added |= {f"{part}.{path}.bias": change for (part, path), change in bias.items()}
    assert added.keys() <= plain.keys()
    for name, value in plain.items():
        if name in added:
            expected = value.double() + added[name].reshape(value.shape)
            torch.testing.assert_close(fused[name].double(), expected, rtol=1e-6, atol=1e-6, msg=name)
            assert not torch.equal(fused[name], value) or not added[name].any()
        else:
            assert torch.equal(fused[name], value), name


def draw(
    shapes: Mapping[Place, tuple[int, ...]], seed: int, alphas: tuple[float | None, ...] = (None, 1.0, 4.0, 0.5)
) -> dict[Place, Factors]:
    """Draw factors for layers, each with another rank and alpha."""
    generator = torch.Generator().manual_seed(seed)
    return {
        place: Factors.draw(shape, 1 + number % 5, alphas[number % len(alphas)], generator)
        for number, (place, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize(("pipeline", "form"), every_nth(4, SAVE, FORMATS))
def test_every_layer_of_every_format_has_the_strength_of_the_definition(
    form: str, pipeline: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """F1 and F3: ranks and alphas differ from layer to layer, and the text projection is one of the layers."""
    folder = folders[pipeline]
    factors = draw(places(folder), seed=0)
    assert any(path == "text_projection" for _, path in factors) == (pipeline == "SDXL")
    path = save_as(form, tmp_path / "style.safetensors", factors)
    changes = {place: own.change(0.7) for place, own in factors.items()}
    check(folder, (Lora(path=path, scale=0.7),), changes, {})


@pytest.mark.parametrize(("form", "kind"), every_nth(7, FORMATS, KINDS))
def test_one_layer_alone_is_changed(form: str, kind: str, folder: Path, tmp_path: Path) -> None:
    factors = draw({KINDS[kind]: places(folder)[KINDS[kind]]}, seed=1, alphas=(3.0,))
    path = save_as(form, tmp_path / "style.safetensors", factors)
    check(folder, (Lora(path=path, scale=-1.5),), {place: own.change(-1.5) for place, own in factors.items()}, {})


# F1
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("alone", [True, False])
def test_the_text_projection_may_stand_alone_or_have_another_rank(
    alone: bool, form: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shapes = {place: shape for place, shape in places(folders["SDXL"]).items() if place[0] == "text_encoder_2"}
    projection = ("text_encoder_2", "text_projection")
    generator = torch.Generator().manual_seed(2)
    factors = {place: Factors.draw(shape, 4, 2.0, generator) for place, shape in shapes.items() if not alone}
    factors[projection] = Factors.draw(shapes[projection], 3, 6.0, generator)
    path = save_as(form, tmp_path / "style.safetensors", factors)
    changes = {place: own.change() for place, own in factors.items()}
    check(folders["SDXL"], (Lora(path=path),), changes, {})


# F3
def test_an_attention_module_keeps_its_alpha_in_a_file_of_other_alphas(folder: Path, tmp_path: Path) -> None:
    """Rank 2 and alpha 2 in a file of rank 8 and alpha 16 is a strength of 1."""
    shapes = {place: shape for place, shape in places(folder).items() if "attn" in place[1]}
    generator = torch.Generator().manual_seed(3)
    factors = {place: Factors.draw(shape, 8, 16.0, generator) for place, shape in shapes.items()}
    factors[LINEAR] = Factors.draw(shapes[LINEAR], 2, 2.0, generator)
    path = save_as("kohya", tmp_path / "style.safetensors", factors)
    assert factors[LINEAR].change().equal(factors[LINEAR].up.double() @ factors[LINEAR].down.double())
    check(folder, (Lora(path=path),), {place: own.change() for place, own in factors.items()}, {})


def test_stability_names_and_diffusers_names_may_mix(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers drops the former without a word where a file has both."""
    shapes = places(folders["SDXL"])
    first = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    second = ("unet", "mid_block.attentions.0.proj_in")
    factors = draw({place: shapes[place] for place in (first, second)}, seed=4)
    path = save_as("kohya", tmp_path / "style.safetensors", factors)
    old, new = "lora_unet_down_blocks_1_attentions_0", "lora_unet_input_blocks_3_1"
    save_file({name.replace(old, new): value for name, value in load_file(path).items()}, path)
    assert any(name.startswith(new) for name in load_file(path))
    check(folders["SDXL"], (Lora(path=path),), {place: own.change() for place, own in factors.items()}, {})


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model."])
def test_names_without_a_part_are_layers_of_the_unet(prefix: str, folder: Path, tmp_path: Path) -> None:
    shapes = {place: shape for place, shape in places(folder).items() if place[0] == "unet"}
    factors = draw(shapes, seed=5)
    path = save_as("diffusers", tmp_path / "style.safetensors", factors)
    save_file({prefix + name.removeprefix("unet."): value for name, value in load_file(path).items()}, path)
    check(folder, (Lora(path=path),), {place: own.change() for place, own in factors.items()}, {})


def test_names_without_a_part_are_layers_of_a_single_text_encoder(folder: Path, tmp_path: Path) -> None:
    factors = draw({TEXT: places(folder)[TEXT]}, seed=6)
    path = save_as("diffusers with the level text_model", tmp_path / "style.safetensors", factors)
    bare = {name.replace("text_encoder.", "base_model.model."): value for name, value in load_file(path).items()}
    save_file(bare, path)
    check(folder, (Lora(path=path),), {TEXT: factors[TEXT].change()}, {})


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(3.0).half(),
        torch.tensor([3.0]),
        torch.tensor([[3.0]]).bfloat16(),
        torch.tensor(3),
        torch.tensor(3.0).double(),
    ],
    ids=["half", "one dimension", "two dimensions", "integer", "double"],
)
def test_an_alpha_may_have_any_type_and_be_in_a_list(alpha: Tensor, folder: Path, tmp_path: Path) -> None:
    factors = draw({LINEAR: (8, 8)}, seed=7, alphas=(3.0,))
    path = save_as("kohya", tmp_path / "style.safetensors", factors)
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith(".alpha"))
    save_file(tensors | {name: alpha}, path)
    check(folder, (Lora(path=path),), {LINEAR: factors[LINEAR].change()}, {})


def test_an_alpha_of_zero_is_a_strength_of_zero(folder: Path, tmp_path: Path) -> None:
    path = save_as("kohya", tmp_path / "style.safetensors", draw({LINEAR: (8, 8)}, seed=8, alphas=(0.0,)))
    check(folder, (Lora(path=path),), {}, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_factors_may_have_any_floating_type(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    (own,) = draw({LINEAR: (8, 8)}, seed=9).values()
    own = Factors(down=own.down.to(dtype), up=own.up.to(dtype), alpha=2.0)
    path = save_as("kohya", tmp_path / "style.safetensors", {LINEAR: own})
    check(folder, (Lora(path=path),), {LINEAR: own.change()}, {})


@pytest.mark.parametrize(("place", "kernel"), [(LINEAR, (1, 1)), (POINTWISE, ())], ids=["linear", "1x1"])
def test_linear_layers_and_1x1_convolutions_may_stand_for_each_other(
    place: Place, kernel: tuple[int, ...], folder: Path, tmp_path: Path
) -> None:
    """Projections of transformers are convolutions in Stable Diffusion 1 and linear in 2."""
    own = Factors.draw((8, 8, *kernel), 3, 2.0, torch.Generator().manual_seed(10))
    path = save_as("kohya", tmp_path / "style.safetensors", {place: own})
    check(folder, (Lora(path=path),), {place: own.change()}, {})


def test_a_convolution_between_the_factors_is_multiplied_in(folder: Path, tmp_path: Path) -> None:
    """LyCORIS writes a 3x3 convolution as 1x1, 3x3 and 1x1; torch's own convolutions show the product."""
    generator = torch.Generator().manual_seed(11)
    down, mid, up = (torch.randn(*shape, generator=generator) for shape in ((3, 8, 1, 1), (3, 3, 3, 3), (16, 3, 1, 1)))
    name = f"lora_unet_{OBLONG[1].replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    path = tmp_path / "style.safetensors"
    save_file({f"{name}.{end}": value for end, value in tensors.items()}, path)
    plain, fused = plain_of(folder), values(models(folder, Lora(path=path, scale=0.5)))
    weight = f"unet.{OBLONG[1]}.weight"
    change = (fused[weight] - plain[weight]).double()
    sample = torch.randn(1, 8, 6, 6, generator=generator).double()
    expected = sample
    for factor in (down, mid, up):
        expected = nn.functional.conv2d(expected, factor.double(), padding=factor.shape[-1] // 2)
    actual = nn.functional.conv2d(sample, change, padding=1)
    torch.testing.assert_close(actual, 0.5 * 1.5 / 3 * expected, rtol=0, atol=1e-4)
    assert [name for name in plain if not torch.equal(plain[name], fused[name])] == [weight]


def test_a_change_of_a_bias_has_the_same_strength(folder: Path, tmp_path: Path) -> None:
    own = Factors.draw((16, 8, 3, 3), 4, 2.0, torch.Generator().manual_seed(12))
    path = save_as("diffusers", tmp_path / "style.safetensors", {OBLONG: own})
    bias = torch.linspace(-1, 1, 16)
    save_file(load_file(path) | {f"unet.{OBLONG[1]}.lora_B.bias": bias}, path)
    changes, biases = {OBLONG: own.change(0.5)}, {OBLONG: 0.5 * 2.0 / 4 * bias.double()}
    check(folder, (Lora(path=path, scale=0.5),), changes, biases)


def configured(path: Path, options: Mapping[str, Any]) -> dict[str, float | int]:
    """Change the configuration of peft in the header of a file, and return its ranks by layer."""
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = load_file(path)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings | dict(options))})
    return {name.removesuffix(".lora_A.weight"): len(own) for name, own in tensors.items() if ".lora_A" in name}


@pytest.mark.parametrize("root", [True, False])
def test_alphas_come_from_the_configuration_of_peft(root: bool, folder: Path, tmp_path: Path) -> None:
    path = save_lora(folder, tmp_path / "style.safetensors", rank_pattern={"to_v": 4, "q_proj": 1}, use_rslora=root)
    tensors = load_file(path)
    changes = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        part, _, layer = name.removesuffix(".lora_A.weight").partition(".")
        down, up = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        rank = 4 if layer.endswith("to_v") else 1 if layer.endswith("q_proj") else 2
        alpha = 5.0 if layer.endswith("to_k") else 0.5 if layer.endswith("fc1") else 3.0
        assert len(down) == rank
        product = (up.flatten(1) @ down.flatten(1)) * alpha / (math.sqrt(rank) if root else rank)
        changes[part, layer.removeprefix("text_model.")] = product
    check(folder, (Lora(path=path),), changes, {})
    fused, expected = values(models(folder, Lora(path=path, scale=0.7))), load_unfused(folder, (path, 0.7))
    expected.fuse_lora()
    expected.unload_lora_weights()
    for name, value in values({part: getattr(expected, part) for part in ("unet", "text_encoder")}).items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_pattern_may_be_the_whole_path_of_a_layer(folder: Path, tmp_path: Path) -> None:
    """A path that was written by a release of transformers with the level text_model still counts."""
    path = save_lora(folder, tmp_path / "style.safetensors")
    pattern = {f"text_model.{TEXT[1]}": 4.0}
    configured(path, {"text_encoder.alpha_pattern": pattern, "text_encoder.lora_alpha": 2.0})
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("mlp.fc1.lora_A.weight"))
    product = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
    key = f"text_encoder.{TEXT[1]}.weight"
    change = values(models(folder, Lora(path=path)))[key] - plain_of(folder)[key]
    torch.testing.assert_close(change.double(), 4.0 / 2 * product, rtol=0, atol=1e-5)


def test_a_folder_of_peft_has_its_alphas_in_a_separate_file(folder: Path, tmp_path: Path) -> None:
    unet = models(folder)["unet"]
    adapted = peft.get_peft_model(unet, lora_config("unet", rank_pattern={"to_v": 4}))
    randomise(adapted, torch.Generator().manual_seed(13))
    adapted.save_pretrained(tmp_path)
    lora = Lora(path=tmp_path / "adapter_model.safetensors")
    fused, expected = models(folder, lora)["unet"], adapted.merge_and_unload()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name), value, rtol=1e-5, atol=1e-5, msg=name)
    reference = find_model(ModelSource(str(folder), loras=(lora,))).reference
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 7}))
    assert find_model(ModelSource(str(folder), loras=(lora,))).reference.sha256 != reference.sha256


def test_a_scale_of_zero_changes_no_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    for pipeline, folder in folders.items():
        path = save_as("kohya", tmp_path / f"{pipeline}.safetensors", draw(places(folder), seed=14))
        check(folder, (Lora(path=path, scale=0.0), Lora(path=path, scale=-0.0)), {}, {})


def test_the_order_of_loras_does_not_matter(folder: Path, tmp_path: Path) -> None:
    shapes = places(folder)
    first, second = draw(shapes, seed=15), draw(shapes, seed=16, alphas=(2.0, None))
    one = Lora(path=save_as("kohya", tmp_path / "one.safetensors", first), scale=0.5)
    other = Lora(path=save_as("diffusers", tmp_path / "other.safetensors", second), scale=-2.0)
    changes = {place: first[place].change(0.5) + second[place].change(-2.0) for place in shapes}
    check(folder, (one, other), changes, {})
    forth, back = values(models(folder, one, other)), values(models(folder, other, one))
    for name, value in forth.items():
        torch.testing.assert_close(value, back[name], rtol=2e-7, atol=2e-7, msg=name)


class Layers(nn.Module):
    """A model with a layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.point, self.wide = nn.Linear(5, 7), nn.Conv2d(5, 7, 1), nn.Conv2d(5, 7, 3)


one_lora = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["kohya", "diffusers"]),
        "scale": st.floats(-4, 4, width=32),
        "rank": st.tuples(*[st.integers(1, 9)] * 3),
        "alpha": st.tuples(*[st.none() | st.floats(-8, 64, width=16)] * 3),
        "kinds": st.sets(st.sampled_from(["linear", "point", "wide"]), min_size=1),
    }
)


@given(drawn=st.lists(one_lora, min_size=1, max_size=3), order=st.randoms())
@settings(max_examples=60)
def test_any_ranks_alphas_scales_and_orders_follow_the_definition(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[dict[str, Any]], order: Any
) -> None:
    root = tmp_path_factory.mktemp("drawn")
    model, plain = Layers(), Layers()
    expected = {name: value.data.double() for name, value in plain.named_parameters()}
    loras = []
    for number, own in enumerate(drawn):
        generator = torch.Generator().manual_seed(number)
        factors = {}
        for place, (name, shape) in enumerate(layers(plain)):
            if name in own["kinds"]:
                factors["unet", name] = Factors.draw(shape, own["rank"][place], own["alpha"][place], generator)
                change = factors["unet", name].change(own["scale"])
                expected[f"{name}.weight"] = expected[f"{name}.weight"] + change
        path = save_as(own["form"], root / f"{number}.safetensors", factors)
        loras.append(Lora(path=path, scale=own["scale"]))
    order.shuffle(loras)
    fuse_into_unet(model, loras)
    for name, value in model.named_parameters():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(value.data.double(), expected[name], rtol=1e-6, atol=1e-6 * size, msg=name)


def dora(path: Path, place: Place, own: Factors, norms: Tensor, end: str) -> Path:
    """Save a DoRA of one layer."""
    form = "kohya" if end == "dora_scale" else "diffusers"
    save_as(form, path, {place: own})
    (name,) = (name for name in load_file(path) if name.endswith(FORMATS[form][1][0]))
    save_file(load_file(path) | {f"{name.removesuffix(FORMATS[form][1][0])}.{end}": norms}, path)
    return path


@pytest.mark.parametrize(("kind", "axis", "scale"), every_nth(5, KINDS, [0, 1], [1.0, 0.4]))
def test_a_dora_has_the_norms_of_its_file(kind: str, axis: int, scale: float, folder: Path, tmp_path: Path) -> None:
    """LyCORIS and OneTrainer save the norms of rows or of columns: their shape tells."""
    place = KINDS[kind]
    shape = places(folder)[place]
    generator = torch.Generator().manual_seed(17)
    own = Factors.draw(shape, 3, 2.0, generator)
    norms = 1 + torch.rand([size if number == axis else 1 for number, size in enumerate(shape)], generator=generator)
    path = dora(tmp_path / "style.safetensors", place, own, norms, "dora_scale")
    weight = plain_of(folder)[f"{place[0]}.{place[1]}.weight"].double()
    changed = weight + own.change(scale).reshape(shape)
    lengths = changed.movedim(axis, 0).flatten(1).pow(2).sum(1).sqrt()
    expected = torch.stack(
        [norm * one / length for norm, one, length in zip(norms.flatten(), changed.unbind(axis), lengths, strict=True)],
        axis,
    )
    check(folder, (Lora(path=path, scale=scale),), {place: expected - weight}, {})
    fused = values(models(folder, Lora(path=path, scale=scale)))[f"{place[0]}.{place[1]}.weight"]
    torch.testing.assert_close(fused.movedim(axis, 0).flatten(1).norm(dim=1), norms.flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", every_nth(2, [0.4, 1.0]))
def test_a_dora_of_peft_is_fused_as_in_peft(scale: float, folder: Path, tmp_path: Path) -> None:
    path = save_lora(folder, tmp_path / "style.safetensors", use_dora=True)
    norms = {name: own for name, own in load_file(path).items() if name.endswith("lora_magnitude_vector")}
    assert {name.partition(".")[0] for name in norms} == {"unet", "text_encoder"}
    fused, expected = values(models(folder, Lora(path=path, scale=scale))), load_unfused(folder, (path, scale))
    for name, own in norms.items():
        if name.startswith("text_encoder."):  # diffusers 0.42 loses them and initialises them anew
            layer = name.removeprefix("text_encoder.").removeprefix("text_model.")
            expected.text_encoder.get_parameter(f"{layer}.lora0.weight").data = own.flatten()
    expected.fuse_lora()
    expected.unload_lora_weights()
    for name, value in values({part: getattr(expected, part) for part in ("unet", "text_encoder")}).items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert any(not torch.equal(value, fused[name]) for name, value in plain_of(folder).items())


@pytest.mark.parametrize("first", every_nth(2, ["dora", "plain"]))
def test_a_dora_beside_other_loras_is_fused_as_in_peft(first: str, folder: Path, tmp_path: Path) -> None:
    """The norm is of the original weight with the change of the DoRA alone; the product with it is of all so far."""
    loras = [
        Lora(path=save_lora(folder, tmp_path / "plain.safetensors", seed=1, text=False), scale=0.5),
        Lora(path=save_lora(folder, tmp_path / "dora.safetensors", text=False, use_dora=True)),
    ]
    if first == "dora":
        loras.reverse()
    unfused = load_unfused(folder, *((lora.path, lora.scale) for lora in loras)).unet
    generator = torch.Generator().manual_seed(18)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 6, 16, generator=generator)
    fused, other = models(folder, *loras)["unet"], models(folder, *reversed(loras))["unet"]
    with torch.no_grad():
        actual, expected, reverse = (unet(sample, 500, text).sample for unet in (fused, unfused, other))
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    assert float((reverse - expected).abs().max()) > 0.01 * float(expected.abs().max())


def test_a_scale_beyond_single_precision_is_refused(folder: Path, tmp_path: Path) -> None:
    path = save_as("kohya", tmp_path / "style.safetensors", draw({LINEAR: (8, 8)}, seed=19))
    with pytest.raises(ModelError, match=r"becomes NaN or infinity\. Check the scales"):
        models(folder, Lora(path=path, scale=1e39))
