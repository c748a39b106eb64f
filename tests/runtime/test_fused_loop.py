"""The fused loop computes the same as the plain loop; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import unetc
from tests.every_day import every_nth, examples
from tests.plans import plan_of
from unetc.artifacts import Assignment, Phase
from unetc.backend import Program
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.device import Array
from unetc.errors import NonFiniteError, SessionError
from unetc.runtime.backends import fused_loop
from unetc.runtime.backends.fused_loop import FusedLoop, agrees, can_fuse
from unetc.runtime.backends.torch_device import TorchDevice
from unetc.runtime.bundle import Bundle
from unetc.runtime.loop import Loop, PlainLoop, Start, begin
from unetc.runtime.session import Session, Step
from unetc.sampler.noise import initial_noise, step_noise
from unetc.sampler.table import SchedulerTable, SchedulerTables
from unetc.treatments import Treatment

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": True,
}
LEARNED = {"variance_type": "learned_range"}
STEPS = 9
SHAPE = (3, 25, 8)
"""600 elements, so that a sample has more than one block, the last of them not full."""
ROUNDING = 5e-5
"""Tolerance relative to the largest number. Multiplications and additions are fused, a GPU approximates exponential and
square root, and 9 steps add up their rounding errors; most of it with guidance, which takes differences. In the
interpreter the error is 1e-6."""


class Fused(TorchDevice):
    """A device whose loops are always fused, on the CPU too."""

    def __init__(self) -> None:
        super().__init__(PLACE)
        self._fuses = True
        self.puts = 0

    def put(self, array: Any) -> torch.Tensor:
        self.puts += 1
        return super().put(array)


class Unfused(TorchDevice):
    """A device without a kernel."""

    def __init__(self) -> None:
        super().__init__(PLACE)

    def fused_loop(self, start: Start) -> Loop | None:
        return None


DEVICE = Fused()


def start_of(table: SchedulerTable, *, guided: bool = False, learned: bool = False, batch: int = 2) -> Start:
    random = np.random.default_rng(3)
    own, negative = random.standard_normal((2, batch, 5), np.float32)
    conditions = Conditions(
        own={"text": own}, negative={"text": negative} if guided else {}, scale=3.0 if guided else 1
    )
    return Start(
        table=table,
        noise=initial_noise(0, range(batch), SHAPE),
        conditions=conditions,
        seed=2**63 + 2**33 + 5,
        indices=[2**64 - 1, 2**34 + 1][:batch],
        predicted_channels=SHAPE[0] * (2 if learned else 1),
    )


def denoise(inputs: Any, prediction: torch.Tensor) -> None:
    """Compute a nonlinear function of all inputs, and a variance between -1 and 1 if it is wanted."""
    text = inputs["text"].mean(1) if "text" in inputs else torch.zeros(len(prediction), device=PLACE)
    shift = inputs["timestep"] / 1000 + text
    once = torch.tanh(1.3 * inputs["sample"] + shift[:, None, None, None])
    prediction.copy_(once.repeat(1, prediction.shape[1] // once.shape[1], 1, 1))


def run(loop: Loop, steps: int, first: int = 0) -> list[Array]:
    """Make all steps from the first; return the sample input of every engine call, and the last samples."""
    seen = []
    for step in range(first, steps):
        inputs, prediction = loop.call(step)
        seen.append(DEVICE.to_array(inputs["sample"]))
        denoise(inputs, prediction)
        loop.advance(step)
        assert loop.is_finite(step)
    return [*seen, DEVICE.to_array(loop.sample)]


def check_alike(start: Start, rounding: float = ROUNDING) -> None:
    fused, plain = begin(start, DEVICE), PlainLoop(start, DEVICE)
    assert isinstance(fused, FusedLoop)
    inputs, plain_inputs = fused.call(0)[0], plain.call(0)[0]
    assert {name: tensor.shape for name, tensor in inputs.items()} == {
        name: tensor.shape for name, tensor in plain_inputs.items()
    }
    for got, expected in zip(run(fused, start.table.steps), run(plain, start.table.steps), strict=True):
        assert np.abs(got - expected).max() <= rounding * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "changes", "guided"),
    every_nth(
        5,
        [("ddim", {}), ("ddpm", {}), ("ddpm", LEARNED), ("ddim", LEARNED), ("euler", {}), ("dpmsolver++", {})],
        [False, True],
    ),
)
def test_a_fused_trajectory_is_the_plain_one(name: str, changes: dict[str, Any], guided: bool) -> None:
    table = extract(make_scheduler(name, CONFIG | changes), STEPS)
    check_alike(start_of(table, guided=guided, learned=bool(changes)))


@pytest.mark.parametrize(("name", "first"), every_nth(5, ["ddim", "ddpm", "euler-ancestral", "dpmsolver++"], [1, 2, 3]))
def test_a_fused_trajectory_from_an_image_is_the_plain_one(name: str, first: int) -> None:
    table = extract(make_scheduler(name, CONFIG), STEPS)
    start = start_of(table, guided=True)
    start = replace(
        start, table=table.starting_at(first), image=initial_noise(7, range(len(start.noise)), SHAPE), first=first
    )
    fused, plain = begin(start, DEVICE), PlainLoop(start, DEVICE)
    assert isinstance(fused, FusedLoop)
    assert agrees(FusedLoop(start, DEVICE, PLACE), PlainLoop(start, DEVICE))
    for got, expected in zip(run(fused, STEPS, first), run(plain, STEPS, first), strict=True):
        assert np.abs(got - expected).max() <= ROUNDING * max(1.0, np.abs(expected).max())


@settings(max_examples=12)  # the interpreter takes a tenth of a second for a step
@given(st.data())
def test_any_table_is_fused_as_it_is_computed(data: st.DataObject) -> None:
    steps, window = data.draw(st.integers(1, 6), label="steps"), data.draw(st.integers(1, 4), label="window")
    number = st.floats(-1, 1, width=32)

    def vector(values: st.SearchStrategy[float] = number) -> np.ndarray:
        return np.array(data.draw(st.lists(values, min_size=steps, max_size=steps)))

    def matrix() -> np.ndarray:
        rows = np.array([vector() for _ in range(window)]).T / window
        rows[np.arange(window) > np.arange(steps)[:, None]] = 0.0
        return rows

    table = SchedulerTable(
        timesteps=np.linspace(900, 100, steps, dtype=np.float32),
        log_snr=np.linspace(-5, 5, steps),
        signal=np.ones(steps),
        input_scale=vector(st.floats(0.5, 2)),
        initial_scale=1.5,
        denoised_sample=vector(),
        denoised_prediction=vector(),
        denoised_coefficient=vector(),
        clip=data.draw(st.sampled_from([0.3, 1.0, np.inf]), label="clip"),
        sample_coefficients=matrix(),
        prediction_coefficients=matrix(),
        noise_coefficient=vector(),
        variance_low=vector(),
        variance_high=vector(),
        start_sample=np.zeros(steps),
        start_prediction=np.zeros(steps),
    )
    learned = bool(table.variance_low.any() or table.variance_high.any()) or data.draw(st.booleans(), label="learned")
    batch = data.draw(st.integers(1, 2), label="batch")
    check_alike(start_of(table, guided=data.draw(st.booleans(), label="guided"), learned=learned, batch=batch))


def test_noise_of_the_kernel_is_that_of_the_process() -> None:
    nothing, one = np.zeros((2, 1)), np.ones(2)
    table = SchedulerTable(
        timesteps=np.array([2.0, 1.0], np.float32),
        log_snr=np.array([0.0, 1.0]),
        signal=one,
        input_scale=one,
        initial_scale=1.0,
        denoised_sample=0 * one,
        denoised_prediction=0 * one,
        denoised_coefficient=0 * one,
        clip=np.inf,
        sample_coefficients=nothing,
        prediction_coefficients=nothing,
        noise_coefficient=one,
        variance_low=0 * one,
        variance_high=0 * one,
        start_sample=0 * one,
        start_prediction=0 * one,
    )
    start = start_of(table)
    loop = FusedLoop(start, DEVICE, PLACE)
    for step in range(2):
        loop.call(step)
        loop.advance(step)
        expected = step_noise(start.seed, start.indices, step, SHAPE)
        np.testing.assert_allclose(DEVICE.to_array(loop.sample), expected, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize(
    ("guided", "learned", "value"), every_nth(5, [False, True], [False, True], [np.nan, np.inf, -np.inf])
)
def test_what_is_not_finite_is_seen_wherever_it_is_and_the_step_can_be_made_again(
    guided: bool, learned: bool, value: float
) -> None:
    table = extract(make_scheduler("ddpm" if learned else "dpmsolver++", CONFIG | (LEARNED if learned else {})), 4)
    start = start_of(table, guided=guided, learned=learned)
    clean, non_finite = FusedLoop(start, DEVICE, PLACE), FusedLoop(start, DEVICE, PLACE)
    for step in range(4):
        inputs, prediction = non_finite.call(step)
        denoise(inputs, prediction)
        saw, whole = inputs["sample"].clone(), prediction.clone()
        for place in (0, len(whole.view(-1)) // 2 - 1, len(whole.view(-1)) // 2, -1):
            prediction.view(-1)[place] = value
            non_finite.advance(step)
            assert not non_finite.is_finite(step)
            assert torch.equal(inputs["sample"], saw)
            prediction.copy_(whole)
        non_finite.advance(step)
        assert non_finite.is_finite(step)
        inputs, prediction = clean.call(step)
        denoise(inputs, prediction)
        clean.advance(step)
        assert torch.equal(clean.sample, non_finite.sample)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
def test_the_largest_float_is_finite() -> None:
    start = start_of(extract(make_scheduler("ddim", CONFIG), 2))
    loop = FusedLoop(start, DEVICE, PLACE)
    loop.call(0)[1].fill_(torch.finfo(torch.float32).max)
    loop.advance(0)
    assert loop.is_finite(0)


def test_nothing_is_copied_from_the_host_between_the_first_step_and_the_last() -> None:
    device, start = Fused(), start_of(extract(make_scheduler("ddpm", CONFIG), STEPS), guided=True)
    loop = begin(start, device)
    before = device.puts
    assert before > 0
    run(loop, STEPS)
    assert device.puts == before


class Counting(TorchDispatchMode):
    """Records the operations of torch except views, which need no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operation.is_view:
            self.operations.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_a_step_asks_torch_for_one_number_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loop, "make_step", {(2, 2): lambda *args, **kwargs: None})  # not an operation of torch
    loop = FusedLoop(start_of(extract(make_scheduler("ddpm", CONFIG), STEPS), guided=True), DEVICE, PLACE)
    with Counting() as counting:
        loop.call(0)
        loop.advance(0)
        assert loop.is_finite(0)
    assert counting.operations == ["copy_", "_local_scalar_dense"]  # of one number, to the host


