"""Folders are read as diffusers reads them: layouts, variants, shards, sizes and settings."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import huggingface_hub
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import unetc
from tests.ground.test_models import edit, edit_weights, refusal
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from tests.planner.test_same_plans import PROFILES
from unetc.artifacts import Profile
from unetc.errors import ModelError, ProfileError
from unetc.models.find import ModelSource, find_model, usual_sampling
from unetc.models.pipeline import PipelineModel

diffusers: Any = untyped_diffusers

PROMPTS = ["a red square", "a blue circle"]
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Parts of Stable Diffusion with weights, and the names of their files."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def original_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion_xl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Copy the pipeline, so that a test can change it."""
    return Path(shutil.copytree(original, tmp_path / "sd"))


@pytest.fixture
def folder_xl(original_xl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_xl, tmp_path / "sdxl"))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an unconditional pipeline, and move its parts into the folder itself, as early models have them."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=(16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    folder = tmp_path_factory.mktemp("models") / "flat"
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
    return folder


def open_model(folder: Path, variant: str | None = None) -> PipelineModel:
    model = find_model(ModelSource(str(folder), variant=variant))
    assert isinstance(model, PipelineModel)
    return model


def check_equal(model: PipelineModel, pipeline: Any) -> None:
    """Check that a model has the weights that diffusers loads, and encodes prompts alike."""

    def same(own: torch.nn.Module, other: torch.nn.Module) -> None:
        expected = other.state_dict()
        assert own.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name].float()) for name, value in own.state_dict().items())

    same(model.load_denoiser(), pipeline.unet)
    if model.conditional:
        decoder = model.load_decoder()
        assert decoder is not None
        same(decoder.autoencoder, pipeline.vae)
        with torch.no_grad():
            own, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)[:2]
        conditions = model.encode(PROMPTS, 3.0)
        assert torch.equal(torch.as_tensor(conditions.own["encoder_hidden_states"]), own)
        assert torch.equal(torch.as_tensor(conditions.negative["encoder_hidden_states"]), negative)


