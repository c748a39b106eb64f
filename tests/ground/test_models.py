"""Models are found and told apart; unsupported ones are refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from unetc.compiler.schedulers.make import scheduler_for
from unetc.errors import ModelError
from unetc.models.find import find_model

diffusers: Any = untyped_diffusers

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=(16, 24),
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Copy the pipeline, so that a test can damage it."""
    return Path(shutil.copytree(original, tmp_path / "pipeline"))


def edit(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; `...` removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refusal(action: Callable[[], object]) -> str:
    """Return the message of the ModelError that an action raises; check that it is one line of readable length."""
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert message.endswith(".")
    return message


def test_a_folder_is_a_model(folder: Path) -> None:
    model = find_model(str(folder))
    assert (model.reference.name, model.reference.pipeline) == (str(folder), "DDPMPipeline")
    assert model.reference.denoiser == "UNet2DModel"
    assert model.sample_shape == (2, 16, 24)
    assert model.scheduler_config["num_train_timesteps"] == 1000
    denoiser = model.load_denoiser()
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    expected = load_file(folder / WEIGHTS)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in denoiser.named_parameters())


def test_a_square_size_may_be_one_number(folder: Path) -> None:
    edit(folder / "unet/config.json", sample_size=16)
    assert find_model(str(folder)).sample_shape == (2, 16, 16)


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/pipeline").folder == folder


@pytest.mark.parametrize("name", ["digit", "./nowhere", "/nowhere/at/all", "a/b/c", "~nobody-has-this-name/model"])
def test_an_unknown_name_lists_what_is_possible(name: str) -> None:
    message = refusal(lambda: find_model(name))
    assert repr(name) in message
    assert "digits" in message
    assert "owner/name" in message


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(lambda: find_model(str(tmp_path)))


def test_another_pipeline_is_refused(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="KandinskyPipeline")
    message = refusal(lambda: find_model(str(folder)))
    assert "KandinskyPipeline" in message
    assert "DDPMPipeline, DDIMPipeline" in message


def test_a_pipeline_without_a_class_is_refused(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name=...)
    assert "supported pipelines" in refusal(lambda: find_model(str(folder)))


@pytest.mark.parametrize("entry", [["diffusers", "UNet2DConditionModel"], None, [], "UNet2DModel", ...])
def test_another_denoiser_is_refused(folder: Path, entry: object) -> None:
    edit(folder / "model_index.json", unet=entry)
    message = refusal(lambda: find_model(str(folder)))
    assert "supported with UNet2DModel" in message
    assert isinstance(entry, list) is False or not entry or "UNet2DConditionModel" in message


def test_weights_that_could_run_code_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    message = refusal(lambda: find_model(str(folder)))
    assert ".safetensors" in message
    assert "can run code" in message


def test_a_broken_link_to_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")
    assert "No such file" in refusal(lambda: find_model(str(folder)))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [b'{"_class_name": ', b"[]", b"\xff\xfe{}", b"", b"[" * 100_000, None])