def test_tensors_of_engines_are_at_aligned_places_of_one_arena() -> None:
    start = start_of(extract(make_scheduler("dpmsolver++", CONFIG), STEPS), guided=True)
    loop = FusedLoop(start, DEVICE, PLACE)
    tensors = []
    for step in range(STEPS):
        inputs, prediction = loop.call(step)
        tensors += [prediction, inputs["sample"], inputs["timestep"]]
    base = tensors[0].untyped_storage().data_ptr()
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {base}
    assert {(tensor.data_ptr() - base) % 256 for tensor in tensors} == {0}
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_torch_is_told_what_the_kernel_has_written() -> None:
    loop = FusedLoop(start_of(extract(make_scheduler("ddim", CONFIG), 3)), DEVICE, PLACE)
    denoise(*loop.call(0))
    ahead = loop.call(1)[0]["sample"]
    product = (torch.ones_like(ahead, requires_grad=True) * ahead).sum()
    loop.advance(0)  # writes the input of the next step
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def session_on(bundle: Bundle, device: TorchDevice) -> Session:
    """Make a session whose programs are plain functions: only the loop is tested."""
    plan, scheduler = bundle.manifest.plan, bundle.scheduler

    def program(inputs: Any, output: torch.Tensor) -> dict[str, torch.Tensor]:
        denoise(inputs, output)
        return {}

    programs = [program for _ in plan.engines]
    return Session(
        plan=plan, full=program, programs=programs, scheduler=scheduler, sample_shape=SHAPE, steps=7, device=device
    )


