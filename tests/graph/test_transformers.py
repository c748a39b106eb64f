"""Transformers of diffusers are captured, split into components, specialised and sampled like UNets.

One test covers a whole class, because tracing takes most of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import onnx
import pytest
import torch

from tests.models import TRANSFORMERS, Tiny, new_denoiser, relative_error
from tests.pipeline_calls import predict
from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.profile import STEP
from unetc.backend import Array
from unetc.call import TIMESTEP
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.errors import ModelError
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise
from unetc.treatments import COMPUTED, HELD, Treatment

pytestmark = pytest.mark.nightly

diffusers: Any = untyped_diffusers

KEEP, DROP, MEAN, HOLD = Treatment.KEEP, Treatment.DROP, Treatment.MEAN, Treatment.HOLD

EXPECTED: Mapping[str, str] = {
    "dit": """
        transformer_blocks.0.attn1
        transformer_blocks.0.ff
        transformer_blocks.1.attn1
        transformer_blocks.1.ff
    """,
    "pixart": """
        transformer_blocks.0.attn1
        transformer_blocks.0.attn2
        transformer_blocks.0.ff
        transformer_blocks.1.attn1
        transformer_blocks.1.attn2
        transformer_blocks.1.ff
    """,
    # The text stream has its own joins: to_add_out and ff_context.
    "sd3": """
        transformer_blocks.0.attn.to_out
        transformer_blocks.0.attn2
        transformer_blocks.0.ff
        transformer_blocks.0.attn.to_add_out
        transformer_blocks.0.ff_context
        transformer_blocks.1.attn
        transformer_blocks.1.ff
    """,
    # The attention and MLP of a single-stream block form one branch.
    "flux": """
        transformer_blocks.0.attn.to_out
        transformer_blocks.0.ff
        transformer_blocks.0.attn.to_add_out
        transformer_blocks.0.ff_context
        single_transformer_blocks.0
        single_transformer_blocks.1
    """,
    "hunyuan": """
        blocks.0.attn1
        blocks.0.attn2
        blocks.0.ff
        blocks.1.attn1
        blocks.1.attn2
        blocks.1.ff
        blocks.2.attn1
        blocks.2.attn2
        blocks.2.ff
        level:blocks.2
        skip:blocks.0→blocks.3
        blocks.3.attn1
        blocks.3.attn2
        blocks.3.ff
    """,
}
"""Names of all components but the step, in the order they are computed."""

NESTED: Mapping[str, tuple[str, ...]] = {
    "transformer_blocks.1.attn": ("transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.ff_context"),
    "level:blocks.2": tuple(f"blocks.{block}.{part}" for block in (1, 2) for part in ("attn1", "attn2", "ff")),
}
"""Nested components by the name of the outer one; all other components have none."""

FIXED_SIZE = ("dit", "hunyuan")
"""Architectures whose positions fit one size only."""

LIBRARIES_AGREE = 2e-6
"""Tolerance between torch and onnxruntime."""

ENGINES_AGREE = 1e-5
"""Tolerance within onnxruntime, as in test_law."""

SAMPLED = 3
"""One component in three gets its own engine; loading these takes as long as the rest of the test."""

MATTERS = 1e-3
"""Least effect of a part, far above rounding; the text stream has little effect in the last blocks."""


NAMES: Mapping[str, str] = {
    "dit": "DiT",
    "pixart": "PixArt",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "hunyuan": "Hunyuan-DiT (long skips)",
}


@pytest.mark.shows("capture", "export", "law", "sample")
@pytest.mark.parametrize(
    "architecture", [pytest.param(own, marks=pytest.mark.architecture(NAMES[own])) for own in TRANSFORMERS]
)
def test_transformer(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture, tmp_path)
    check_components(tiny)
    check_whole(tiny)
    check_law(tiny)
    check_sampling(tiny)


def check_components(tiny: Tiny) -> None:
    assert list(tiny.names) == [*EXPECTED[tiny.architecture].split(), STEP]
    assert (tiny.gated.sizes.only is None) == (tiny.architecture not in FIXED_SIZE)
    for component in tiny.gated.components[:-1]:
        assert (component.axis, component.rank) == (2, 3)
        assert component.nested == NESTED.get(component.name, ())


def check_whole(tiny: Tiny) -> None:
    """Check with nothing removed that the denoiser equals the engine and the gated graph in torch and in ONNX."""
    sizes = [(8, 8)] if tiny.architecture in FIXED_SIZE else [(8, 8), (4, 8)]
    means = np.zeros(tiny.gated.channels, np.float32)
    full = tiny.load(specialise(tiny.gated, {}, means))
    for height, width in sizes:
        inputs = tiny.inputs(batch=3, height=height, width=width, tokens=5 if height == width else 4)
        expected = predict(tiny, inputs)
        gates = np.repeat(gate_values(tiny.gated.components, {})[None], 3, axis=0)
        gated = inputs | {GATES: gates, MEANS: means}
        for output in (tiny.run_reference(gated), tiny.run(tiny.program, gated), tiny.run(full, inputs)):
            assert relative_error(output, expected) < LIBRARIES_AGREE


def check_law(tiny: Tiny) -> None:
    """Check each component removed alone and a few random assignments, some of them with engines too."""
    rng = np.random.default_rng(0)
    assignments: list[dict[str, Treatment]] = [{}, *({name: DROP} for name in tiny.names)]
    for treatments in ((KEEP, DROP, MEAN), (KEEP, KEEP, KEEP, MEAN), (DROP, MEAN)):
        drawn = rng.choice(np.array(treatments, dtype=object), len(tiny.names) - 1)
        assignments.append({name: t for name, t in zip(tiny.names, drawn, strict=False) if t is not KEEP})
    means = 0.5 * rng.standard_normal(tiny.gated.channels, dtype=np.float32)
    one = tiny.inputs(batch=1, height=8, width=8)
    rows = {name: np.repeat(array, len(assignments), axis=0) for name, array in one.items()}
    gates = np.stack([gate_values(tiny.gated.components, assignment) for assignment in assignments])
    expected = tiny.run(tiny.program, rows | {GATES: gates, MEANS: means})
    reference = tiny.run_reference(rows | {GATES: gates, MEANS: means})
    assert relative_error(reference, expected) < LIBRARIES_AGREE
    path = tiny.gated.folder / "engine.onnx"  # in the folder of its weights
    for assignment, row in zip(assignments, expected, strict=True):
        assert (relative_error(row, expected[0]) > MATTERS) is bool(assignment), assignment
    for assignment, row in list(zip(assignments, expected, strict=True))[::-SAMPLED]:
        engine = specialise(tiny.gated, assignment, means)
        path.write_bytes(engine.graph)
        onnx.checker.check_model(path, full_check=True)
        assert relative_error(tiny.run(tiny.load(engine), one)[0], row) < ENGINES_AGREE, assignment
    everything = tiny.load(specialise(tiny.gated, {}, means, tiny.names))
    full, emitted = tiny.run_emitting(everything, one)
    for component in tiny.gated.components[::-SAMPLED]:
        holding = tiny.load(specialise(tiny.gated, {component.name: HOLD}, means))
        branch = emitted[f"{COMPUTED}{component.index}"]
        output = tiny.run(holding, one | {f"{HELD}{component.index}": branch})
        assert relative_error(output, full) < ENGINES_AGREE, component.name


def check_sampling(tiny: Tiny) -> None:
    """Sample a plan of one phase: the second step drops the first component, and the third holds the last."""
    flow = tiny.architecture in ("sd3", "flux")
    name = "flow-euler" if flow else "ddim"
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else diffusers.DDIMScheduler(clip_sample=False)
    scheduler = make_scheduler(name, own.config)
    first, last = tiny.names[0], tiny.names[-2]
    engines = with_emissions([{}, {first: DROP}, {last: HOLD}], tiny.gated.components)
    means = np.zeros(tiny.gated.channels, np.float32)
    drawn = tiny.inputs(batch=2, height=8, width=8)
    session = Session(
        plan=plan_of(engines, [Phase(low=-40.0, high=40.0, cycle=tuple(range(len(engines))))]),
        full=tiny.load(specialise(tiny.gated, {}, means)),
        programs=[tiny.load(specialise(tiny.gated, engine.treatments, means, engine.emits)) for engine in engines],
        scheduler=extract_all(scheduler, name, (3,)),
        sample_shape=(4, 8, 8),
        steps=3,
        predicted_channels=tiny.gated.predicted_channels,
        conditions=Conditions(own={key: value for key, value in drawn.items() if key not in (SAMPLE, TIMESTEP)}),
    )
    expected = sample_diffusers(tiny, scheduler, session.conditions)
    assert relative_error(session.sample(2, seed=1, full_model=True), expected) < LIBRARIES_AGREE
    planned: list[int] = []
    sampled = session.sample(2, seed=1, on_step=lambda step: planned.append(step.engine))
    assert planned == [0, 1, 2]
    assert relative_error(sampled, expected) > 1e-3


def sample_diffusers(tiny: Tiny, scheduler: Any, conditions: Conditions) -> Array:
    """Sample three steps with the diffusers scheduler itself."""
    scheduler.set_timesteps(3)
    sample = torch.from_numpy(initial_noise(1, range(2), (4, 8, 8)))
    for timestep in scheduler.timesteps:
        prediction = predict(tiny, conditions.widen(sample.numpy(), float(timestep)))[:, :4]
        sample = scheduler.step(torch.from_numpy(prediction), timestep, sample).prev_sample
    output: Array = sample.numpy()
    return output


def test_attention_that_is_computed_in_another_way_is_refused_by_name() -> None:
    denoiser: Any = new_denoiser("sd3")
    denoiser.fuse_qkv_projections()
    with pytest.raises(ModelError, match=r"SD3Transformer2DModel.*FusedJointAttnProcessor2_0 \(transformer_blocks\.0"):
        capture(denoiser)


def test_flux_that_takes_an_image_beside_the_noise_is_refused() -> None:
    config = {**TRANSFORMERS["flux"][1], "in_channels": 32, "out_channels": 16}
    with pytest.raises(ModelError, match="32 channels in and 16 out"):
        capture(diffusers.FluxTransformer2DModel(**config))


def test_a_transformer_of_tokens_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"UVit2DModel: it predicts tokens"):
        capture(type("UVit2DModel", (torch.nn.Module,), {})())
