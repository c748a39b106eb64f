"""Everything that can be done to a UNet of diffusers works with a drop-in, or is refused by name (kind D)."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.dropin.runs import SIDE, dropin_of, noise, words
from tests.models import tiny_of
from tests.pipelines import save_stable_diffusion
from unetc.call import SIZE_NUMBERS, CallSignature
from unetc.diffusers import BundleUNet
from unetc.diffusers.bundle_unet import _KEPT
from unetc.diffusers.refusals import HARMLESS, LISTS_OF_LAYERS, RefusedByBundle
from unetc.errors import ArtifactError, SessionError, ShapeMismatch, UnetcError

diffusers: Any = untyped_diffusers

KINDS = diffusers.UNet2DConditionModel, diffusers.UNet2DModel
PUBLIC = sorted(
    {
        name
        for kind in KINDS
        for name in set(dir(kind)) - set(dir(nn.Module))
        if not name.startswith("_") and (callable(getattr(kind, name)) or isinstance(getattr(kind, name), property))
    }
)
"""Every public method and property of a UNet, but for those of torch."""

TORCH = {
    "add_module": lambda unet: unet.add_module("conv_in", nn.Identity()),
    "register_module": lambda unet: unet.register_module("conv_in", nn.Identity()),
    "register_parameter": lambda unet: unet.register_parameter("bias", nn.Parameter(torch.zeros(1))),
    "conv_in": lambda unet: setattr(unet, "conv_in", nn.Identity()),
    "scale": lambda unet: setattr(unet, "scale", nn.Parameter(torch.zeros(1))),
    "apply": lambda unet: unet.apply(lambda module: None),
    "load_state_dict": lambda unet: unet.load_state_dict({}),
    "state_dict": lambda unet: unet.state_dict(),
}
"""Ways of torch to change or show layers; they would have no effect."""


@pytest.fixture
def unet(shared: Path) -> BundleUNet:
    return dropin_of("cross-attention", shared)


def call(unet: BundleUNet, **changes: Any) -> Tensor:
    given = {"sample": noise(0), "timestep": 500, "encoder_hidden_states": words(0)} | changes
    with torch.no_grad():
        output: Tensor = unet(**given).sample
    return output


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_works_or_is_refused(unet: BundleUNet, name: str) -> None:  # D2
    """A refusal names the method and what to do; `hasattr` is false then, as pipelines ask for it."""
    if name in _KEPT:
        assert hasattr(unet, name)
    elif name in HARMLESS:
        before = call(unet)
        getattr(unet, name)()
        unet.reset()
        torch.testing.assert_close(call(unet), before, rtol=0, atol=0)
    else:
        assert not hasattr(unet, name)
        with pytest.raises(RefusedByBundle, match=rf"a bundle has no {name}: .*Instead, "):
            getattr(unet, name)()


@pytest.mark.parametrize(
    "name", ["down_blocks", "mid_block", "conv_in", "time_embedding", "encoder_hid_proj", "_load_ip_adapter_weights"]
)
def test_layers_are_refused_by_name(unet: BundleUNet, name: str) -> None:  # D2
    with pytest.raises(RefusedByBundle, match=f"a bundle has no {name}"):
        getattr(unet, name)


@pytest.mark.parametrize("name", sorted(TORCH))
def test_methods_of_torch_that_change_weights_are_refused(unet: BundleUNet, name: str) -> None:
    with pytest.raises(RefusedByBundle, match=name):
        TORCH[name](unet)


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor"])
def test_processors_of_the_same_attention_change_nothing(unet: BundleUNet, processor: str) -> None:
    made = getattr(diffusers.models.attention_processor, processor)()
    before = call(unet)
    unet.set_attn_processor(made)
    unet.set_attn_processor({"a": made, "b": made})
    unet.reset()
    torch.testing.assert_close(call(unet), before, rtol=0, atol=0)


def test_other_processors_are_refused_by_class(unet: BundleUNet) -> None:  # D2
    made = diffusers.models.attention_processor.PAGIdentitySelfAttnProcessor2_0()
    with pytest.raises(RefusedByBundle, match="PAGIdentitySelfAttnProcessor2_0"):
        unet.set_attn_processor(made)


def test_arguments_have_the_places_of_the_original(shared: Path, unet: BundleUNet) -> None:  # D4
    original = inspect.signature(diffusers.UNet2DConditionModel.forward)
    positional = [name for name in original.parameters if name != "self"]
    assert positional[4] == "timestep_cond"
    expected = call(unet)
    unet.reset()
    with torch.no_grad():
        torch.testing.assert_close(unet(noise(0), 500, words(0), None, None)[0], expected, rtol=0, atol=0)
        (as_tuple,) = unet(noise(0), 500, words(0), return_dict=False)
    assert as_tuple.shape == expected.shape
    unconditional = dropin_of("attention", shared)
    with torch.no_grad():
        assert unconditional(noise(0, 2), torch.tensor(500), None, False)[0].shape == (1, 2, 8, 8)
    with pytest.raises(TypeError, match="magic"):
        unet(noise(0), 500, words(0), magic=1)


def test_a_lora_scale_of_one_changes_nothing_and_others_are_refused(unet: BundleUNet) -> None:
    before = call(unet)
    unet.reset()
    torch.testing.assert_close(call(unet, cross_attention_kwargs={"scale": 1.0}), before, rtol=0, atol=0)
    with pytest.raises(SessionError, match="cross_attention_kwargs"):
        call(unet, cross_attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize(
    ("changes", "words_"),
    [
        ({"sample": torch.zeros(1, 9, 8, 8)}, ["9", "4, height, width"]),
        ({"encoder_hidden_states": torch.zeros(1, 5, 7)}, ["encoder_hidden_states", "7"]),
        ({"encoder_hidden_states": torch.zeros(3, 5, 12)}, ["encoder_hidden_states", "3"]),
        ({"sample": torch.zeros(4, 8, 8)}, ["4, 8, 8"]),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_their_shapes(  # D5
    unet: BundleUNet, changes: dict[str, Tensor], words_: list[str]
) -> None:
    with pytest.raises(ShapeMismatch) as caught:
        call(unet, **changes)
    assert all(word in str(caught.value) for word in words_), caught.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": torch.zeros(1, 4, 8, 8, dtype=torch.int32)}, "the sample is a tensor of torch.int32"),
        ({"sample": np.zeros((1, 4, 8, 8), np.float32)}, "the sample is of class ndarray"),
        ({"timestep": None}, "the timestep is of class NoneType"),
        ({"timestep": "late"}, "the timestep is of class str"),
        ({"timestep": torch.zeros(1, device="meta")}, "the timestep is a tensor on the meta device"),
        ({"timestep": torch.tensor([500.0]).to_sparse()}, "the timestep is a sparse, nested or quantized tensor"),
        ({"timestep": torch.tensor([500] * 3)}, "the timestep has 3 elements. Expected one, or one for each of the 1"),
        ({"timestep": [500, 500]}, "the timestep has 2 elements"),
        ({"timestep": torch.zeros(0)}, "the timestep has 0 elements"),
        ({"sample": noise(0).to("meta")}, "the sample is a tensor on the meta device"),
        ({"sample": noise(0).to_sparse()}, "the sample is a sparse, nested or quantized tensor"),
        ({"encoder_hidden_states": words(0).numpy()}, "encoder_hidden_states is of class ndarray"),
        ({"encoder_hidden_states": 1.0}, "encoder_hidden_states is of class float"),
        ({"encoder_hidden_states": [words(0)]}, "encoder_hidden_states is of class list"),
        ({"encoder_hidden_states": words(0).to("meta")}, "encoder_hidden_states is a tensor on the meta device"),
        ({"encoder_hidden_states": words(0).to_sparse()}, "encoder_hidden_states is a sparse, nested or quantized"),
        ({"encoder_hidden_states": words(0) * 1j}, "encoder_hidden_states"),
        ({"added_cond_kwargs": [1]}, "added_cond_kwargs is of class list. Expected a mapping"),
    ],
)
def test_values_of_other_kinds_are_refused(unet: BundleUNet, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SessionError, match=message):
        call(unet, **changes)


@pytest.mark.parametrize("value", [[1], np.zeros((1, 16), np.float32), 3, "pooled"])
def test_added_conditions_of_other_kinds_are_refused(unet: BundleUNet, value: object) -> None:
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    xl["projection_class_embeddings_input_dim"] = 16 + SIZE_NUMBERS * 4
    unet._calls = CallSignature.of("UNet2DConditionModel", {**unet.config, **xl})
    added = {"text_embeds": value, "time_ids": torch.zeros(1, 6)}
    with pytest.raises(SessionError, match=f"text_embeds is of class {type(value).__name__}"):
        call(unet, added_cond_kwargs=added)
    with pytest.raises(ShapeMismatch, match="the model needs text_embeds"):
        call(unet, added_cond_kwargs={**added, "text_embeds": None})


def test_a_negated_view_is_a_tensor_as_any_other(unet: BundleUNet) -> None:
    view = torch.complex(words(0), -words(0)).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(call(unet, encoder_hidden_states=view), call(unet), rtol=0, atol=0)


@pytest.mark.parametrize("timestep", [-0.25, 1000.5, float("nan")])
def test_timesteps_outside_the_trained_range_are_refused(unet: BundleUNet, timestep: float) -> None:  # A1
    with pytest.raises(SessionError, match="lies outside"):
        call(unet, timestep=timestep)


def test_a_gradient_is_refused(unet: BundleUNet) -> None:  # D7
    wanted = noise(0).requires_grad_()
    with pytest.raises(SessionError, match="no_grad"):
        unet(wanted, 500, words(0))
    with torch.no_grad():
        unet(wanted, 500, words(0))


WANTED = torch.zeros(1, 16).requires_grad_()


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_hidden_states": words(0).requires_grad_()},
        {"timestep": torch.tensor(500.0, requires_grad=True)},
        {"added_cond_kwargs": {"text_embeds": WANTED, "time_ids": torch.zeros(1, 6)}},
        {"down_block_additional_residuals": (torch.zeros(1), WANTED)},
        {"down_block_additional_residuals": [torch.zeros(1), WANTED]},
        {"mid_block_additional_residual": WANTED},
        {"cross_attention_kwargs": {"gligen": {"objs": [WANTED]}}},
    ],
)
def test_a_gradient_is_refused_wherever_it_is_wanted(unet: BundleUNet, changes: dict[str, Any]) -> None:  # D7
    given = {"timestep": 500, "encoder_hidden_states": words(0)} | changes
    with pytest.raises(SessionError, match="no_grad"):
        unet(noise(0), **given)


def test_type_and_device_follow_the_pipeline(unet: BundleUNet) -> None:  # D7
    expected = call(unet)
    unet.to(torch.float16)
    assert unet.dtype == torch.float16
    unet.reset()
    half = call(unet, sample=noise(0).half(), encoder_hidden_states=words(0).half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.05)
    assert unet.to(torch.float32).dtype == torch.float32
    assert unet.device == torch.device("cpu")


@pytest.mark.parametrize("inference", [False, True])
def test_the_first_parameter_has_the_type_and_the_device(shared: Path, inference: bool) -> None:
    """Pipelines and libraries ask it; no optimiser may believe that it can be trained."""
    with torch.inference_mode(inference):
        unet = dropin_of("cross-attention", shared)
    for one in (unet, copy.deepcopy(unet)):
        for device, dtype in (("cpu", torch.float32), ("meta", torch.float16)):
            assert one.to(device, dtype).requires_grad_() is one
            (parameter,) = one.parameters()
            assert (parameter.device, parameter.dtype) == (torch.device(device), dtype) == (one.device, one.dtype)
            assert [name for name, _ in one.named_parameters()] == ["_interface"]
            assert not parameter.requires_grad
            assert parameter.numel() == 0


def test_copies_share_engines_and_pickles_are_refused(unet: BundleUNet) -> None:
    expected = call(unet)
    for own in (copy.deepcopy(unet), copy.copy(unet)):
        assert own.config == unet.config
        torch.testing.assert_close(call(own), expected, rtol=0, atol=0)
    with pytest.raises(RefusedByBundle, match="pickle"):
        pickle.dumps(unet)


def test_what_was_not_loaded_from_a_bundle_cannot_be_saved(unet: BundleUNet, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to save"):
        unet.save_pretrained(tmp_path)


def test_a_compiled_drop_in_is_the_drop_in(unet: BundleUNet) -> None:
    expected = call(unet)
    unet.reset()
    compiled = torch.compile(unet)
    with torch.no_grad():
        torch.testing.assert_close(compiled(noise(0), 500, words(0)).sample, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a pipeline and delete the weights of its UNet."""
    folder = save_stable_diffusion(tmp_path_factory.mktemp("saved") / "pipeline")
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    return folder


