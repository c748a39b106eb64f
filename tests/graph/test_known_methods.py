"""Known methods, written by hand as plans: DeepCache, Faster Diffusion, T-GATE, Adaptive Guidance and block caching.

Each plan is sampled and compared with the denoiser itself in torch, in the same sampling loop. There, hooks implement
the method as its paper describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import Tiny, relative_error, tiny_of
from tests.plans import plan_of
from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.plan import Assignment, Phase, Plan
from unetc.artifacts.profile import GUIDANCE, with_guidance
from unetc.backend import Array, Program
from unetc.call import CONTEXT, TIMESTEP
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.conditions import Conditions
from unetc.runtime.backends.onnxruntime import OnnxRuntimeHost
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.rollout import NonFiniteSteps, Rollout
from unetc.treatments import Treatment

STEPS = 9
HOLD = Treatment.HOLD
LIBRARIES_AGREE = 1e-4
"""Tolerance between torch and onnxruntime, as in test_law, but over nine steps."""


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    found = tiny_of("cross-attention", shared)
    found.inputs(batch=1, height=8, width=8)  # reads the signature now, because a model with hooks is refused
    return found


def plan_for(tiny: Tiny, assignments: Sequence[Mapping[str, Treatment]], phases: tuple[Phase, ...]) -> Plan:
    """Make a plan from assignments and phases."""
    return plan_of(with_emissions(assignments, tiny.gated.components), phases)


LEVELS = [float(step) for step in range(STEPS)]


def always(cycle: tuple[int, ...]) -> tuple[Phase, ...]:
    return (Phase(low=0.0, high=float(STEPS), cycle=cycle),)


def inputs_at(tiny: Tiny, step: int, sample: Array) -> dict[str, Array]:
    """Make the denoiser's inputs for a step; the text stays the same during sampling."""
    inputs = tiny.inputs(batch=len(sample), height=sample.shape[2], width=sample.shape[3], seed=7)
    return inputs | {SAMPLE: sample, TIMESTEP: np.full(len(sample), 900.0 - 100 * step, np.float32)}


def sample(tiny: Tiny, predict: Callable[[int, Mapping[str, Array]], Array]) -> Array:
    """Run a plain sampler for a few steps."""
    current = tiny.inputs(batch=2, height=8, width=12, seed=3)[SAMPLE]
    for step in range(STEPS):
        current = current - np.float32(0.2) * predict(step, inputs_at(tiny, step, current))
    return current


def sample_by_plan(tiny: Tiny, plan: Plan) -> Array:
    means = np.zeros(tiny.gated.channels, np.float32)
    engines = [tiny.load(specialise(tiny.gated, e.treatments, means, e.emits)) for e in plan.engines]
    schedule = plan.schedule(LEVELS)
    branches = BranchCache()

    def predict(step: int, inputs: Mapping[str, Array]) -> Array:
        timestep = float(inputs[TIMESTEP][0])
        output, emitted = tiny.run_on_device(
            engines[schedule[step]], {**inputs, **branches.inputs(timestep, rows=len(inputs[TIMESTEP]))}
        )
        branches.store(emitted, timestep)
        return output

    return sample(tiny, predict)


Hook = Callable[[int, Any, Any], Any]
"""Maps the step, a module's inputs and its output to the output that replaces it."""


def reusing(at: Callable[[int], bool]) -> Hook:
    """Return the last computed output at the selected steps."""
    kept: list[Any] = []

    def replace(step: int, _given: Any, output: Any) -> Any:
        if not at(step):
            kept[:] = [output]
        return kept[0]

    return replace


def reusing_branch(steps: Collection[int]) -> Hook:
    """Add the last computed branch to the input at some steps."""
    kept: list[Any] = []

    def replace(step: int, given: Any, output: Any) -> Any:
        if step not in steps:
            kept[:] = [output[0] - given[0]]
            return output
        return (given[0] + kept[0],)

    return replace


def sample_with_hooks(tiny: Tiny, hooks: Mapping[str, Hook]) -> Array:
    """Sample in torch, with hooks that replace the outputs of some modules."""
    now = 0

    def bind(hook: Hook) -> Callable[[torch.nn.Module, Any, Any], Any]:
        return lambda _module, given, output: hook(now, given, output)

    handles = [tiny.denoiser.get_submodule(name).register_forward_hook(bind(hook)) for name, hook in hooks.items()]

    def predict(step: int, inputs: Mapping[str, Array]) -> Array:
        nonlocal now
        now = step
        return tiny.run_denoiser(inputs)

    try:
        return sample(tiny, predict)
    finally:
        for handle in handles:
            handle.remove()