def save_again(original: Path, folder: Path, **options: Any) -> Path:
    """Let diffusers save a pipeline with other files."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(original, safety_checker=None)
    pipeline.save_pretrained(folder, **options)
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> None:
    for part, stem in PARTS.items():
        path = folder / part / f"{stem}.safetensors"
        path.rename(path.with_name(change(path.name)))


def test_a_flat_repository_is_read_as_diffusers_reads_it(flat: Path) -> None:  # C1
    model = open_model(flat)
    assert model.sample_shape == (3, 16, 24)
    assert model.scheduler_config["_class_name"] == "DDPMScheduler"
    check_equal(model, diffusers.DDPMPipeline.from_pretrained(flat))


def test_a_flat_repository_has_the_hash_of_a_folder_with_parts(flat: Path, tmp_path: Path) -> None:
    diffusers.DDPMPipeline.from_pretrained(flat).save_pretrained(tmp_path / "parts")
    assert open_model(tmp_path / "parts").reference.sha256 == open_model(flat).reference.sha256


def test_one_model_of_a_pipeline_is_no_pipeline(flat: Path, tmp_path: Path) -> None:
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(flat / name, tmp_path)
    with pytest.raises(OSError, match=r"model_index\.json"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert "Save the whole pipeline" in refusal(lambda: find_model(str(tmp_path)))


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "bf16-new"])
def test_the_only_variant_is_read_and_named(  # C2
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    folder = save_again(original, tmp_path / "saved", variant=variant)
    check_equal(open_model(folder), diffusers.StableDiffusionPipeline.from_pretrained(folder, variant=variant))
    assert f"the weights of unet, vae, text_encoder are read as {variant}, their only variant" in caplog.text


def test_half_weights_are_computed_with_in_float32(original: Path, tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(original, dtype=torch.float16, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    expected = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "half", variant="fp16", dtype=torch.float32, safety_checker=None
    )
    check_equal(open_model(tmp_path / "half"), expected)


def test_files_without_a_variant_come_first(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = open_model(folder).reference
    for part, stem in PARTS.items():
        tensors = load_file(folder / part / f"{stem}.safetensors")
        halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(halved, folder / part / f"{stem}.fp16.safetensors", {"format": "pt"})
    model = open_model(folder)
    assert model.reference == before
    assert caplog.text == ""
    check_equal(model, diffusers.StableDiffusionPipeline.from_pretrained(folder))
    chosen = open_model(folder, "fp16")
    assert chosen.reference.sha256 != before.sha256
    assert chosen.reference.text_sha256 != before.text_sha256
    check_equal(chosen, diffusers.StableDiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float32))


def test_parts_without_the_asked_variant_are_read_as_usual(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    check_equal(open_model(folder, "fp16"), diffusers.StableDiffusionPipeline.from_pretrained(folder, variant="fp16"))


def test_several_variants_are_a_choice_for_the_user(folder: Path) -> None:
    rename(folder, lambda name: name.replace(".safetensors", ".fp16.safetensors"))
    shutil.copy(
        folder / "unet/diffusion_pytorch_model.fp16.safetensors",
        folder / "unet/diffusion_pytorch_model.non_ema.safetensors",
    )
    assert "variants fp16, non_ema alone. Choose one of them: --variant fp16" in refusal(lambda: open_model(folder))
    assert open_model(folder, "non_ema").parts["vae"].weights.variant == "fp16"


def test_an_unknown_variant_is_refused(folder: Path) -> None:
    assert "no weights in the variant 'fp16'. Its weights exist in no variant" in refusal(
        lambda: open_model(folder, "fp16")
    )
    rename(folder, lambda name: name.replace(".safetensors", ".fp16.safetensors"))
    assert "variant 'fp8'. It has fp16." in refusal(lambda: open_model(folder, "fp8"))
    assert "has no variants" in refusal(lambda: find_model(ModelSource("glide:base", variant="fp16")))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("old", [False, True], ids=["names of today", "names of old"])
def test_shards_are_read(original: Path, tmp_path: Path, variant: str | None, old: bool) -> None:  # C2
    if old and variant is None:
        pytest.skip("names of shards changed only with a variant")
    folder = save_again(original, tmp_path / "saved", variant=variant, max_shard_size="5KB")
    expected = diffusers.StableDiffusionPipeline.from_pretrained(folder, variant=variant)
    assert all(len(list((folder / part).glob("*.safetensors"))) > 2 for part in PARTS)
    if old:  # diffusion_pytorch_model.fp16-00001-of-00002 was diffusion_pytorch_model-00001-of-00002.fp16
        for part, stem in PARTS.items():
            for path in (folder / part).glob(f"{stem}.fp16-*"):
                path.rename(path.with_name(path.name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")))
            for path in (folder / part).glob("*.index.fp16.json"):
                text = (
                    path.read_text().replace(f"{stem}.fp16-", f"{stem}-").replace(".safetensors", ".fp16.safetensors")
                )
                path.unlink()
                path.with_name(f"{stem}.safetensors.fp16.index.json").write_text(text)
    check_equal(open_model(folder), expected)
    check_equal(open_model(folder, variant), expected)


def test_shards_of_a_flat_repository_are_read(flat: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flat, tmp_path / "flat"))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    unet = diffusers.UNet2DModel.from_pretrained(flat)
    unet.save_pretrained(folder, max_shard_size="10KB")
    assert not (folder / "diffusion_pytorch_model.safetensors").exists()
    check_equal(open_model(folder), diffusers.DDPMPipeline.from_pretrained(folder))


def sharded(original: Path, tmp_path: Path) -> tuple[Path, Path]:
    folder = save_again(original, tmp_path / "saved", max_shard_size="20KB")
    return folder, folder / "unet/diffusion_pytorch_model.safetensors.index.json"


def test_a_missing_shard_is_named(original: Path, tmp_path: Path) -> None:
    folder, index = sharded(original, tmp_path)
    gone = next(index.parent.glob("*-00002-of-*"))
    gone.unlink()
    message = refusal(lambda: open_model(folder))
    assert str(gone) in message
    assert "is missing" in message


@pytest.mark.parametrize(
    "name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..\\x.safetensors", "other.bin", ""]
)
def test_an_index_names_only_files_of_its_folder(original: Path, tmp_path: Path, name: str) -> None:
    folder, index = sharded(original, tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.bias"] = name
    index.write_text(json.dumps(content))
    assert f"names {name!r}" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize("change", [lambda entry: {}, lambda entry: [], lambda entry: {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(original: Path, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    folder, index = sharded(original, tmp_path)
    index.write_text(json.dumps(change({})))
    assert index.name in refusal(lambda: open_model(folder))


def test_an_index_fits_its_shards(original: Path, tmp_path: Path) -> None:
    folder, index = sharded(original, tmp_path)
    content = json.loads(index.read_text())
    first, *_, last = sorted(set(content["weight_map"].values()))
    content["weight_map"]["conv_in.bias"] = last if content["weight_map"]["conv_in.bias"] == first else first
    index.write_text(json.dumps(content))
    assert "'conv_in.bias'" in refusal(lambda: open_model(folder))


def test_a_tensor_that_the_index_leaves_out_is_read(original: Path, tmp_path: Path) -> None:
    folder, index = sharded(original, tmp_path)
    whole = open_model(folder).reference
    content = json.loads(index.read_text())
    del content["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps(content))
    assert open_model(folder).reference == whole
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    expected = diffusers.UNet2DConditionModel.from_pretrained(original / "unet")
    torch.testing.assert_close(theirs.conv_in.bias, expected.conv_in.bias, rtol=0, atol=0)


def test_shards_without_an_index_are_refused(original: Path, tmp_path: Path) -> None:
    folder, index = sharded(original, tmp_path)
    index.unlink()
    assert "not their index" in refusal(lambda: open_model(folder))


def test_files_that_the_index_does_not_name_are_not_read(original: Path, tmp_path: Path) -> None:
    folder, index = sharded(original, tmp_path)
    before = open_model(folder).reference
    (index.parent / "diffusion_pytorch_model-00009-of-00009.safetensors").write_bytes(b"no tensors")
    (index.parent / "backup.safetensors").write_bytes(b"no tensors")
    assert open_model(folder).reference == before


def test_an_unused_file_is_not_part_of_the_hash(folder: Path) -> None:  # C2
    before = open_model(folder).reference
    for part in PARTS:
        (folder / part / "notes.safetensors").write_bytes(b"anything")
        (folder / part / "model.onnx").write_bytes(b"anything")
    (folder / "tokenizer/README.md").write_text("anything")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"anything")
    assert open_model(folder).reference == before


def nudge(path: Path) -> None:
    """Change one weight of a file as little as possible."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        first = next(value for _, value in sorted(tensors.items()) if value.is_floating_point())
        flat = first.view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf, dtype=flat.dtype))

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_every_shard_is_part_of_the_hash(original: Path, tmp_path: Path) -> None:
    folder, index = sharded(original, tmp_path)
    seen = {open_model(folder).reference.sha256}
    shards = sorted(index.parent.glob("*.safetensors"))
    for shard in shards:
        nudge(shard)
        seen.add(open_model(folder).reference.sha256)
    assert len(seen) == len(shards) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: nudge(folder / "text_encoder/model.safetensors"),
        lambda folder: edit(folder / "text_encoder/config.json", hidden_act="gelu"),
        lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=5),
        lambda folder: (folder / "tokenizer/added_tokens.json").write_text('{"new": 60}'),
        lambda folder: edit(folder / "model_index.json", force_zeros_for_empty_prompt=False),
    ],
    ids=["weight", "config", "tokenizer", "added token", "pipeline"],
)
def test_what_encodes_prompts_has_a_hash(folder: Path, change: Callable[[Path], object]) -> None:
    before = open_model(folder).reference
    change(folder)
    after = open_model(folder).reference
    assert after.text_sha256 != before.text_sha256
    assert msgspec.structs.replace(after, text_sha256=before.text_sha256) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: nudge(folder / "vae/diffusion_pytorch_model.safetensors"),
        lambda folder: edit(folder / "vae/config.json", scaling_factor=0.2),
        lambda folder: edit(folder / "vae/config.json", act_fn="gelu"),
    ],
    ids=["weight", "scaling", "activation"],
)
def test_the_decoder_has_a_hash(folder: Path, change: Callable[[Path], object]) -> None:
    def hashes() -> tuple[object, str]:
        model = open_model(folder)
        decoder = model.load_decoder()
        assert decoder is not None
        return model.reference, decoder.sha256()

    (before, first), _ = hashes(), change(folder)
    after, second = hashes()
    assert after == before, "neither denoiser nor prompts have changed"
    assert second != first


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("suffix", [".bin", ".ckpt"])
def test_weights_that_could_run_code_are_refused_with_a_way_out(folder: Path, part: str, suffix: str) -> None:  # C3
    path = folder / part / f"{PARTS[part]}.safetensors"
    torch.save(load_file(path), path.with_suffix(suffix))
    path.unlink()
    message = refusal(lambda: open_model(folder))
    assert f"{folder / part} has no .safetensors weights, only {path.stem}{suffix}" in message
    assert "convert them" in message