def test_a_session_samples_the_same_in_both_loops(tiny_bundle: Path) -> None:
    bundle, told = Bundle.open(tiny_bundle), [[], []]
    samples = []
    for device, steps in zip((Fused(), Unfused()), told, strict=True):
        samples.append(session_on(bundle, device).sample(2, seed=4, on_step=steps.append))
    assert np.abs(samples[0] - samples[1]).max() <= ROUNDING
    for fused, plain in zip(*told, strict=True):
        assert np.abs(fused.sample - plain.sample).max() <= ROUNDING


class Late:
    """A session of plain functions as engines, one of which holds; some return NaN at some timesteps."""

    STEPS = 6

    def __init__(self, device: TorchDevice) -> None:
        engines = (
            Assignment(treatments={}, emits=("held",)),
            Assignment(treatments={"held": Treatment.HOLD}),
            Assignment(treatments={"dropped": Treatment.DROP}, emits=("held",)),
        )
        phases = (Phase(low=-40, high=0, cycle=(0, 1, 1)), Phase(low=0, high=40, cycle=(0, 1, 2)))
        self.non_finite: Container[tuple[int, int]] = frozenset()
        """Calls that return NaN: number of the engine, -1 for the full model, and the step."""
        self.table = extract(make_scheduler("dpmsolver++", CONFIG), self.STEPS)
        self.session = Session(
            plan=plan_of(engines, phases),
            full=self.program(-1),
            programs=[self.program(i) for i in range(3)],
            scheduler=SchedulerTables(name="dpmsolver++", tables=(self.table,)),
            sample_shape=(1, 4, 4),
            steps=self.STEPS,
            device=device,
        )

    def program(self, engine: int) -> Program:
        def run(inputs: Mapping[str, Any], output: torch.Tensor) -> Mapping[str, Any]:
            denoise(inputs, output)
            output += 0.1 * engine
            if engine == 1:
                output += inputs["held.0"]
            step = self.table.timesteps.tolist().index(inputs["timestep"][0].item())
            if (engine, step) in self.non_finite:
                output[0, 0, 1, 2] = np.nan
            return {"computed.0": 0.5 * output} if engine in (0, 2) else {}

        return run