@pytest.mark.parametrize("architecture", ["attention", "cross-attention"])
def test_a_drop_in_is_an_instance_of_the_original_class(shared: Path, architecture: str) -> None:
    unet = dropin_of(architecture, shared)
    own = {"attention": diffusers.UNet2DModel, "cross-attention": diffusers.UNet2DConditionModel}[architecture]
    other = next(kind for kind in KINDS if kind is not own)
    assert isinstance(unet, own)
    assert isinstance(unet, BundleUNet)
    assert not isinstance(unet, other)
    assert type(unet).__name__ == "BundleUNet"
    assert type(unet) in (own,)  # from_pipe asks so
    assert type(unet) not in (other,)
    assert BundleUNet not in (own, other)
    assert {type(unet): "drop-in", own: "original"}[own] == "original"
    assert isinstance(copy.deepcopy(unet), own)


@pytest.mark.parametrize("kind", KINDS)
def test_private_methods_of_unets_are_refused(shared: Path, kind: Any) -> None:
    """Their own layers are not there, so none of their methods can work."""
    unet = dropin_of("attention" if kind is diffusers.UNet2DModel else "cross-attention", shared)
    for name, value in vars(kind).items():
        if callable(value) and not name.startswith("__") and name not in _KEPT | HARMLESS | {"forward"}:
            with pytest.raises(RefusedByBundle, match=f"a bundle has no {name}"):
                getattr(unet, name)()


