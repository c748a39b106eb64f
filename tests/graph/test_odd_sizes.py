"""Heights and widths that no level divides: computed as diffusers computes them, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import models
from tests.every_day import every_nth, examples
from tests.graph import test_law, test_law_of_reuse
from tests.models import CONTEXT_WIDTH, Tiny, condition_well, relative_error, tiny_of
from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.sizes import SampleSizes
from unetc.backend import Program
from unetc.call import CONTEXT, TIMESTEP
from unetc.compiler.graph.denoisers.denoiser import denoiser_of
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.tensorrt.shapes import resolve
from unetc.controlnet import controlnet_inputs
from unetc.nvidia.sizes import Range, Sizes
from unetc.runtime.backends.registry import open_backend
from unetc.treatments import COMPUTED, HELD, Treatment

diffusers: Any = untyped_diffusers

SIDES = st.integers(5, 40)
SOME = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16)


@pytest.fixture(scope="module", params=["cross-attention", pytest.param("four-levels", marks=pytest.mark.nightly)])
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


# D1
@pytest.mark.parametrize(("height", "width"), [(20, 28), (5, 40), (33, 8), (7, 9), (3, 2), (1, 1), (24, 16)])
def test_a_conditional_unet_computes_every_size_as_diffusers_does(tiny: Tiny, height: int, width: int) -> None:
    inputs = tiny.inputs(batch=2, height=height, width=width)
    engine = tiny.load(specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32)))
    assert tiny.gated.sizes == SampleSizes(multiple=1)
    assert relative_error(tiny.run(engine, inputs), tiny.run_denoiser(inputs)) < 1e-5


@pytest.mark.nightly
@settings(max_examples=10)
@given(data=st.data())
def test_an_engine_computes_what_the_gated_graph_computes_at_any_size(tiny: Tiny, data: st.DataObject) -> None:
    case = data.draw(test_law.cases(tiny, st.integers(1, 40)))
    assignment = case.assignments[0]
    engine = tiny.load(specialise(tiny.gated, assignment, case.means()))
    expected = tiny.run(tiny.program, case.gated_inputs())
    assert relative_error(tiny.run(engine, case.inputs())[0], expected[0]) < test_law.ENGINES_AGREE


@settings(max_examples=examples(5, at_night=10))
@given(data=st.data())
def test_branches_are_reused_at_any_size(tiny: Tiny, data: st.DataObject) -> None:
    treatments = [Treatment.KEEP, Treatment.HOLD, Treatment.FORECAST, Treatment.DROP]
    drawn = st.lists(st.sampled_from(treatments), min_size=len(tiny.names), max_size=len(tiny.names))
    assignment = {
        name: one for name, one in zip(tiny.names, data.draw(drawn), strict=True) if one is not Treatment.KEEP
    }
    size = (data.draw(st.integers(1, 2)), data.draw(SIDES), data.draw(SIDES))
    means = np.zeros(tiny.gated.channels, np.float32)
    test_law_of_reuse.check_sequence(tiny, [{}, assignment], [0, 0, 1, 0, 1], size, means)


@pytest.fixture(scope="module")
def emitting(tiny: Tiny) -> Program:
    """Load an engine that emits all branches."""
    return tiny.load(specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32), tiny.names))


@pytest.fixture(scope="module")
def signature(tiny: Tiny) -> dict[str, list[str | int]]:
    """Read the shapes of the sample and of all held branches, as the graph states them."""
    graph = onnx.load_from_string(tiny.gated.remembering().graph).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
        if value.name.startswith(HELD) or value.name == SAMPLE
    }


@settings(max_examples=30)
@given(height=SIDES, width=SIDES)
def test_engines_for_nvidia_know_the_shapes_of_branches_at_any_size(
    tiny: Tiny, emitting: Program, signature: dict[str, list[str | int]], height: int, width: int
) -> None:
    _, emitted = tiny.run_emitting(emitting, tiny.inputs(batch=2, height=height, width=width))
    sizes = Sizes(batch=one(2), height=one(height), width=one(width))
    for name, (shape, *_) in resolve(signature, sizes, {}).items():
        if name != SAMPLE:
            assert shape == emitted[name.replace(HELD, COMPUTED)].shape, name


def one(size: int) -> Range:
    return Range(least=size, usual=size, most=size)


@pytest.fixture(scope="module")
def with_control() -> Any:
    """Capture a UNet of four levels with ControlNet inputs."""
    from unetc.compiler.graph.capture import capture

    model = models.new_denoiser("four-levels")
    return model, capture(model, controlnet=True)


@pytest.mark.nightly
@pytest.mark.parametrize(("height", "width"), [(20, 28), (16, 16), (7, 33)])
@torch.no_grad()
def test_controlnet_inputs_fit_every_size(
    with_control: Any, tmp_path_factory: pytest.TempPathFactory, height: int, width: int
) -> None:
    from unetc.compiler.graph.gated import open_or_build

    model, captured = with_control
    gated = open_or_build(tmp_path_factory.getbasetemp() / "odd-control", lambda: captured)
    rng = np.random.default_rng(height)
    inputs = {
        SAMPLE: rng.standard_normal((2, 4, height, width), dtype=np.float32),
        TIMESTEP: np.array([20.0, 700.0], np.float32),
        CONTEXT: rng.standard_normal((2, 7, CONTEXT_WIDTH), dtype=np.float32),
    }
    extra = {
        own.name: rng.standard_normal(own.shape(2, height, width), dtype=np.float32)
        for own in controlnet_inputs(model.config)
    }
    *down, middle = map(torch.from_numpy, extra.values())
    expected = model(
        **{name: torch.from_numpy(value) for name, value in inputs.items()},
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample.numpy()
    engine = specialise(gated, {}, np.zeros(gated.channels, np.float32))
    program = open_backend("onnxruntime:cpu", threads=1).open_weights(gated.weights.read_bytes()).load(engine)
    actual = np.full_like(expected, np.nan)
    program({**inputs, **extra}, actual)
    assert relative_error(actual, expected) < 1e-5


CONDITIONAL = {
    "DownBlock2D": "UpBlock2D",
    "CrossAttnDownBlock2D": "CrossAttnUpBlock2D",
    "SimpleCrossAttnDownBlock2D": "SimpleCrossAttnUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
    "KDownBlock2D": "KUpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
}
UNCONDITIONAL = {
    "DownBlock2D": "UpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
    "SkipDownBlock2D": "SkipUpBlock2D",
    "AttnSkipDownBlock2D": "AttnSkipUpBlock2D",
}
"""Blocks of diffusers that halve, with their counterparts."""


def unet(conditional: bool, down: str, **changes: Any) -> torch.nn.Module:
    up = (CONDITIONAL if conditional else UNCONDITIONAL)[down]
    config = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **({"cross_attention_dim": CONTEXT_WIDTH} if conditional else {}),
        "block_out_channels": (64, 64, 64) if down.startswith("K") else (32, 32, 32),
        "layers_per_block": 2,
        "down_block_types": (down, down, down if down.startswith("K") else "DownBlock2D"),
        "up_block_types": (up if up.startswith("K") else "UpBlock2D", up, up),
        **changes,
    }
    model: torch.nn.Module = getattr(diffusers, "UNet2DConditionModel" if conditional else "UNet2DModel")(**config)
    condition_well(model, seed=0)
    return model.eval()


@pytest.mark.parametrize(
    ("conditional", "down", "changes"),
    every_nth(
        3,
        [
            *((True, down, {}) for down in CONDITIONAL),
            *((False, down, {}) for down in UNCONDITIONAL),
            (False, "DownBlock2D", {"downsample_type": "resnet", "upsample_type": "resnet"}),
            (False, "DownBlock2D", {"downsample_padding": 0}),
            (True, "DownBlock2D", {"downsample_padding": 0}),
        ],
    ),
)
@torch.no_grad()
def test_the_rule_of_sizes_is_what_diffusers_can_compute(conditional: bool, down: str, changes: dict[str, Any]) -> None:
    try:
        model = unet(conditional, down, **changes)
    except (ValueError, TypeError, AttributeError) as error:
        pytest.skip(f"diffusers has no such UNet: {error}")
    denoiser = denoiser_of(model)
    sizes, (_, *examples) = denoiser.sizes, [item.example for item in denoiser.inputs]

    def fits(side: int) -> bool:
        sample = torch.randn(2, 3, side, 16)
        try:
            return bool(denoiser(sample, *examples).shape == sample.shape)
        except (RuntimeError, ValueError, ZeroDivisionError):
            return False

    allowed = {side for side in SOME if sizes.problem(side, 16) is None}
    assert {side for side in SOME if fits(side)} >= allowed >= {8, 12, 16}, sizes
    assert sizes.multiple == 1 or not all(fits(sizes.multiple // 2 * odd) for odd in (3, 5))
    assert sizes.smallest == sizes.multiple or not fits(sizes.smallest - sizes.multiple)


def test_the_message_names_the_sides_and_the_nearest_that_work() -> None:
    sizes = SampleSizes(multiple=8)
    assert sizes.problem(16, 40) is None
    assert sizes.problem(20, 24) == (
        "the denoiser cannot take samples of height 20 and width 24. Expected multiples of 8. Nearest: height 16 or 24."
    )
    assert "multiples of 2 from 4. Nearest: height 4 or 6." in str(SampleSizes(multiple=2, smallest=4).problem(2, 4))
    assert "Nearest: height 8 and width 24 or 32" in str(sizes.problem(3, 31))
    assert "multiples of 2 up to 12. Nearest: width 12" in str(SampleSizes(multiple=2, largest=12).problem(12, 14))
    assert SampleSizes(multiple=1, only=(8, 8)).problem(8, 8) is None
    assert str(SampleSizes(multiple=1, only=(8, 8)).problem(8, 16)).endswith(
        "its size is fixed. Expected height 8 and width 8."
    )