@settings(max_examples=examples(15, at_night=30))
@given(non_finite=st.frozensets(st.tuples(st.integers(0, 2), st.integers(0, Late.STEPS - 1))))
def test_what_is_asked_late_changes_nothing(non_finite: frozenset[tuple[int, int]]) -> None:
    results = []
    for device in (Fused(), Unfused()):
        late = Late(device)
        late.non_finite = non_finite
        results.append((late.session.sample(1, seed=2), late.session.non_finite_steps))
    (fused, non_finite_steps), (plain, expected) = results
    assert non_finite_steps == expected
    assert np.abs(fused - plain).max() <= ROUNDING * max(1.0, np.abs(plain).max())


@pytest.mark.parametrize("step", [0, 2, Late.STEPS - 1])
def test_a_trajectory_ends_where_the_full_model_gives_nan(step: int) -> None:
    late = Late(Fused())
    late.non_finite = frozenset({(engine, step) for engine in (-1, 0, 1, 2)})
    timestep = late.table.timesteps.item(step)
    with pytest.raises(NonFiniteError, match=f"and the full model produced NaN or infinity at timestep {timestep:g}"):
        late.session.sample(1)
    with pytest.raises(NonFiniteError, match=f"engine 0 produced NaN or infinity at timestep {timestep:g}"):
        late.session.sample(1, full_model=True)