def test_only_weights_under_other_names_are_refused_by_name(folder: Path) -> None:
    rename(folder, lambda name: f"my_{name}")
    assert "only my_diffusion_pytorch_model.safetensors" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize("part", PARTS)
def test_every_header_is_read_at_once(folder: Path, part: str) -> None:  # C3
    path = folder / part / f"{PARTS[part]}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(lambda: open_model(folder))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    "name",
    [*(f"{part}/{stem}.safetensors" for part, stem in PARTS.items()), "unet/config.json", "tokenizer/tokenizer.json"],
)
def test_pointers_of_git_lfs_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    (folder / name).with_name("zeta.bin").write_bytes(POINTER)
    message = refusal(lambda: open_model(folder))
    assert f"{folder / name} is a pointer of git-lfs (zeta.bin too)" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_every_part_fit_its_configuration(folder: Path, part: str) -> None:  # C3
    path = folder / part / f"{PARTS[part]}.safetensors"
    edit_weights(path, lambda tensors: tensors.pop(sorted(tensors)[-1]))
    message = refusal(lambda: open_model(folder))
    assert f"cannot load the {part}" in message
    assert "in only one of them" in message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vae/config.json", "vae"),
        ("text_encoder/config.json", "text_encoder"),
        ("tokenizer/tokenizer.json", "tokenizer"),
    ],
)
@pytest.mark.parametrize("content", [None, b'{"_class_name": '])
def test_every_part_is_opened_at_once(folder: Path, name: str, part: str, content: bytes | None) -> None:  # C3
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert part in refusal(lambda: open_model(folder))