@pytest.mark.parametrize("copied", [False, True])
def test_hooks_on_the_drop_in_itself_work(unet: BundleUNet, copied: bool) -> None:
    seen: list[object] = []
    unet.register_forward_pre_hook(lambda module, given, named: seen.append(named["timestep"]), with_kwargs=True)
    unet.register_forward_hook(lambda module, given, output: type(output)(sample=output.sample + 1))
    expected = call(copy.deepcopy(unet)) if copied else call(unet)
    assert seen == [500]
    for hooks in (unet._forward_hooks, unet._forward_pre_hooks):
        hooks.clear()
    unet.reset()
    torch.testing.assert_close(call(unet) + 1, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(LISTS_OF_LAYERS))
def test_listing_layers_is_answered_with_a_warning_once(
    unet: BundleUNet, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for _ in range(2):
        for listed in getattr(unet, name)():
            one = listed[1] if isinstance(listed, tuple) else listed
            assert one is unet or (isinstance(one, nn.Parameter) and one.numel() == 0)
    assert [f"{name}() of a bundle lists no layers" in record.message for record in caplog.records] == [True]


def test_libraries_that_list_layers_are_not_warned(
    unet: BundleUNet, without_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=unet, safety_checker=None)
    caplog.clear()
    pipeline.to("cpu", torch.float32)
    unet.eval().requires_grad_(False)
    assert not [record for record in caplog.records if record.name.startswith("unetc")]


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_from_pipe_takes_the_drop_in_over(unet: BundleUNet, without_weights: Path, kind: str) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=unet, safety_checker=None)
    assert getattr(diffusers, kind).from_pipe(pipeline).unet is unet