class Watched:
    """Records the step of every engine call, and never asks for NaN."""

    def __init__(self, order: list[str]) -> None:
        self._order = order

    def __contains__(self, call: tuple[int, int]) -> bool:
        self._order.append(f"called at {call[1]}")
        return False


def test_the_next_engine_is_called_before_it_is_asked_about_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = FusedLoop.is_finite
    order: list[str] = []

    def note(loop: FusedLoop, step: int) -> bool:
        order.append(f"asked about {step}")
        return asked(loop, step)

    monkeypatch.setattr(FusedLoop, "is_finite", note)
    late = Late(Fused())
    late.non_finite = Watched(order)
    late.session.sample(1)
    calls = [f"called at {step}" for step in range(Late.STEPS)]
    answers = [f"asked about {step}" for step in range(Late.STEPS)]
    pairs = [entry for pair in zip(calls[1:], answers, strict=False) for entry in pair]
    assert order == [calls[0], *pairs, answers[-1]]
    order.clear()
    late.session.sample(1, on_step=lambda step: order.append(f"told of {step.index}"))
    told = [f"told of {step}" for step in range(Late.STEPS)]
    assert order == [entry for three in zip(calls, answers, told, strict=True) for entry in three]


def test_a_session_samples_in_inference_mode(tiny_bundle: Path) -> None:
    session = session_on(Bundle.open(tiny_bundle), Fused())
    expected = session.sample(1, seed=4)
    with torch.inference_mode():
        np.testing.assert_array_equal(session.sample(1, seed=4), expected)


def test_what_a_step_has_told_is_not_overwritten(tiny_bundle: Path) -> None:
    told: list[Step] = []
    copies: list[Array] = []

    def on_step(step: Step) -> None:
        told.append(step)
        copies.append(step.sample)

    session_on(Bundle.open(tiny_bundle), Fused()).sample(1, on_step=on_step)
    assert len({copy.tobytes() for copy in copies}) == 7
    for step, copy in zip(told, copies, strict=True):
        np.testing.assert_array_equal(step.sample, copy)


def test_a_seed_out_of_range_is_refused() -> None:
    start = replace(start_of(extract(make_scheduler("ddpm", CONFIG), 2)), seed=-1)
    with pytest.raises(SessionError, match="cannot draw noise for -1"):
        begin(start, DEVICE)


def test_what_the_kernel_cannot_do_is_left_to_the_plain_loop() -> None:
    table = extract(make_scheduler("dpmsolver++", CONFIG), 4)
    start = start_of(table)
    assert can_fuse(start)
    rows = {"encoder_hidden_states": np.zeros((len(start.noise), 3, 4), np.float32)}
    past = replace(table, sample_coefficients=np.ones_like(table.sample_coefficients))
    learned = extract(make_scheduler("ddpm", CONFIG | LEARNED), 4)
    for other in (
        replace(start, table=past),
        start_of(learned),
        replace(start, predicted_channels=7),
        replace(start, conditions=Conditions(own=rows, negative=rows, middle=rows, scale=3.0)),
        replace(start, noise=np.broadcast_to(np.float32(0), (1, 1, 2**15, 2**15)), predicted_channels=1),
        replace(start, noise=np.broadcast_to(np.float32(0), (2**16, *SHAPE))),
    ):
        assert not can_fuse(other)
    loop = begin(start_of(learned), DEVICE)
    assert isinstance(loop, PlainLoop)
    loop.call(0)[1].zero_()
    with pytest.raises(SessionError, match="needs a predicted variance of its noise"):
        loop.advance(0)