@pytest.mark.parametrize("key", ["quantization_config", "transformers_weights"])
def test_a_text_encoder_with_other_weights_is_refused(folder: Path, key: str) -> None:
    edit(folder / "text_encoder/config.json", **{key: "other.safetensors"})
    assert key in refusal(lambda: open_model(folder))


def test_text_encoders_of_another_width_are_refused(tmp_path: Path) -> None:  # D5
    other = save_stable_diffusion_xl(tmp_path / "xl")  # its second text encoder makes the other half of the tokens
    shutil.rmtree(other / "text_encoder")
    shutil.rmtree(other / "tokenizer")
    edit(other / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert "tokens of width 16, and its unet takes 32" in refusal(lambda: open_model(other))


def test_index_components_of_other_libraries_are_refused(folder: Path) -> None:
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")):
        before = json.loads((folder / "model_index.json").read_text())[part]
        edit(folder / "model_index.json", **{part: ["my_module", kind]})
        message = refusal(lambda: open_model(folder))
        assert f"takes its {part} from 'my_module', which could run code" in message
        edit(folder / "model_index.json", **{part: before})
    edit(folder / "model_index.json", scheduler=["my_module", "DDIMScheduler"])
    assert "scheduler from 'my_module'" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize("entry", [[None, None], None, ...])
def test_a_part_that_is_null_is_refused_by_name(folder: Path, part: str, entry: object) -> None:
    edit(folder / "model_index.json", **{part: entry})
    assert f"nothing as its {part}" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize(
    ("part", "kind"),
    [("text_encoder", "T5EncoderModel"), ("tokenizer", "T5Tokenizer"), ("unet", "UNet3DConditionModel")],
)
def test_another_class_is_refused_by_name(folder: Path, part: str, kind: str) -> None:
    edit(folder / "model_index.json", **{part: ["transformers", kind]})
    assert f"{kind} as its {part}" in refusal(lambda: open_model(folder))


def test_harmless_settings_are_accepted(folder: Path) -> None:
    before = open_model(folder).reference
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
        requires_aesthetics_score=False,
        add_watermarker=False,
        controlnet=[None, None],
        _name_or_path="somewhere",
    )
    assert open_model(folder).reference == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("controlnet", ["diffusers", "ControlNetModel"]), ("prediction", "v"), ("add_watermarker", True)],
)
def test_an_unknown_setting_of_the_pipeline_is_refused_by_name(folder: Path, key: str, value: object) -> None:
    edit(folder / "model_index.json", **{key: value})
    assert key in refusal(lambda: open_model(folder))


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_decides_itself_what_an_empty_prompt_is(folder_xl: Path, zeros: bool) -> None:
    edit(folder_xl / "model_index.json", force_zeros_for_empty_prompt=zeros)
    conditions = open_model(folder_xl).encode(PROMPTS, 3.0)
    with torch.no_grad():
        _, negative, _, pooled = diffusers.StableDiffusionXLPipeline.from_pretrained(folder_xl).encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    assert torch.equal(torch.as_tensor(conditions.negative["encoder_hidden_states"]), negative)
    assert torch.equal(torch.as_tensor(conditions.negative["text_embeds"]), pooled)
    assert bool((negative == 0).all()) is zeros


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_an_unknown_setting_of_a_part_is_refused_by_name(folder: Path, part: str) -> None:
    edit(folder / part / "config.json", brightness=2, _comment="harmless")
    assert "'brightness'" in refusal(lambda: open_model(folder))
    edit(folder / part / "config.json", brightness=...)
    assert open_model(folder).sample_shape == (4, 16, 16)