def test_broken_json_is_refused(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    # a folder without an index is not a pipeline; otherwise the message names the file
    assert Path(name).name in refusal(lambda: find_model(str(folder)))


@pytest.mark.parametrize("size", [..., None])
def test_a_model_without_a_size_is_refused(folder: Path, size: object) -> None:
    edit(folder / "unet/config.json", sample_size=size)
    assert "has no sample_size" in refusal(lambda: find_model(str(folder)))


@pytest.mark.parametrize(
    "change", [{"sample_size": [16, 16, 16]}, {"sample_size": "large"}, {"in_channels": None}, {"in_channels": []}]
)
def test_sizes_that_are_not_numbers_are_refused(folder: Path, change: dict[str, object]) -> None:
    edit(folder / "unet/config.json", **change)
    assert "Expected whole numbers" in refusal(lambda: find_model(str(folder)))


def test_a_variance_is_predicted_only_where_the_scheduler_learns_it(folder: Path) -> None:
    edit(folder / "unet/config.json", out_channels=4)
    assert "predicts 4 channels for samples of 2. Expected 2" in refusal(lambda: find_model(str(folder)))
    edit(folder / "scheduler/scheduler_config.json", variance_type="learned_range")
    edit_weights(
        folder / WEIGHTS,
        lambda tensors: tensors.update(
            {name: torch.cat([tensors[name]] * 2) for name in ("conv_out.weight", "conv_out.bias")}
        ),
    )
    assert find_model(str(folder)).sample_shape == (2, 16, 24)
    edit(folder / "unet/config.json", out_channels=6)
    assert "Expected 2 or 4" in refusal(lambda: find_model(str(folder)))


def test_a_scheduler_that_needs_a_variance_is_refused_for_a_model_without_one(folder: Path) -> None:
    assert scheduler_for("ddpm", find_model(str(folder)))
    edit(folder / "scheduler/scheduler_config.json", variance_type="learned_range")
    model = find_model(str(folder))
    message = refusal(lambda: scheduler_for("ddpm", model))
    assert "needs a predicted variance" in message
    assert "predicts only the 2 channels of its samples" in message
    assert "or ddim" in message
    for other in ("ddim", "euler", "dpmsolver++"):
        assert scheduler_for(other, model)


def test_a_scheduler_that_needs_a_variance_is_refused_where_channels_are_left_to_the_defaults(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=16,
        norm_num_groups=4,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    edit(tmp_path / "unet/config.json", in_channels=..., out_channels=...)
    message = refusal(lambda: scheduler_for("ddpm", find_model(str(tmp_path))))
    assert "predicts only the 3 channels of its samples" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_out_channels": [4, 12]}, "size mismatch"),
        ({"layers_per_block": 2}, "down_blocks.0.resnets.1"),
        ({"add_attention": True}, "mid_block.attentions.0"),
        ({"down_block_types": ["DownBlock2D", "NoSuchBlock"]}, "NoSuchBlock"),
    ],
)
def test_weights_of_another_configuration_are_refused(folder: Path, change: dict[str, Any], named: str) -> None:
    edit(folder / "unet/config.json", **change)
    message = refusal(lambda: find_model(str(folder)))
    assert str(folder) in message
    assert named in message


def test_a_missing_weight_is_never_made_up(folder: Path) -> None:
    # diffusers fills it with random numbers and warns
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.pop("conv_in.bias"))
    assert "'conv_in.bias' is in only one of them" in refusal(lambda: find_model(str(folder)))


def test_a_weight_without_a_place_in_the_configuration_is_never_ignored(folder: Path) -> None:
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.update({"conv_extra.bias": torch.zeros(4)}))
    assert "'conv_extra.bias' is in only one of them" in refusal(lambda: find_model(str(folder)))


def test_truncated_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    message = refusal(lambda: find_model(str(folder)))
    assert str(folder / WEIGHTS) in message
    assert "download them again" in message


def test_the_hash_names_the_model_and_not_the_place(original: Path, folder: Path) -> None:
    assert find_model(str(folder)).reference.sha256 == find_model(str(original)).reference.sha256


def change_one_weight(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        bias = tensors["conv_in.bias"]
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))

    edit_weights(folder / WEIGHTS, change)


@pytest.mark.parametrize(
    "change",
    [
        change_one_weight,
        lambda folder: edit(folder / "unet/config.json", act_fn="gelu"),
        lambda folder: edit(folder / "unet/config.json", _class_name="Other"),
        lambda folder: edit(folder / "scheduler/scheduler_config.json", beta_end=0.03),
        lambda folder: edit(folder / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
    ],
    ids=["weight", "config", "class", "scheduler", "scheduler class"],
)
def test_the_hash_changes_with_everything_that_determines_the_output(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before = find_model(str(folder)).reference.sha256
    change(folder)
    assert find_model(str(folder)).reference.sha256 != before


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_the_hash_ignores_versions_and_paths_noted_by_libraries(folder: Path, name: str) -> None:
    before = find_model(str(folder)).reference.sha256
    edit(folder / name, _diffusers_version="9.9.9", _name_or_path="/somewhere/else")
    fields = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(dict(reversed(fields.items())), indent=7))
    assert find_model(str(folder)).reference.sha256 == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError("We couldn't connect to the Hub.\nCheck your connection."),
            "Hub. Check your connection.",
        ),
        (ConnectionError(), "ConnectionError."),
        (ValueError("x" * 5000), "xxx."),
    ],
    ids=["of two lines", "of no words", "long"],
)
def test_a_hub_id_without_network_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refusal(lambda: find_model("owner/name"))
    assert "'owner/name'" in message
    assert f"{reason} Check the id and the network" in message


def test_a_hub_id_is_downloaded_without_anything_that_could_run_code(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/name").reference.name == "owner/name"
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert all(pattern.endswith((".json", ".safetensors", ".txt")) for pattern in patterns)
