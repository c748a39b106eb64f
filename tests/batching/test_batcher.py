"""Requests that share calls get the images that they would get alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.batching.levels import LEVELS, ROUNDING, STEPS, Levels
from tests.models import relative_error, tiny_of
from unetc.backend import Array, Program
from unetc.device import Tensor
from unetc.errors import (
    BatcherStopped,
    DeadlineExceeded,
    NonFiniteError,
    OutOfMemory,
    QueueFull,
    SessionError,
    ShapeMismatch,
    UnetcError,
)
from unetc.runtime.backends.onnxruntime import OnnxRuntimeHost
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.limits import BatchLimits, CallRecord
from unetc.runtime.batching.member import Member
from unetc.runtime.batching.request import FULL, Progress, SampleRequest, Ticket
from unetc.runtime.batching.turns import Waiting, choose
from unetc.runtime.session import Session


@pytest.fixture(scope="module", params=["attention", "cross-attention"])
def levels(request: pytest.FixtureRequest, shared: Path) -> Levels:
    return Levels(tiny_of(request.param, shared), open_backend("onnxruntime:cpu", threads=1))


@pytest.fixture(scope="module")
def plain(shared: Path) -> Levels:
    return Levels(tiny_of("attention", shared), open_backend("onnxruntime:cpu", threads=1))


@pytest.fixture(scope="module")
def sessions(plain: Levels) -> Mapping[str, Session]:
    return plain.opened("ddim")


@dataclass
class Gate:
    """A program that waits before it runs, and may fail or predict NaN for some rows."""

    program: Program
    open: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    change: Callable[[Mapping[str, Tensor], Array], None] = lambda inputs, output: None

    def __call__(self, inputs: Mapping[str, Tensor], output: Array) -> Mapping[str, Tensor]:
        self.entered.release()
        assert self.open.wait(30)
        emitted = self.program(inputs, output)
        self.change(inputs, output)
        return emitted

    __hash__ = object.__hash__


@pytest.fixture
def gates() -> list[Gate]:
    return []


@pytest.fixture
def gated(plain: Levels, gates: list[Gate]) -> Iterator[Batcher]:
    """A batcher whose programs wait until they may run."""

    def wrap(program: Program) -> Program:
        gates.append(Gate(program))
        return gates[-1]

    batcher = Batcher(plain.sessions("ddim", wrap), limits=BatchLimits(rows=4, seats=4, queue=6))
    yield batcher
    release(gates)
    batcher.close()


def release(gates: list[Gate]) -> None:
    for gate in gates:
        gate.open.set()


def wait_for_calls(gates: list[Gate]) -> None:
    """Wait until some program was called."""
    deadline = time.monotonic() + 30
    while not any(gate.entered.acquire(blocking=False) for gate in gates):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def alone(session: Session, request: SampleRequest) -> Array:
    return session.sample(
        request.count,
        seed=request.seed,
        steps=request.steps,
        first_index=request.first_index,
        height=request.height,
        width=request.width,
        conditions=request.conditions,
        full_model=request.level == FULL,
    )


requests = st.builds(
    SampleRequest,
    level=st.sampled_from(LEVELS),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 2**64 - 1),
    count=st.integers(1, 3),
    first_index=st.integers(0, 5),
    height=st.sampled_from([None, 8, 16]),
)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddpm", pytest.param("ddim", marks=pytest.mark.nightly)])
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_company_changes_no_image(levels: Levels, scheduler: str, data: st.DataObject) -> None:
    sessions = levels.opened(scheduler)
    mix = data.draw(st.lists(requests, min_size=2, max_size=6))
    scales = data.draw(st.lists(st.sampled_from([1.0, 3.0]), min_size=len(mix), max_size=len(mix)))
    mix = [
        replace(one, conditions=levels.conditions(one.count, i, scale=scale))
        for i, (one, scale) in enumerate(zip(mix, scales, strict=True))
    ]
    calls: list[CallRecord] = []
    batcher = Batcher(sessions, limits=BatchLimits(rows=data.draw(st.integers(1, 8)), seats=8), on_call=calls.append)
    try:
        tickets = []
        for request in mix:
            tickets.append(batcher.submit(request))
            time.sleep(data.draw(st.sampled_from([0.0, 0.003])))
        for ticket in tickets:
            expected = alone(sessions[ticket.request.level], ticket.request)
            result = ticket.future.result(timeout=60)
            assert relative_error(result.images, expected) < ROUNDING
            assert result.level == ticket.request.level
    finally:
        batcher.close()
    assert sum(call.rollouts for call in calls) == sum(result_steps(ticket) for ticket in tickets)


def result_steps(ticket: Ticket) -> int:
    return ticket.future.result().steps * ticket.request.count


def test_requests_at_different_steps_and_levels_share_calls(sessions: Mapping[str, Session]) -> None:
    calls: list[CallRecord] = []
    batcher = Batcher(sessions, limits=BatchLimits(rows=8, seats=8), on_call=calls.append)
    try:
        mix = [SampleRequest(level=level, steps=steps, seed=1) for level in LEVELS for steps in STEPS[1:]]
        for ticket in [batcher.submit(request) for request in mix]:
            ticket.future.result(timeout=60)
    finally:
        batcher.close()
    rollouts = sum(call.rollouts for call in calls)
    assert rollouts == len(LEVELS) * sum(STEPS[1:])
    assert rollouts > 1.5 * len(calls)


def test_a_record_names_the_engine_and_phase_of_its_call(sessions: Mapping[str, Session]) -> None:
    calls: list[CallRecord] = []
    engines: list[int] = []
    sessions["fast"].sample(1, steps=STEPS[-1], on_step=lambda step: engines.append(step.engine))
    batcher = Batcher(sessions, on_call=calls.append)
    try:
        batcher.submit(SampleRequest(level="fast", steps=STEPS[-1])).future.result(timeout=60)
    finally:
        batcher.close()
    assert [call.engine for call in calls] == engines
    assert len(set(engines)) > 1
    phases = [call.phase for call in calls]
    assert phases[0] == 0
    assert phases[-1] == len(sessions["fast"].plan.phases) - 1


def test_small_images_do_not_go_before_large_ones(
    sessions: Mapping[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call is short because of its engine."""
    seen: list[dict[int, float]] = []
    submitted = threading.Event()

    def noted(waiting: Sequence[Waiting[Member, Any]], largest: Callable[[Any], int]) -> tuple[Any, list[Member]]:
        submitted.wait(60)  # or the first request may be finished before the second one comes
        full = [one for one in waiting if one.key[0] is sessions["fast"].full]
        seen.append({one.member.prediction_shape[-2]: one.seconds for one in full})
        return choose(waiting, largest)

    monkeypatch.setattr("unetc.runtime.batching.batcher.choose", noted)
    batcher = Batcher(sessions)
    try:
        batcher.warm_up().result(timeout=60)
        tickets = [batcher.submit(SampleRequest(level=FULL, count=3, height=height)) for height in (8, 16)]
        submitted.set()
        for ticket in tickets:
            ticket.future.result(timeout=60)
    finally:
        batcher.close()
    both = [seconds for seconds in seen if len(seconds) == 2]
    assert both
    assert all(len(set(seconds.values())) == 1 and min(seconds.values()) > 0 for seconds in both)