def test_where_triton_fails_the_plain_loop_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: FusedLoop, step: int) -> None:
        raise OSError("Failed to find C compiler.\nPlease specify CC")

    monkeypatch.setattr(fused_loop.FusedLoop, "launch", fail)
    device, start = Fused(), start_of(extract(make_scheduler("ddim", CONFIG), 2))
    with caplog.at_level(logging.WARNING):
        assert [type(begin(start, device)) for _ in range(2)] == [PlainLoop, PlainLoop]
    assert caplog.text.count("Failed to find C compiler.") == 1


def test_a_kernel_that_makes_another_step_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = fused_loop.coefficients

    def wrong(table: SchedulerTable) -> np.ndarray:
        return right(table) * np.float32(1.01)

    monkeypatch.setattr(fused_loop, "coefficients", wrong)
    with caplog.at_level(logging.WARNING):
        assert isinstance(begin(start_of(extract(make_scheduler("ddim", CONFIG), 2)), Fused()), PlainLoop)
    assert "its first step differs from the plain loop's" in caplog.text


def test_a_kernel_is_looked_at_once_for_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []

    def note(fused: FusedLoop, plain: PlainLoop) -> bool:
        looked.append(fused.form)
        return True

    monkeypatch.setattr(fused_loop, "agrees", note)
    device, table = Fused(), extract(make_scheduler("ddim", CONFIG), 2)
    for guided in (False, True, False, True):
        assert isinstance(begin(start_of(table, guided=guided), device), FusedLoop)
    assert len(looked) == 2
    assert looked[0] != looked[1]


def test_what_fails_for_another_reason_is_raised_and_the_next_trajectory_is_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: FusedLoop, step: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device, start = Fused(), start_of(extract(make_scheduler("ddim", CONFIG), 2))
    with monkeypatch.context() as patch:
        patch.setattr(fused_loop.FusedLoop, "launch", fail)
        with pytest.raises(torch.OutOfMemoryError):
            begin(start, device)
    with monkeypatch.context() as patch:
        patch.setattr(device, "put", lambda array: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin(start, device)
    assert isinstance(begin(start, device), FusedLoop)


def test_where_triton_is_missing_the_plain_loop_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "unetc.runtime.backends.fused_loop", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(begin(start_of(extract(make_scheduler("ddim", CONFIG), 2)), Fused()), PlainLoop)
    assert "many kernels in place of one" in caplog.text


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from unetc.runtime.backends.step_kernel import make_step

floats = dict.fromkeys([p.name for p in make_step.params[:6]], "*fp32")
others = dict(keys="*i64", step="i32", guidance="fp32", batch="i32", elements="i32")
for many in (False, True):
    known = dict(LAGS=8 if many else 1, GUIDED=many, LEARNED=many, NOISY=many, BLOCK=512)
    source = ASTSource(make_step, floats | others | dict.fromkeys(known, "constexpr"), constexprs=known)
    for capability in (80, 90, 120):
        print(len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]))
"""


def test_the_kernel_compiles_for_gpus_that_are_not_here() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert made.returncode == 0, made.stderr
    assert len(sizes := [int(line) for line in made.stdout.split()]) == 6
    assert min(sizes) > 1000


@pytest.mark.gpu
def test_a_trajectory_on_a_gpu_asks_for_no_memory_that_the_one_before_had_not(tiny_bundle: Path) -> None:
    if PLACE.type != "cuda":
        pytest.skip("no NVIDIA GPU")
    session = unetc.load(tiny_bundle, target="torch:cuda")
    session.sample(2)  # captures CUDA graphs
    before = torch.cuda.memory_stats()["num_device_alloc"]
    session.sample(2)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