def test_values_that_diffusers_replaces_by_defaults_are_replaced(folder: Path) -> None:
    edit(folder / "unet/config.json", act_fn="gelu", _use_default_values=["act_fn"])
    expected = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").config.act_fn
    assert open_model(folder).load_denoiser().config["act_fn"] == expected == "silu"
    with_default = open_model(folder).reference.sha256
    edit(folder / "unet/config.json", _use_default_values=...)
    assert open_model(folder).reference.sha256 != with_default


@pytest.mark.parametrize(
    ("version", "size", "expected"), [("0.6.0", 32, 64), ("0.6.0", [32, 40], 32), ("0.9.0", 32, 32)]
)
def test_small_sizes_of_old_files_are_read_as_64(folder: Path, version: str, size: object, expected: int) -> None:
    edit(folder / "unet/config.json", sample_size=size, _diffusers_version=version)
    height = diffusers.StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size
    assert open_model(folder).sample_shape[1] == expected == (height if isinstance(height, int) else height[0])


def test_channels_have_the_defaults_of_their_class(folder: Path, flat: Path, tmp_path: Path) -> None:
    edit(folder / "unet/config.json", in_channels=..., out_channels=...)
    assert open_model(folder).sample_shape == (4, 16, 16)
    other = Path(shutil.copytree(flat, tmp_path / "flat"))
    edit(other / "config.json", in_channels=..., out_channels=...)
    assert open_model(other).sample_shape == (3, 16, 24)