def check(tiny: Tiny, plan: Plan, reused: Mapping[str, Callable[[int], bool]]) -> None:
    """Check that plan and hooks produce the same samples and that reuse changes them."""
    hooks = {name: reusing(at) for name, at in reused.items()}
    by_plan, by_hooks = sample_by_plan(tiny, plan), sample_with_hooks(tiny, hooks)
    full = sample_with_hooks(tiny, {})
    assert relative_error(by_plan, by_hooks) < LIBRARIES_AGREE
    assert relative_error(by_plan, full) > 10 * LIBRARIES_AGREE


def test_deepcache(tiny: Tiny) -> None:
    """Ma et al. 2023, arXiv:2312.00858: the deep branch is computed at one of N steps."""
    level = next(c.name for c in tiny.gated.components if c.kind == "level" and "upsamplers" in c.name)
    plan = plan_for(tiny, [{}, {level: HOLD}], always((0, 1, 1)))
    check(tiny, plan, {"up_blocks.0.upsamplers.0": lambda step: step % 3 > 0})


def test_faster_diffusion(tiny: Tiny) -> None:
    """Li et al. 2023, arXiv:2312.09608: the encoder is skipped between key steps, the decoder runs at every step."""
    skips = [c.name for c in tiny.gated.components if c.kind == "skip"]
    lowest = next(c.name for c in tiny.gated.components if c.kind == "level")
    plan = plan_for(tiny, [{}, dict.fromkeys([*skips, lowest], HOLD)], always((0, 1)))
    means = np.zeros(tiny.gated.channels, np.float32)
    holding = specialise(tiny.gated, plan.engines[1].treatments, means)
    used = {tiny.parameters[weight] for weight in holding.weights}
    assert not [name for name in used if name.startswith(("conv_in", "down_blocks", "mid_block"))]
    encoder = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block"]
    check(tiny, plan, {name: lambda step: step % 2 > 0 for name in encoder})


def test_tgate(tiny: Tiny) -> None:
    """Liu et al. 2024, arXiv:2404.02747: from the gate step on, cross-attention repeats its last output."""
    gate = 4
    cross = [c for c in tiny.gated.components if c.name.endswith("attn2")]
    assert cross
    phases = (Phase(low=0.0, high=float(gate), cycle=(0,)), Phase(low=float(gate), high=float(STEPS), cycle=(1,)))
    plan = plan_for(tiny, [{}, {c.name: HOLD for c in cross}], phases)
    assert plan.schedule(LEVELS) == (0,) * gate + (1,) * (STEPS - gate)
    check(tiny, plan, {c.name: lambda step: step >= gate for c in cross})


SCALE = 4.0


def sample_guided_by_plan(tiny: Tiny, assignments: Sequence[Mapping[str, Treatment]], phases: tuple[Phase, ...]) -> Any:
    """Sample with guidance through a rollout; return the samples and the rows of every engine call."""
    engines = with_emissions(assignments, with_guidance(tiny.gated.components))
    means, rows = np.zeros(tiny.gated.channels, np.float32), []

    def counting(engine: Assignment) -> Program:
        emits = [name for name in engine.emits if name != GUIDANCE]
        program = tiny.load(specialise(tiny.gated, engine.in_graph, means, emits))

        def run(inputs: Mapping[str, Any], output: Array) -> Mapping[str, Any]:
            rows.append(len(output))
            return program(inputs, output)

        return run

    programs = [counting(engine) for engine in engines]
    rollout = Rollout(
        programs,
        programs[0],
        predicted_channels=tiny.gated.predicted_channels,
        plan=plan_of(engines, phases),
        device=OnnxRuntimeHost(),
        non_finite_steps=NonFiniteSteps(),
    )

    def predict(step: int, inputs: Mapping[str, Array]) -> Array:
        negative, own = both_conditions(tiny, len(inputs[SAMPLE]))
        conditions = Conditions(own={CONTEXT: own}, negative={CONTEXT: negative}, scale=SCALE, device=OnnxRuntimeHost())
        predicted: Array = rollout.predict(inputs[SAMPLE], float(inputs[TIMESTEP][0]), LEVELS[step], conditions)
        return predicted

    return sample(tiny, predict), rows


def both_conditions(tiny: Tiny, batch: int) -> tuple[Array, Array]:
    """Draw negative conditions and the samples' own."""
    drawn = tiny.inputs(batch=2 * batch, height=8, width=8, seed=11)[CONTEXT]
    return drawn[:batch], drawn[batch:]