def test_a_pipeline_opens_with_the_drop_in_alone(unet: BundleUNet, without_weights: Path, shared: Path) -> None:  # D3
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=unet, safety_checker=None)
    assert pipeline.unet is unet
    image_to_image = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    assert image_to_image.unet is unet
    original = tiny_of("cross-attention", shared).denoiser
    expected = image_of(
        diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=original, safety_checker=None)
    )
    assert expected.std() > 0.01
    exact = dropin_of("cross-attention", shared, full_model=True)
    alone = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=exact, safety_checker=None)
    np.testing.assert_allclose(image_of(alone), expected, rtol=0, atol=1e-4)


def test_a_pipeline_that_opened_without_a_unet_needs_the_size(without_weights: Path, shared: Path) -> None:  # D3
    """The constructor of a pipeline reads the default size from the UNet, of diffusers too."""
    original = tiny_of("cross-attention", shared).denoiser
    images = []
    for unet in (original, dropin_of("cross-attention", shared, full_model=True)):
        later = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=None, safety_checker=None)
        later.unet = unet
        assert later.unet is unet
        with pytest.raises(TypeError, match="'int' object is not subscriptable"):
            image_of(later)
        side = SIDE * later.vae_scale_factor
        images.append(image_of(later, height=side, width=side))
    np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-4)