def test_calls_have_at_most_the_largest_number_of_rows(sessions: Mapping[str, Session]) -> None:
    calls: list[CallRecord] = []
    largest = dict.fromkeys(sessions["fast"].programs, 2)
    batcher = Batcher(sessions, limits=BatchLimits(rows=3, seats=8), largest=largest, on_call=calls.append)
    try:
        tickets = [batcher.submit(SampleRequest(level=level, count=4)) for level in (FULL, "fast")]
        for ticket in tickets:
            ticket.future.result(timeout=60)
    finally:
        batcher.close()
    assert max(call.rows for call in calls if call.level == "fast") == 2
    assert max(call.rows for call in calls if call.level == FULL) <= 3


class Capturing(OnnxRuntimeHost):
    """A device whose programs prepare for every shape."""

    captures_shapes = True


def test_calls_are_rounded_up_to_shapes_that_programs_are_prepared_for(
    plain: Levels, sessions: Mapping[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[CallRecord] = []
    mix = [SampleRequest(level=level, seed=seed, count=3) for seed, level in enumerate(LEVELS)]
    expected = [alone(sessions[request.level], request) for request in mix]
    for session in sessions.values():
        monkeypatch.setattr(session, "_device", Capturing())
    batcher = Batcher(sessions, limits=BatchLimits(rows=7, captured=(2, 4, 8)), on_call=calls.append)
    try:
        tickets = [batcher.submit(request) for request in mix]
        for ticket, images in zip(tickets, expected, strict=True):
            assert relative_error(ticket.future.result(timeout=60).images, images) < ROUNDING
    finally:
        batcher.close()
    assert {call.rows + call.padding for call in calls} <= {2, 4, 7}, "no call has more rows than the limit"
    assert sum(call.padding for call in calls) > 0


@pytest.mark.parametrize(("architecture", "expected"), [("attention", {2, 4, 7}), ("cross-attention", {2, 4, 6})])
def test_a_device_that_prepares_for_shapes_is_warmed_up_with_them(
    architecture: str, expected: set[int], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guided sample has two rows."""
    rows: set[int] = set()

    def record(program: Program) -> Program:
        def run(inputs: Mapping[str, Tensor], output: Array) -> Mapping[str, Tensor]:
            rows.add(len(output))
            return program(inputs, output)

        return run

    levels = Levels(tiny_of(architecture, shared), open_backend("onnxruntime:cpu", threads=1))
    sessions = levels.sessions("ddim", record)
    for session in sessions.values():
        monkeypatch.setattr(session, "_device", Capturing())
        monkeypatch.setattr(session, "conditions", levels.conditions(1, 0, scale=3.0))
    batcher = Batcher(sessions, limits=BatchLimits(rows=7, captured=(2, 4, 8)))
    try:
        batcher.warm_up().result(timeout=60)
    finally:
        batcher.close()
    assert rows == expected


def test_a_batcher_that_is_not_closed_does_not_keep_the_process_alive(gated: Batcher) -> None:
    (thread,) = (one for one in threading.enumerate() if one.name == "unetc-engines")
    assert thread.daemon


def test_a_cancelled_request_frees_its_place_within_a_step(gated: Batcher, gates: list[Gate]) -> None:
    first = gated.submit(SampleRequest(count=4))
    wait_for_calls(gates)
    second = gated.submit(SampleRequest(seed=2))
    assert (first.position(), second.position()) == (0, 1)
    first.cancel()
    release(gates)
    assert not wait([first.future], timeout=30).not_done
    assert second.future.result(timeout=30).images.shape[0] == 1
    assert first.progress is None or first.progress.done <= 1
    with pytest.raises(CancelledError):
        first.future.result()
    assert first.position() is None


def test_a_deadline_ends_a_request_between_two_steps(gated: Batcher, gates: list[Gate]) -> None:
    late = gated.submit(SampleRequest(seconds=0.05))
    wait_for_calls(gates)
    other = gated.submit(SampleRequest(seed=3))
    time.sleep(0.06)
    release(gates)
    with pytest.raises(DeadlineExceeded, match=r"time limit of 0\.05 s"):
        late.future.result(timeout=30)
    other.future.result(timeout=30)


def test_a_time_limit_may_have_begun_before_submission(gated: Batcher, gates: list[Gate]) -> None:
    late = gated.submit(SampleRequest(seconds=10, since=time.monotonic() - 9.9))
    wait_for_calls(gates)
    time.sleep(0.15)
    release(gates)
    with pytest.raises(DeadlineExceeded, match="time limit of 10 s"):
        late.future.result(timeout=30)
    with pytest.raises(QueueFull, match=r"in about 1[12]\.. s, but its time limit is 10 s") as refused:
        gated.submit(SampleRequest(seconds=10, since=time.monotonic() - 11))
    assert refused.value.seconds >= 1


def test_a_full_queue_refuses_and_says_when_to_come_again(gated: Batcher) -> None:
    gated.submit(SampleRequest(count=6))
    with pytest.raises(QueueFull, match="the queue holds 6"):
        gated.submit(SampleRequest(count=7))


def test_requests_of_a_group_get_seats_as_one(gated: Batcher, gates: list[Gate]) -> None:
    """Many parts get no more than one request for as many images."""
    first = gated.submit(SampleRequest(count=4))
    wait_for_calls(gates)
    steps: list[str] = []
    parts = [
        gated.submit(SampleRequest(seed=seed, group="parts"), lambda _, seed=seed: steps.append(f"part {seed}"))
        for seed in range(3)
    ]
    other = gated.submit(SampleRequest(seed=3, count=2), lambda _: steps.append("other"))
    assert [ticket.position() for ticket in (*parts, other)] == [1, 1, 1, 2]
    first.cancel()
    release(gates)
    assert not wait([ticket.future for ticket in (*parts, other)], timeout=30).not_done
    assert steps.index("other") < steps.index("part 2"), "two seats for each"


def test_a_large_request_does_not_hold_up_a_small_one(sessions: Mapping[str, Session]) -> None:
    order: list[str] = []
    batcher = Batcher(sessions, limits=BatchLimits(rows=2, seats=4))
    try:
        large = batcher.submit(SampleRequest(count=40))
        small = batcher.submit(SampleRequest(seed=1))
        large.future.add_done_callback(lambda _: order.append("large"))
        small.future.add_done_callback(lambda _: order.append("small"))
        large.future.result(timeout=60)
        small.future.result(timeout=60)
        assert large.progress is not None
    finally:
        batcher.close()
    assert order == ["small", "large"]


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (SampleRequest(level="slow"), SessionError, "no quality level 'slow'. Expected one of: full, half, fast"),
        (SampleRequest(steps=4), SessionError, "Nearest: 3 or 5 steps"),
        (SampleRequest(count=0), ShapeMismatch, "expected at least 1"),
        (SampleRequest(seed=-1), SessionError, "between 0 and"),
        (
            SampleRequest(count=2, image=np.zeros((1, 2, 8, 8), np.float32)),
            ShapeMismatch,
            "for 2 images, and starts from 1",
        ),
    ],
)
def test_a_bad_request_is_refused_at_once(
    gated: Batcher, request_: SampleRequest, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        gated.submit(request_)
    assert gated.load().waiting == 0


def test_progress_is_reported_after_every_step(sessions: Mapping[str, Session]) -> None:
    seen: list[Progress] = []
    batcher = Batcher(sessions)
    try:
        ticket = batcher.submit(SampleRequest(level="half", steps=5, count=2), seen.append)
        ticket.future.result(timeout=60)
    finally:
        batcher.close()
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert {progress.done for progress in seen} == {0, 1, 2, 3, 4, 5} - ({0} if seen[0].done else set())
    assert {progress.phase for progress in seen} == {0, 1}


def test_a_preview_shows_the_samples_so_far(gated: Batcher, gates: list[Gate]) -> None:
    ticket = gated.submit(SampleRequest(count=2))
    preview = ticket.preview()
    release(gates)
    images = preview.result(timeout=30)
    assert images is None or images.shape == (2, *ticket.future.result(timeout=30).images.shape[1:])


def test_a_preview_shows_as_many_images_as_were_asked_for(gated: Batcher, gates: list[Gate]) -> None:
    ticket = gated.submit(SampleRequest(count=3))
    wait_for_calls(gates)  # all three are on their way
    previews = {images: ticket.preview(images) for images in (0, 1, 2, 4)}
    release(gates)
    shapes = {images: getattr(preview.result(timeout=30), "shape", None) for images, preview in previews.items()}
    whole = ticket.future.result(timeout=30).images.shape[1:]
    assert shapes == {0: None, 1: (1, *whole), 2: (2, *whole), 4: None}


def test_a_request_whose_images_cannot_be_finished_fails_with_the_reason(
    gated: Batcher, gates: list[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(session: Session, samples: Array) -> Array:
        raise SessionError("the decoder is gone")

    monkeypatch.setattr(Session, "finish", refuse)
    ticket = gated.submit(SampleRequest())
    release(gates)
    with pytest.raises(SessionError, match="the decoder is gone"):
        ticket.future.result(timeout=30)
    monkeypatch.undo()
    assert len(gated.submit(SampleRequest()).future.result(timeout=30).images) == 1


def test_no_step_is_done_before_the_last_image_has_begun(gated: Batcher, gates: list[Gate]) -> None:
    seen: list[Progress] = []
    ticket = gated.submit(SampleRequest(count=6, steps=8), seen.append)  # two of them find no seat at first
    release(gates)
    ticket.future.result(timeout=60)
    assert [progress.done for progress in seen][:2] == [0, 1]
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)


def test_a_step_that_is_not_finite_is_made_again_for_its_own_request_alone(
    gated: Batcher, gates: list[Gate], sessions: Mapping[str, Session]
) -> None:
    full, _, holding, forecasting, *_ = gates

    def spoil(inputs: Mapping[str, Tensor], output: Array) -> None:
        output[0] = np.nan

    holding.change = forecasting.change = spoil
    mix = [SampleRequest(level="half", seed=seed, steps=5) for seed in range(3)]
    tickets = [gated.submit(request) for request in mix]
    release(gates)
    results = [ticket.future.result(timeout=30) for ticket in tickets]
    assert 0 < sum(result.non_finite_steps for result in results) < 3 * 5
    assert all(np.isfinite(result.images).all() for result in results)
    assert full is not None


def test_a_request_for_the_full_model_outlives_nan_from_its_stand_in(
    gated: Batcher, gates: list[Gate], sessions: Mapping[str, Session]
) -> None:
    """An engine that emits branches makes a step of the full model too, if it is called anyway."""
    spoilt: list[int] = []

    def spoil(inputs: Mapping[str, Tensor], output: Array) -> None:
        spoilt.append(len(output))
        output[:] = np.nan

    gates[1].change = spoil
    mix = [SampleRequest(level="half", seed=1), SampleRequest(seed=2), SampleRequest(seed=3)]
    tickets = [gated.submit(request) for request in mix]
    release(gates)
    for ticket in tickets:
        result = ticket.future.result(timeout=30)
        assert relative_error(result.images, alone(sessions[FULL], replace(ticket.request, level=FULL))) < ROUNDING
        assert result.non_finite_steps > 0
    assert max(spoilt) > 1


def refuse_seed() -> None:
    raise SessionError("this engine does not like the seed 7")


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        (refuse_seed, SessionError, "does not like"),
        (lambda: np.empty(2**56), OutOfMemory, "the memory is used up .*Unable to allocate"),
    ],
    ids=["refusal", "memory"],
)
def test_a_request_that_an_engine_refuses_does_not_harm_its_companions(
    gated: Batcher, gates: list[Gate], refusal: Callable[[], object], error: type[UnetcError], words: str
) -> None:
    poison = gated.session("half").start(1, seed=7).noise

    def refuse(inputs: Mapping[str, Tensor], output: Array) -> None:
        if any(np.array_equal(row, poison[0]) for row in np.asarray(inputs["sample"])):
            refusal()

    for gate in gates:
        gate.change = refuse
    tickets = [gated.submit(SampleRequest(level="half", seed=seed)) for seed in (6, 7, 8)]
    release(gates)
    with pytest.raises(error, match=words):
        tickets[1].future.result(timeout=30)
    for ticket in (tickets[0], tickets[2]):
        assert np.isfinite(ticket.future.result(timeout=30).images).all()


@pytest.mark.parametrize("room", [1, 0])
def test_a_check_without_room_leaves_the_engine_thread_alive(
    gated: Batcher, gates: list[Gate], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """With room for the rows of one request they all go on; without, they fail and the next ones are served."""
    check = gated._device.is_finite

    def tight(tensor: Any) -> bool:
        if len(tensor) > room:
            raise MemoryError("Unable to allocate 7 GiB")
        return check(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(gated._device, "is_finite", tight)
        tickets = [gated.submit(SampleRequest(seed=seed)) for seed in range(3)]
        release(gates)
        for ticket in tickets:
            if room:
                ticket.future.result(timeout=30)
            else:
                with pytest.raises(OutOfMemory, match="the memory is used up"):
                    ticket.future.result(timeout=30)
    gated.submit(SampleRequest()).future.result(timeout=30)


def test_nan_from_the_full_model_fails_its_own_request(gated: Batcher, gates: list[Gate]) -> None:
    def spoil(inputs: Mapping[str, Tensor], output: Array) -> None:
        output[:] = np.nan

    gates[0].change = spoil
    bad, good = gated.submit(SampleRequest()), gated.submit(SampleRequest(level="half"))
    release(gates)
    with pytest.raises(NonFiniteError, match="engine 0 produced NaN"):
        bad.future.result(timeout=30)
    good.future.result(timeout=30)


def test_a_crash_of_the_engine_thread_fails_every_request_and_is_told(plain: Levels) -> None:
    def crash(program: Program) -> Program:
        def run(inputs: Mapping[str, Tensor], output: Array) -> Mapping[str, Tensor]:
            raise RuntimeError("the driver is gone")

        return run

    crashed: list[BaseException] = []
    batcher = Batcher(plain.sessions("ddim", crash), on_crash=crashed.append)
    ticket = batcher.submit(SampleRequest())
    with pytest.raises(BatcherStopped):
        ticket.future.result(timeout=30)
    assert str(crashed[0]) == "the driver is gone"
    with pytest.raises(BatcherStopped):
        batcher.submit(SampleRequest())
    batcher.close()


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(gated: Batcher, gates: list[Gate]) -> None:
    accepted = [gated.submit(SampleRequest(seed=seed)) for seed in range(6)]
    assert not gated.drain(0.01)
    with pytest.raises(BatcherStopped, match="shutting down"):
        gated.submit(SampleRequest())
    release(gates)
    assert gated.drain(30)
    assert all(ticket.future.done() for ticket in accepted)


def test_one_call_of_the_full_model_runs_on_the_engine_thread(plain: Levels, sessions: Mapping[str, Session]) -> None:
    inputs = plain.tiny.inputs(batch=3, height=8, width=16)
    batcher = Batcher(sessions)
    try:
        batcher.warm_up().result(timeout=60)
        prediction = batcher.call(inputs).result(timeout=60)
    finally:
        batcher.close()
    assert relative_error(prediction, plain.tiny.run_denoiser(inputs)) < ROUNDING


@dataclass
class Small:
    """A program that takes few rows, as an engine does that was built for few."""

    program: Program
    most: int
    refusals: list[int]

    def __call__(self, inputs: Mapping[str, Tensor], output: Array) -> Mapping[str, Tensor]:
        if len(output) > self.most:
            self.refusals.append(len(output))
            raise ShapeMismatch(f"the engine takes 1 to {self.most} rows, got {len(output)}.")
        return self.program(inputs, output)

    __hash__ = object.__hash__


@pytest.mark.parametrize("device", [Capturing(), OnnxRuntimeHost()])
def test_no_call_is_larger_than_its_engine_takes(
    plain: Levels, caplog: pytest.LogCaptureFixture, device: OnnxRuntimeHost
) -> None:
    refusals: list[int] = []
    sessions = plain.sessions("ddim", lambda program: Small(program, 6, refusals))
    largest = {program: 8 for session in sessions.values() for program in session.programs}
    for session in sessions.values():
        session._device = device
    calls: list[CallRecord] = []
    batcher = Batcher(sessions, limits=BatchLimits(rows=8, seats=16), largest=largest, on_call=calls.append)
    try:
        batcher.warm_up().result(timeout=60)
        assert refusals == [8]
        request = SampleRequest(level="fast", count=9)
        images = batcher.submit(request).future.result(timeout=60).images
    finally:
        batcher.close()
    assert refusals == [8], "only the warm-up tries"
    assert max(call.rows + call.padding for call in calls) == 4
    assert "no call has more than 4 rows" in caplog.text
    assert relative_error(images, alone(plain.opened("ddim")["fast"], request)) < ROUNDING


def test_engines_that_take_no_image_are_refused(plain: Levels, caplog: pytest.LogCaptureFixture) -> None:
    batcher = Batcher(plain.sessions("ddim", lambda program: Small(program, 0, [])))
    try:
        with pytest.raises(ShapeMismatch, match="got 1"):
            batcher.warm_up().result(timeout=60)
    finally:
        batcher.close()
    assert "no call has more" not in caplog.text


def test_an_estimate_follows_the_backlog(sessions: Mapping[str, Session]) -> None:
    batcher = Batcher(sessions)
    try:
        batcher.warm_up().result(timeout=60)
        few, many = (batcher.estimate(SampleRequest(steps=steps, count=8)).seconds for steps in (3, 8))
        assert 0 < few < many
        with pytest.raises(QueueFull, match="would be finished in about"):
            batcher.submit(SampleRequest(count=200, seconds=few / 100))
    finally:
        batcher.close()


def test_an_estimate_counts_the_steps_that_an_image_leaves(sessions: Mapping[str, Session]) -> None:
    image = np.zeros((1, *sessions["full"].sample_shape), np.float32)
    batcher = Batcher(sessions)
    try:
        batcher.warm_up().result(timeout=60)
        whole, half = (
            batcher.estimate(SampleRequest(steps=8, image=image, strength=strength)).seconds for strength in (1.0, 0.5)
        )
    finally:
        batcher.close()
    assert half == pytest.approx(whole / 2)


@pytest.mark.parametrize("level", ["full", "half"])
def test_a_request_adds_to_the_backlog_what_was_estimated_for_it(gated: Batcher, gates: list[Gate], level: str) -> None:
    release(gates)
    gated.warm_up().result(timeout=60)
    for gate in gates:
        gate.open.clear()
    request = SampleRequest(level=level, steps=8, count=4)
    expected = gated.estimate(request).seconds
    gated.submit(request)
    assert gated.load().seconds == pytest.approx(expected, rel=0.01)