@pytest.mark.parametrize("size", [[16], [16, 16, 16], 0, [16, -1]])
def test_sizes_that_are_no_sizes_are_refused(folder: Path, size: object) -> None:
    edit(folder / "unet/config.json", sample_size=size)
    assert "Expected whole numbers" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize(
    ("channels", "pipeline"),
    [
        (9, "StableDiffusionInpaintPipeline"),
        (8, "StableDiffusionInstructPix2PixPipeline"),
    ],
)
def test_a_unet_of_another_pipeline_is_refused_with_its_name(  # D5
    folder: Path, channels: int, pipeline: str
) -> None:
    edit(folder / "unet/config.json", in_channels=channels)
    message = refusal(lambda: open_model(folder))
    assert f"takes {channels} channels, but a StableDiffusionPipeline with latents of 4 gives it 4" in message
    assert f"A {pipeline} gives it {channels}: if the model is one, correct _class_name in model_index.json" in message
    assert "variance_type" not in message


def test_labels_that_a_pipeline_cannot_give_are_refused_at_once(flat: Path, tmp_path: Path) -> None:  # C4
    folder = Path(shutil.copytree(flat, tmp_path / "flat"))
    edit(folder / "config.json", class_embed_type="timestep")
    assert "needs class_labels, which a DDPMPipeline does not give it" in refusal(lambda: open_model(folder))


def hub(monkeypatch: pytest.MonkeyPatch, remote: Path, local: Path) -> list[list[str]]:
    """Stand in for the Hub: copy the files that the patterns allow; return the lists of copied files."""
    fetched: list[list[str]] = []

    def download(_: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
        chosen = [
            name
            for name in names
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)
            and not (local / name).exists()
        ]
        for name in chosen:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, local / name)
        fetched.append(sorted(chosen))
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def weights_of(fetched: list[list[str]]) -> set[str]:
    return {name for names in fetched for name in names if name.endswith((".safetensors", ".bin", ".ckpt", ".py"))}


def test_a_flat_repository_is_fetched(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # C1
    remote = Path(shutil.copytree(flat, tmp_path / "remote"))
    (remote / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (remote / "pipeline.py").write_text("raise SystemExit")
    fetched = hub(monkeypatch, remote, tmp_path / "local")
    model = find_model("owner/name")
    assert weights_of(fetched) == {"diffusion_pytorch_model.safetensors"}
    assert model.reference.sha256 == open_model(flat).reference.sha256


def test_only_the_weights_that_are_read_are_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_model(folder).reference.sha256
    for part, stem in PARTS.items():
        for variant in ("fp16", "non_ema"):
            shutil.copy(folder / part / f"{stem}.safetensors", folder / part / f"{stem}.{variant}.safetensors")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"anything")
    plain = {f"{part}/{stem}.safetensors" for part, stem in PARTS.items()}
    fetched = hub(monkeypatch, folder, tmp_path / "local")
    assert find_model("owner/name").reference.sha256 == expected
    assert (weights_of(fetched), len(fetched)) == (plain, 1)
    fetched = hub(monkeypatch, folder, tmp_path / "other")
    assert find_model(ModelSource("owner/name", variant="fp16")).reference.sha256 == expected
    assert weights_of(fetched) == {name.replace(".safetensors", ".fp16.safetensors") for name in plain}


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_the_only_variant_is_fetched(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:  # C2
    remote = save_again(original, tmp_path / "remote", variant="fp16", max_shard_size=shard_size)
    hub(monkeypatch, remote, tmp_path / "local")
    model = find_model("owner/name")
    assert isinstance(model, PipelineModel)
    check_equal(model, diffusers.StableDiffusionPipeline.from_pretrained(remote, variant="fp16"))


def test_parts_without_the_variant_are_fetched_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(stem, stem.with_name("diffusion_pytorch_model.fp16.safetensors"))
    fetched = hub(monkeypatch, folder, tmp_path / "local")
    find_model(ModelSource("owner/name", variant="fp16"))
    assert weights_of(fetched) == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


def test_another_variant_is_fetched_where_there_is_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, variant in (("unet", "fp16"), ("vae", "bf16")):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    hub(monkeypatch, folder, tmp_path / "local")
    model = find_model(ModelSource("owner/name", variant="fp16"))
    assert isinstance(model, PipelineModel)
    assert [model.parts[part].weights.variant for part in PARTS] == ["fp16", "bf16", None]


def test_a_variant_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = hub(monkeypatch, tmp_path / "remote", tmp_path / "local")
    with pytest.raises(ModelError, match="no variant"):
        find_model(ModelSource("owner/name", variant="*"))
    assert fetched == []


@pytest.mark.parametrize(("name", "profile"), [("digits", "digits-ddim"), ("prompted-digits", "prompted-digits")])
def test_profiles_of_the_built_in_models_stay_valid(name: str, profile: str) -> None:
    known = Profile.load(PROFILES / f"{profile}.json").model
    assert find_model(name).reference.sha256 == known.sha256
    assert known.text_sha256 is msgspec.UNSET, "and it says nothing about text encoders, as they all did"


def test_a_profile_is_of_its_text_encoders(tmp_path: Path) -> None:
    profile = Profile.load(PROFILES / "prompted-digits.json")
    model = msgspec.structs.replace(profile.model, text_sha256="0" * 64)
    options = unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.27))
    with pytest.raises(ProfileError, match="other text encoders"):
        unetc.build(
            "prompted-digits",
            tmp_path / "bundle",
            options,
            profile=msgspec.structs.replace(profile, model=model),
            cache=tmp_path / "cache",
        )
    assert not (tmp_path / "cache").exists()