def test_a_pipeline_moves_whole_models_to_the_device_and_back(unet: BundleUNet, without_weights: Path) -> None:
    pytest.importorskip("accelerate")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=unet, safety_checker=None)
    expected = image_of(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        np.testing.assert_array_equal(image_of(pipeline), expected)
    pipeline.remove_all_hooks()
    np.testing.assert_array_equal(image_of(pipeline), expected)


def test_an_offload_of_single_layers_is_refused_with_the_way_to_save_memory(  # D2
    unet: BundleUNet, without_weights: Path
) -> None:
    pytest.importorskip("accelerate")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=unet, safety_checker=None)
    expected = image_of(pipeline)
    with pytest.raises(RefusedByBundle, match=r"cannot be offloaded layer by layer.*memory=\"low\"") as caught:
        pipeline.enable_sequential_cpu_offload(device="cpu")
    assert "state_dict" not in str(caught.value)
    with pytest.raises(RefusedByBundle, match="read the weights file"):
        unet.state_dict()
    pipeline.enable_model_cpu_offload(device="cpu")  # as the error advises
    np.testing.assert_array_equal(image_of(pipeline), expected)


def image_of(pipeline: Any, **options: Any) -> Any:
    """Sample an image."""
    pipeline.set_progress_bar_config(disable=True)
    embeddings = {"prompt_embeds": words(0), "negative_prompt_embeds": words(1)}
    return pipeline(**embeddings, latents=noise(0), num_inference_steps=4, output_type="np", **options).images


def test_what_a_pipeline_does_to_its_unet_is_refused_by_name(  # D2
    unet: BundleUNet, without_weights: Path, tmp_path: Path
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(without_weights, unet=unet, safety_checker=None)
    with pytest.raises(UnetcError, match=r"enable_freeu.*original UNet"):
        pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    lora = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 16, 1, 1),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.zeros(16, 2, 1, 1),
    }
    with pytest.raises(UnetcError, match=r"load_lora_adapter.*--lora"):
        pipeline.load_lora_weights(lora)
    for harmless in ("enable_attention_slicing", "disable_freeu", "fuse_qkv_projections", "unload_lora_weights"):
        getattr(pipeline, harmless)()