def sample_guided_with_hooks(tiny: Tiny, gate: int, hooks: Mapping[str, Hook]) -> Array:
    """Sample in torch: two calls and guidance before the gate step, one call with the samples' own conditions after."""
    now = 0

    def bind(hook: Hook) -> Callable[[torch.nn.Module, Any, Any], Any]:
        return lambda _module, given, output: hook(now, given, output)

    def predict(step: int, inputs: Mapping[str, Array]) -> Array:
        nonlocal now
        now = step
        negative, own = both_conditions(tiny, len(inputs[SAMPLE]))
        first = tiny.run_denoiser({**inputs, CONTEXT: negative}) if step < gate else None
        second = tiny.run_denoiser({**inputs, CONTEXT: own})
        return second if first is None else first + np.float32(SCALE) * (second - first)

    handles = [tiny.denoiser.get_submodule(name).register_forward_hook(bind(hook)) for name, hook in hooks.items()]
    try:
        return sample(tiny, predict)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("gates_attention", [True, False], ids=["T-GATE", "Adaptive Guidance"])
def test_methods_that_end_guidance(tiny: Tiny, gates_attention: bool) -> None:
    """Both guide until a step, and then call the denoiser with the samples' own conditions alone.

    T-GATE (Liu et al. 2024, arXiv:2404.02747) also repeats the last output of cross-attention from there on: here the
    one with the samples' own conditions, in the paper its mean with the negative ones. Adaptive Guidance (Castillo et
    al. 2023, arXiv:2312.12487) chooses the step for every sample; here it is the same for all.
    """
    gate = 4
    cross = [c.name for c in tiny.gated.components if c.name.endswith("attn2")] if gates_attention else []
    phases = (Phase(low=0.0, high=float(gate), cycle=(0,)), Phase(low=float(gate), high=float(STEPS), cycle=(1,)))
    late = {GUIDANCE: Treatment.DROP, **dict.fromkeys(cross, HOLD)}
    by_plan, rows = sample_guided_by_plan(tiny, [{}, late], phases)
    hooks = {name: reusing(lambda step: step >= gate) for name in cross}
    assert relative_error(by_plan, sample_guided_with_hooks(tiny, gate, hooks)) < LIBRARIES_AGREE
    assert relative_error(by_plan, sample_guided_with_hooks(tiny, STEPS, {})) > 10 * LIBRARIES_AGREE
    assert rows == [4] * gate + [2] * (STEPS - gate)


def test_block_caching(tiny: Tiny) -> None:
    """Wimbauer et al. 2023, arXiv:2312.03209: every block has its own schedule."""
    transformers = sorted(
        {c.owner.rsplit(".transformer_blocks", 1)[0] for c in tiny.gated.components if ".transformer_blocks" in c.owner}
    )
    assert len(transformers) >= 2
    held = [[c.name for c in tiny.gated.components if c.owner == owner] for owner in transformers[:2]]
    assert all(held)
    first, second = (dict.fromkeys(names, HOLD) for names in held)
    plan = plan_for(tiny, [{}, first, second, {**first, **second}], always((0, 3, 1, 2)))
    schedule = plan.schedule(LEVELS)
    assert schedule[:5] == (0, 3, 1, 2, 0)
    # the hook replaces a transformer's residual branch: the module's output minus its input
    by_plan = sample_by_plan(tiny, plan)
    by_hooks = sample_with_hooks(
        tiny, dict(zip(transformers[:2], map(reusing_branch, [{1, 2, 5, 6}, {1, 3, 5, 7}]), strict=True))
    )
    assert relative_error(by_plan, by_hooks) < LIBRARIES_AGREE
    assert relative_error(by_plan, sample_with_hooks(tiny, {})) > 10 * LIBRARIES_AGREE


def test_a_start_in_the_middle_computes_what_it_would_hold(tiny: Tiny) -> None:
    """Start like image to image: no branch is held at the first step, so the full engine runs there."""
    cross = {c.name: HOLD for c in tiny.gated.components if c.name.endswith("attn2")}
    phases = (Phase(low=0.0, high=4.0, cycle=(0,)), Phase(low=4.0, high=float(STEPS), cycle=(1,)))
    plan = plan_for(tiny, [{}, cross], phases)
    assert plan.schedule(LEVELS[5:]) == (0, 1, 1, 1)
    assert CONTEXT in tiny.inputs(batch=1, height=8, width=8)