def test_sdxl_without_its_first_text_encoder_is_read(folder_xl: Path, tmp_path: Path) -> None:
    edit(folder_xl / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    shutil.rmtree(folder_xl / "text_encoder")
    edit(folder_xl / "unet/config.json", cross_attention_dim=16)
    unet = diffusers.UNet2DConditionModel.from_config(diffusers.UNet2DConditionModel.load_config(folder_xl / "unet"))
    unet.save_pretrained(folder_xl / "unet")
    model = open_model(folder_xl)
    with torch.no_grad():
        expected, *_ = diffusers.StableDiffusionXLPipeline.from_pretrained(folder_xl).encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    assert torch.equal(torch.as_tensor(model.encode(PROMPTS, 3.0).own["encoder_hidden_states"]), expected)


@pytest.mark.parametrize("length", [7, 10**30])
def test_a_tokenizer_that_is_longer_than_its_encoder_is_refused(folder: Path, length: int) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    assert "model_max_length" in refusal(lambda: open_model(folder).encode(PROMPTS, 3.0))


def test_a_table_of_timesteps_is_refused_by_name_at_once(flat: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flat, tmp_path / "learned"))
    edit(folder / "config.json", time_embedding_type="learned", num_train_timesteps=1000)
    assert "time_embedding_type 'learned'" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("LCMScheduler", ("lcm", 4)), ("TCDScheduler", ("tcd", 4)), ("EulerDiscreteScheduler", ("ddim", 50))],
)
def test_a_model_that_was_distilled_for_a_scheduler_is_sampled_with_it(
    folder: Path, scheduler: str, expected: tuple[str, int]
) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    usual = usual_sampling(str(folder))
    assert (usual.scheduler, usual.steps) == expected


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"cross_attention_dim": None}),
        ("unet/config.json", {"addition_embed_type": "text_time"}),
        ("unet/config.json", {"class_embed_type": "projection"}),
        ("unet/config.json", {"time_cond_proj_dim": 0}),
        ("unet/config.json", {"time_cond_proj_dim": "x"}),
        ("unet/config.json", {"num_class_embeds": "x"}),
        ("vae/config.json", {"latent_channels": "4"}),
        ("vae/config.json", {"latent_channels": 0}),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name(folder: Path, file: str, change: dict[str, object]) -> None:
    edit(folder / file, **change)
    with pytest.raises(ModelError, match=f"{file.partition('/')[0]}"):
        open_model(folder)
