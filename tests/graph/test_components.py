"""Components are found from structure alone, and named after the modules that own them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from tests.models import ARCHITECTURES, Block, Tiny, daily, new_denoiser, tiny_of, toy_denoiser
from unetc.artifacts.profile import STEP, Component
from unetc.compiler.graph.capture import Capture, capture
from unetc.compiler.graph.denoisers import denoiser as denoisers
from unetc.compiler.graph.denoisers.denoiser import denoiser_of
from unetc.compiler.graph.gate import gate_values
from unetc.errors import ModelError
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

EXPECTED: Mapping[str, str] = {
    "attention": """
        down_blocks.0.resnets.0
        down_blocks.1.resnets.0
        down_blocks.1.attentions.0
        mid_block.resnets.0
        mid_block.attentions.0
        mid_block.resnets.1
        level:mid_block.resnets.1
        skip:down_blocks.1.attentions.0→up_blocks.0.resnets.0
        up_blocks.0.resnets.0
        up_blocks.0.attentions.0
        skip:down_blocks.0.downsamplers.0.conv→up_blocks.0.resnets.1
        up_blocks.0.resnets.1
        up_blocks.0.attentions.1
        level:up_blocks.0.upsamplers.0
        skip:down_blocks.0.resnets.0→up_blocks.1.resnets.0
        up_blocks.1.resnets.0
        skip:conv_in→up_blocks.1.resnets.1
        up_blocks.1.resnets.1
    """,
    "resampling": """
        down_blocks.0.resnets.0
        down_blocks.0.attentions.0
        down_blocks.0.downsamplers.0
        down_blocks.1.resnets.0
        down_blocks.2.resnets.0
        mid_block.resnets.0
        mid_block.attentions.0
        mid_block.resnets.1
        level:mid_block.resnets.1
        skip:down_blocks.2.resnets.0→up_blocks.0.resnets.0
        up_blocks.0.resnets.0
        up_blocks.0.attentions.0
        skip:down_blocks.1.downsamplers.0.conv→up_blocks.0.resnets.1
        up_blocks.0.resnets.1
        up_blocks.0.attentions.1
        up_blocks.0.upsamplers.0
        level:up_blocks.0.upsamplers.0.upsample
        skip:down_blocks.1.resnets.0→up_blocks.1.resnets.0
        up_blocks.1.resnets.0
        skip:down_blocks.0.downsamplers.0→up_blocks.1.resnets.1
        up_blocks.1.resnets.1
        level:up_blocks.1.upsamplers.0
        skip:down_blocks.0.attentions.0→up_blocks.2.resnets.0
        up_blocks.2.resnets.0
        skip:conv_in→up_blocks.2.resnets.1
        up_blocks.2.resnets.1
    """,
    "cross-attention": """
        down_blocks.0.resnets.0
        down_blocks.0.attentions.0.transformer_blocks.0.attn1
        down_blocks.0.attentions.0.transformer_blocks.0.attn2
        down_blocks.0.attentions.0.transformer_blocks.0.ff
        down_blocks.0.attentions.0
        down_blocks.1.resnets.0
        mid_block.resnets.0
        mid_block.attentions.0.transformer_blocks.0.attn1
        mid_block.attentions.0.transformer_blocks.0.attn2
        mid_block.attentions.0.transformer_blocks.0.ff
        mid_block.attentions.0
        mid_block.resnets.1
        level:mid_block.resnets.1
        skip:down_blocks.1.resnets.0→up_blocks.0.resnets.0
        up_blocks.0.resnets.0
        skip:down_blocks.0.downsamplers.0.conv→up_blocks.0.resnets.1
        up_blocks.0.resnets.1
        level:up_blocks.0.upsamplers.0
        skip:down_blocks.0.attentions.0→up_blocks.1.resnets.0
        up_blocks.1.resnets.0
        up_blocks.1.attentions.0.transformer_blocks.0.attn1
        up_blocks.1.attentions.0.transformer_blocks.0.attn2
        up_blocks.1.attentions.0.transformer_blocks.0.ff
        up_blocks.1.attentions.0
        skip:conv_in→up_blocks.1.resnets.1
        up_blocks.1.resnets.1
        up_blocks.1.attentions.1.transformer_blocks.0.attn1
        up_blocks.1.attentions.1.transformer_blocks.0.attn2
        up_blocks.1.attentions.1.transformer_blocks.0.ff
        up_blocks.1.attentions.1
    """,
    "added-kv": """
        down_blocks.0.resnets.0
        down_blocks.0.downsamplers.0
        down_blocks.1.resnets.0
        down_blocks.1.attentions.0
        mid_block.resnets.0
        mid_block.attentions.0
        mid_block.resnets.1
        level:mid_block.resnets.1
        skip:down_blocks.1.attentions.0→up_blocks.0.resnets.0
        up_blocks.0.resnets.0
        up_blocks.0.attentions.0
        skip:down_blocks.0.downsamplers.0→up_blocks.0.resnets.1
        up_blocks.0.resnets.1
        up_blocks.0.attentions.1
        up_blocks.0.upsamplers.0
        level:up_blocks.0.upsamplers.0.upsample
        skip:down_blocks.0.resnets.0→up_blocks.1.resnets.0
        up_blocks.1.resnets.0
        skip:conv_in→up_blocks.1.resnets.1
        up_blocks.1.resnets.1
    """,
}
"""Names of all components but the step, in the order they are computed."""

BELOW: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "attention": {
        "level:mid_block.resnets.1": ("mid_block.resnets.0", "mid_block.resnets.1"),
        "level:up_blocks.0.upsamplers.0": ("down_blocks.1.resnets.0", "up_blocks.0.attentions.1"),
    },
    "resampling": {
        "level:mid_block.resnets.1": ("mid_block.resnets.0", "mid_block.resnets.1"),
        "level:up_blocks.0.upsamplers.0.upsample": ("down_blocks.2.resnets.0", "up_blocks.0.upsamplers.0"),
        "level:up_blocks.1.upsamplers.0": ("down_blocks.0.downsamplers.0", "up_blocks.1.resnets.1"),
    },
    "cross-attention": {
        "level:mid_block.resnets.1": ("mid_block.resnets.0", "mid_block.resnets.1"),
        "level:up_blocks.0.upsamplers.0": ("down_blocks.1.resnets.0", "up_blocks.0.resnets.1"),
    },
    "added-kv": {
        "level:mid_block.resnets.1": ("mid_block.resnets.0", "mid_block.resnets.1"),
        "level:up_blocks.0.upsamplers.0.upsample": ("down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0"),
    },
}
"""First and last component nested in each level."""


@pytest.fixture(scope="session", params=daily(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


def inside_step(components: Sequence[Component]) -> Sequence[Component]:
    """Check that only the last component is the step and that all others are nested in it; return the others."""
    *others, step = components
    assert (step.name, step.kind, step.owner) == (STEP, "step", "")
    assert step.nested == tuple(component.name for component in others)
    assert "step" not in {component.kind for component in others}
    return others


def test_names_are_those_of_the_modules(tiny: Tiny) -> None:
    assert list(tiny.names) == [*EXPECTED[tiny.architecture].split(), STEP]
    assert len(set(tiny.names)) == len(tiny.names)


def test_kinds_are_told_apart(tiny: Tiny) -> None:
    for component in inside_step(tiny.gated.components):
        prefix = component.name.partition(":")[0] if ":" in component.name else "residual"
        assert component.kind == prefix


def test_nested_components_are_those_computed_for_the_branch_only(tiny: Tiny) -> None:
    below = BELOW[tiny.architecture]
    for component in inside_step(tiny.gated.components):
        expected: tuple[str, ...] = ()
        if component.kind == "level":
            first, last = below[component.name]
            expected = tiny.names[tiny.names.index(first) : tiny.names.index(last) + 1]
        elif component.kind == "residual":
            inner = f"{component.name}.transformer_blocks."
            expected = tuple(name for name in tiny.names if name.startswith(inner))
        assert component.nested == expected, component.name


def test_rows_and_widths_follow_the_order(tiny: Tiny) -> None:
    offset = 0
    for index, component in enumerate(tiny.gated.components):
        in_tokens = ".transformer_blocks." in component.name
        assert (component.index, component.offset) == (index, offset)
        assert (component.axis, component.rank) == ((2, 3) if in_tokens else (1, 4))
        if component.kind != "step":
            assert component.channels in (8, 16)
        offset += component.channels
    assert tiny.gated.channels == offset


def test_step_is_the_edge_into_the_output(tiny: Tiny) -> None:
    step = tiny.gated.components[-1]
    out_channels: int = tiny.denoiser.config.out_channels  # type: ignore[assignment, union-attr]
    assert inside_step(tiny.gated.components)
    assert (step.index, step.offset) == (len(tiny.names) - 1, tiny.gated.channels - out_channels)
    assert (step.channels, step.axis, step.rank) == (out_channels, 1, 4)


def test_owner_is_the_module_that_joins(tiny: Tiny) -> None:
    for component in inside_step(tiny.gated.components):
        if component.kind == "residual":
            assert component.owner in (component.name, component.name.rpartition(".")[0])
        else:
            assert component.owner.startswith("up_blocks.")


def capture_block(compute: Callable[..., Any], **layers: nn.Module) -> tuple[Any, Capture]:
    """Capture a denoiser of one block."""
    torch.manual_seed(0)
    block = Block(compute, **layers)
    return block, capture(toy_denoiser(block))


def example_inputs() -> dict[str, Tensor]:
    """Make the inputs of a toy denoiser, with even sides, which every toy takes."""
    block = Block(lambda block, sample, timestep: pixel_shuffle(pixel_unshuffle(sample, 2), 2))
    return {item.name: item.example for item in denoiser_of(toy_denoiser(block)).inputs}


@torch.no_grad()
def run_without(captured: Capture, *removed: str) -> tuple[Tensor, Tensor]:
    """Run the gated graph without some components; return the sample and the output."""
    inputs = example_inputs()
    gates = torch.from_numpy(gate_values(captured.components, dict.fromkeys(removed, Treatment.DROP)))
    means = torch.zeros(sum(component.channels for component in captured.components))
    output: Tensor = captured.reference()(*inputs.values(), gates.expand(2, -1, -1), means)
    return inputs["sample"], output


def names_of(captured: Capture) -> list[str]:
    """Name all components but the step."""
    return [component.name for component in inside_step(captured.components)]


def conv(channels: int = 4, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, 3, stride, padding=1)


@pytest.mark.parametrize("branch_comes", ["first", "last"])
def test_branch_is_the_side_computed_from_the_other(branch_comes: str) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        branch = block.conv(sample)
        return branch + sample if branch_comes == "first" else sample + branch

    _, captured = capture_block(compute, conv=conv())
    assert names_of(captured) == ["body"]
    sample, output = run_without(captured, "body")
    assert torch.equal(output, sample)


@pytest.mark.parametrize("branch_comes", ["first", "last"])
def test_branch_is_the_side_that_is_not_linear(branch_comes: str) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        branch, trunk = block.conv(silu(sample)), block.shortcut(sample)
        return branch + trunk if branch_comes == "first" else trunk + branch

    block, captured = capture_block(compute, conv=conv(), shortcut=conv())
    sample, output = run_without(captured, *names_of(captured))
    torch.testing.assert_close(output, block.shortcut(sample))


@pytest.mark.parametrize("skip_comes", ["first", "last"])
def test_skip_is_the_part_the_other_was_computed_from(skip_comes: str) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        trunk = block.trunk(sample)
        return block.merge(torch.cat([sample, trunk] if skip_comes == "first" else [trunk, sample], dim=1))

    block, captured = capture_block(compute, trunk=conv(), merge=conv(8))
    level, component = inside_step(captured.components)
    assert (level.kind, component.kind) == ("level", "skip")  # nothing joins before it, so the whole trunk is a level
    sample, output = run_without(captured, component.name)
    trunk, nothing = block.trunk(sample), torch.zeros_like(sample)
    torch.testing.assert_close(
        output, block.merge(torch.cat([nothing, trunk] if skip_comes == "first" else [trunk, nothing], dim=1))
    )


def test_branches_may_leave_the_trunk_at_one_place() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        return sample + block.attention(silu(sample)) + block.feedforward(silu(sample))

    block, captured = capture_block(compute, attention=conv(), feedforward=conv())
    assert names_of(captured) == ["body.attention", "body.feedforward"]
    sample, output = run_without(captured, "body.attention")
    torch.testing.assert_close(output, sample + block.feedforward(silu(sample)))


def test_every_long_skip_of_tokens_ends_a_level() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        outer = block.enter(sample).flatten(2).transpose(1, 2)
        inner = outer + block.outer(silu(outer))
        tokens = inner + block.inner(silu(inner))
        tokens = block.first(torch.cat([tokens, inner], dim=-1))
        tokens = block.second(torch.cat([tokens, outer], dim=-1))
        return tokens.transpose(1, 2).reshape(sample.shape)

    layers = {"outer": nn.Linear(4, 4), "inner": nn.Linear(4, 4), "first": nn.Linear(8, 4), "second": nn.Linear(8, 4)}
    block, captured = capture_block(compute, enter=conv(), **layers)
    *below, high, skip = inside_step(captured.components)
    _, inner, low, near = below
    assert [component.kind for component in (low, near, high, skip)] == ["level", "skip", "level", "skip"]
    assert low.nested == (inner.name,)
    assert high.nested == tuple(component.name for component in below)
    sample, output = run_without(captured, high.name)
    tokens = block.enter(sample).flatten(2).transpose(1, 2)
    expected = block.second(torch.cat([torch.zeros_like(tokens), tokens], dim=-1))
    torch.testing.assert_close(output, expected.transpose(1, 2).reshape(sample.shape))


def test_a_text_stream_has_components_once_the_sample_joins_it() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        stream = block.embed(timestep[:, None])[:, :, None, None].expand(sample.shape)
        stream = stream + block.conv(silu(stream) * sample)
        return block.conv(stream)

    _, captured = capture_block(compute, conv=conv(), embed=nn.Linear(1, 4))
    assert names_of(captured) == ["body"]


def test_a_rotation_is_not_a_component() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        real, imaginary = sample.reshape(*sample.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return sample + block.conv(silu(sample * 0.6 + turned * 0.8))

    _, captured = capture_block(compute, conv=conv())
    assert names_of(captured) == ["body"]


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear", "transposed"])
def test_level_ends_where_the_trunk_comes_up(upsampling: str) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        low = block.down(sample)
        low = low + block.inner(low)
        return block.merge(torch.cat([block.up(low), sample], dim=1))

    up = (
        nn.ConvTranspose2d(4, 4, 2, stride=2)
        if upsampling == "transposed"
        else nn.Upsample(scale_factor=2, mode=upsampling)
    )
    block, captured = capture_block(compute, down=conv(stride=2), inner=conv(), up=up, merge=conv(8))
    inner, level, skip = inside_step(captured.components)
    assert (inner.kind, level.kind, skip.kind) == ("residual", "level", "skip")
    assert (inner.name, level.name) == ("body", "level:body.up")
    assert (inner.nested, level.nested, skip.nested) == ((), ("body",), ())
    sample, output = run_without(captured, level.name)
    torch.testing.assert_close(output, block.merge(torch.cat([torch.zeros_like(sample), sample], dim=1)))


def test_joins_of_one_module_are_named_after_their_branches() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        for layer in (block.attention, block.feedforward, block.feedforward):
            sample = sample + layer(sample)
        return sample

    _, captured = capture_block(compute, attention=conv(), feedforward=conv())
    assert names_of(captured) == ["body.attention", "body.feedforward", "body.feedforward#2"]


def test_what_knows_only_the_size_of_the_sample_is_not_a_component() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        embedding = block.embed(timestep[:, None])[:, :, None, None]
        hidden = block.conv(sample) + embedding
        hidden = hidden + embedding.expand(-1, -1, *hidden.shape[2:])
        return sample + silu(hidden + torch.ones_like(timestep)[:, None, None, None])

    _, captured = capture_block(compute, conv=conv(), embed=nn.Linear(1, 4))
    assert names_of(captured) == ["body"]
    sample, output = run_without(captured, "body")
    assert torch.equal(output, sample)


def test_without_the_step_nothing_is_predicted() -> None:
    _, captured = capture_block(lambda block, sample, timestep: sample + block.conv(sample), conv=conv())
    assert names_of(captured) == ["body"]
    sample, output = run_without(captured, STEP)
    assert torch.equal(output, torch.zeros_like(sample))


@pytest.mark.parametrize("case", ["nothing joins", "both sides linear", "neither side linear", "parts unrelated"])
def test_model_without_components_is_refused(case: str) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        left, right = block.left(sample), block.right(sample)
        if case == "both sides linear":
            return left + right
        if case == "neither side linear":
            return silu(left) + silu(right)
        if case == "parts unrelated":
            return block.merge(torch.cat([left, right], dim=1))
        return right

    with pytest.raises(ModelError, match="no component found in UNet2DModel"):
        capture_block(compute, left=conv(), right=conv(), merge=conv(8))


def test_other_classes_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"class Linear\. Supported: UNet2DModel, UNet2DConditionModel"):
        capture(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8},
            "UNet2DConditionModel with image_proj conditions",
        ),
        ({"addition_embed_type": "image", "encoder_hid_dim": 8}, "addition_embed_type 'image'"),
    ],
)
def test_conditions_that_are_not_supported_are_refused_by_name(config: Mapping[str, Any], message: str) -> None:
    denoiser = diffusers.UNet2DConditionModel(**ARCHITECTURES["added-kv"][1], **config)
    with pytest.raises(ModelError, match=message):
        capture(denoiser)


def test_hooks_and_patches_are_refused_by_name() -> None:
    denoiser = new_denoiser("attention")
    hook = denoiser.get_submodule("mid_block").register_forward_hook(lambda *values: None)
    with pytest.raises(ModelError, match="UNet2DModel has hooks on mid_block"):
        capture(denoiser)
    hook.remove()
    denoiser.get_submodule("up_blocks.0").b1 = 1.1  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"FreeU switched on \(up_blocks.0\)"):
        capture(denoiser)


@pytest.mark.parametrize("message", ["", "needs a label\nsecond line"])
def test_model_that_cannot_be_traced_is_refused_with_the_reason(message: str) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        if torch.compiler.is_exporting():
            raise NotImplementedError(message)
        return sample

    with pytest.raises(
        ModelError, match=r"cannot trace UNet2DModel: \S[^\n]*hooks, custom attention processors[^\n]*$"
    ):
        capture_block(compute)


@pytest.mark.parametrize("message", ["", "needs a label\nsecond line"])
def test_model_that_runs_nowhere_is_refused_before_the_trace(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        raise NotImplementedError(message)

    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("traced first"))
    with pytest.raises(ModelError, match=r"diffusers itself cannot run this UNet2DModel: \S[^\n]*$") as caught:
        capture_block(compute)
    assert "hooks" not in str(caught.value)


_SMALL: Mapping[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"dual_cross_attention": True}, id="dual cross-attention"),
        pytest.param(
            {
                "block_out_channels": (32, 32),
                "down_block_types": ("SkipDownBlock2D",) * 2,
                "up_block_types": ("SkipUpBlock2D",) * 2,
            },
            id="skip blocks",
        ),
        pytest.param(
            {
                "block_out_channels": (32, 64),
                "attention_head_dim": 16,
                "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
                "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
                "mid_block_type": None,
                "time_embedding_dim": 20,
            },
            id="width of the time embedding",
        ),
    ],
)
def test_a_unet_that_diffusers_cannot_run_is_refused_with_its_error(config: Mapping[str, Any]) -> None:
    denoiser = diffusers.UNet2DConditionModel(**{**_SMALL, **config})
    with pytest.raises(ModelError, match=r"diffusers itself cannot run this UNet2DConditionModel: \S"):
        capture(denoiser)


@pytest.mark.parametrize("runs", [True, False])
def test_examples_run_again_only_where_no_size_has_run(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    problem = denoisers._SizeTrial.problem
    monkeypatch.setattr(denoisers._SizeTrial, "problem", lambda trial: tried.append(trial) or problem(trial))

    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        if not runs and sample.shape[-1] < 8:
            raise ValueError("too small")
        return sample

    denoiser_of(toy_denoiser(Block(compute)))
    assert len(tried) == (0 if runs else 1)


def test_size_is_fixed_where_the_model_fixes_it() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        return sample + block.conv(silu(sample)) * block.places(torch.ones(1, 1)).reshape(1, 1, 8, 8)

    _, fixed = capture_block(compute, conv=conv(), places=nn.Linear(1, 64))
    assert fixed.sizes.only == (8, 8)
    (predicted,) = fixed.program.graph.output_node().args[0]
    assert tuple(predicted.meta["val"].shape[2:]) == (8, 8)  # the size it was trained for
    _, free = capture_block(lambda block, sample, timestep: sample + block.conv(sample), conv=conv())
    assert free.sizes.only is None


def test_capture_computes_the_model() -> None:
    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        return sample + block.conv(sample) * timestep[:, None, None, None]

    block, captured = capture_block(compute, conv=conv())
    inputs = example_inputs()
    _, output = run_without(captured)
    with torch.no_grad():
        torch.testing.assert_close(output, block(*inputs.values()))
    assert captured.inputs == tuple(inputs)
