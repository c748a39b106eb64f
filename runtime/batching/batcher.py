"""The batcher: one thread drives the engines, and rollouts of many requests share its calls.

In each turn, the members that wait for the same engine, and have rows of the same shapes, make one call together,
whatever their step, plan, number of steps, guidance scale or seed. Each then advances by its own row of its scheduler
table. Requests join and leave between any two calls.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import numpy as np

from unetc.backend import Program
from unetc.controlnet import zeros
from unetc.device import Array, Tensor
from unetc.errors import BatcherStopped, DeadlineExceeded, QueueFull, SessionError, ShapeMismatch, UnetcError
from unetc.memory import taking_memory
from unetc.runtime.loop import Start
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.rows import Rows
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTable

from .estimates import Estimate, Estimates, Work
from .limits import BatchLimits, CallRecord, Load
from .member import Member, join
from .orders import Errand, Order, fail, single_starts
from .pace import Cost, Pace
from .request import FULL, Progress, SampleRequest, SampleResult, Ticket
from .turns import Waiting, choose
from .warm_up import warm_up

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Batcher:
    """Samples for many requests at once. Every method may be called from any thread."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        *,
        limits: BatchLimits | None = None,
        largest: Mapping[Program, int] | None = None,
        on_call: Callable[[CallRecord], None] | None = None,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Start the engine thread.

        Args:
            sessions: One session per quality level; sessions that share programs share calls. Without a session for
                the level `FULL`, the first one makes its samples, with its full model.
            limits: How much to do at once.
            largest: Most rows of a call by program, where that is known.
            on_call: Called on the engine thread after every call.
            on_crash: Called on the engine thread when it ends by an error that is nobody's request.
        """
        first = next(iter(sessions.values()))
        self._sessions = {FULL: first, **sessions}
        self._limits = limits or BatchLimits()
        self._largest = dict(largest or {})
        self._on_call = on_call
        self._on_crash = on_crash
        self._device = first.device
        self._stand_ins = _stand_ins(self._sessions.values())
        self._pace = Pace()
        self._estimates = Estimates(self._pace, self._limits.seats)
        self._changed = threading.Condition()
        self._orders: list[Order] = []
        """Accepted requests, in the order of their arrival."""
        self._errands: list[Errand] = []
        """Further work for the engine thread."""
        self._accepting = True
        self._stopping = False
        self.crashed: BaseException | None = None
        """The error that ended the engine thread; None while it runs."""
        self._turn = 0
        self._owners: dict[Member, Order] = {}
        self._last_turn: dict[Member, int] = {}
        self._last_program: Program | None = None
        self._complained: set[Program] = set()
        """Programs that failed for several members; it is logged once."""
        self._thread = threading.Thread(target=self._run, name="unetc-engines", daemon=True)
        self._thread.start()

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the quality levels, `FULL` first."""
        return tuple(self._sessions)

    def session(self, level: str) -> Session:
        """Return the session of a quality level.

        Raises:
            SessionError: If there is no such level.
        """
        if level not in self._sessions:
            raise SessionError(f"there is no quality level {level!r}. Expected one of: {', '.join(self.levels)}.")
        return self._sessions[level]

    def submit(self, request: SampleRequest, on_step: Callable[[Progress], None] | None = None) -> Ticket:
        """Accept a request, or refuse it at once.

        Args:
            request: The request.
            on_step: Called on the engine thread after every step of the request's slowest image.

        Raises:
            ShapeMismatch: If the size or the conditions do not fit the model.
            SessionError: If there is no such level, or no scheduler table for the number of steps.
            QueueFull: If too many images wait, or the request would not be finished in time.
            BatcherStopped: If the batcher accepts no more requests.
        """
        session = self.session(request.level)
        start = session.start(
            request.count,
            seed=request.seed,
            steps=request.steps,
            first_index=request.first_index,
            height=request.height,
            width=request.width,
            image=request.image,
            strength=request.strength,
            conditions=request.conditions,
        )
        if len(start.noise) != request.count:
            raise ShapeMismatch(
                f"the request is for {request.count} images, and starts from {len(start.noise)}. Give one per image."
            )
        now = time.monotonic()
        ticket = Ticket(request=request)
        order = Order(
            ticket=ticket,
            session=session,
            starts=single_starts(start)[::-1],
            calls=start.calls,
            programs=self._programs(request.level, session, start.table, start.first, start.conditions.paired),
            units=start.units / request.count,
            turn=self._turn,
            submitted=now,
            deadline=math.inf if request.seconds is None else (request.since or now) + request.seconds,
            on_step=on_step,
        )
        ticket._position = lambda: self._position(order)
        ticket._preview = lambda images: self._preview(order, images)
        ticket._wake = self._wake
        with self._changed:
            self._admit(order)
            self._orders.append(order)
            self._changed.notify_all()
        return ticket

    def estimate(self, request: SampleRequest) -> Estimate:
        """Estimate when a request would be finished if it were submitted now.

        Raises:
            SessionError: If there is no such level, or no scheduler table for the number of steps.
        """
        session = self.session(request.level)
        table = session.scheduler.table(session.steps if request.steps is None else request.steps)
        first = 0 if request.image is None else session.first_step(table, request.strength)
        conditions = request.conditions or session.conditions
        _, height, width = session.sample_shape
        _, own_height, own_width = session.image_shape
        area = (request.height or own_height) * (request.width or own_width) / (own_height * own_width)
        work = Work(
            programs=self._programs(request.level, session, table, first, conditions.paired),
            units=conditions.rows_per_sample * height * width * area,
            images=request.count,
        )
        with self._changed:
            return self._estimates.both(self._orders, work)

    @property
    def waiting(self) -> int:
        """Number of images that have no seat yet."""
        with self._changed:
            return sum(len(order.starts) for order in self._orders)

    def load(self) -> Load:
        """Return how busy the batcher is."""
        with self._changed:
            running = sum(order.running for order in self._orders)
            return Load(waiting=self.waiting, running=running, seconds=self._backlog())

    def call(self, inputs: Mapping[str, Array]) -> Future[Array]:
        """Run the full model once.

        Args:
            inputs: Inputs of the denoiser by name, with the timestep, one row per sample; `Session.calls` knows which.

        Returns:
            The prediction, [row, channel, height, width].
        """
        session = self._sessions[FULL]

        def run() -> Array:
            tensors = {name: self._device.put(np.ascontiguousarray(value)) for name, value in inputs.items()}
            rows, _, height, width = inputs["sample"].shape
            tensors = {**zeros(session.conditions.controlnet, rows, height, width, self._device), **tensors}
            prediction = self._device.empty((rows, session.predicted_channels, height, width))
            session.full(tensors, prediction)
            return self._device.to_array(prediction)

        return self._errand(run)

    def warm_up(self) -> Future[None]:
        """Call every engine once, so that the first request need not wait for what engines prepare in a first call."""

        def call() -> None:
            known: dict[Program, Cost] = {}
            for session in self._sessions.values():
                known |= self._warm_up(session, known)
            for program, cost in known.items():
                self._pace.measured(program, cost)

        return self._errand(call)

    def _warm_up(self, session: Session, known: Collection[Program]) -> Mapping[Program, Cost]:
        """Call the engines of a session at the sizes of later calls, and make none that is too large for them."""
        of_sample = session.conditions.rows_per_sample
        while True:
            sizes = {1, min(self._limits.seats // 2, self._limits.rows // of_sample) or 1}
            if self._device.captures_shapes:
                sizes = {max(1, rows // of_sample) for rows in self._limits.prepared}
            least, largest = min(sizes), max(sizes)
            try:
                return warm_up(session, sorted(sizes), known)
            except ShapeMismatch as error:
                if largest == least:
                    raise
                warm_up(session, [least], known)  # fails again unless it is the number of rows that is refused
                rows = of_sample * max(least, largest // 2)
                logger.warning("no call has more than %d rows, as engines refuse more: %s", rows, error)
                self._limits = replace(self._limits, rows=rows)
                self._largest = {program: min(most, rows) for program, most in self._largest.items()}

    def drain(self, seconds: float) -> bool:
        """Accept no more requests, and wait for those that were accepted.

        Args:
            seconds: Longest time to wait.

        Returns:
            Whether all of them are finished.
        """
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._orders or self.crashed is not None, seconds)

    def close(self) -> None:
        """Give up all requests and end the engine thread."""
        with self._changed:
            self._accepting = False
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def check_room(self, images: int) -> None:
        """Refuse images that cannot wait now; `submit` does it too, but a request may take a while to prepare.

        Raises:
            QueueFull: If too many images wait.
        """
        with self._changed:
            waiting = self.waiting + images
            if waiting > self._limits.queue:
                raise QueueFull(
                    f"{waiting} images would wait, but the queue holds {self._limits.queue}. Try again later.",
                    self._backlog() * 0.5,
                )

    def _admit(self, order: Order) -> None:
        """Refuse an order that cannot be finished in time, or for which there is no room."""
        if not self._accepting or self.crashed is not None:
            raise BatcherStopped("the server is shutting down and accepts no requests. Ask another one, or later.")
        self.check_room(len(order.starts))
        request = order.ticket.request
        if request.seconds is not None:
            late = order.submitted + self._estimates.finished(self._orders, Work.left(order)) - order.deadline
            if late > 0:
                raise QueueFull(
                    f"the request would be finished in about {request.seconds + late:.1f} s, but its time limit is "
                    f"{request.seconds:g} s. Try again later, or ask for fewer steps.",
                    late,
                )

    def _backlog(self) -> float:
        """Estimate the seconds until everything that was accepted is finished."""
        return self._estimates.backlog(*map(Work.left, self._orders))

    def _programs(
        self, level: str, session: Session, table: SchedulerTable, first: int, paired: bool
    ) -> Mapping[Program, float]:
        """Count the calls of every program for an image; a call of half of the rows counts as a half."""
        if level == FULL:
            return {session.full: table.steps - first}
        calls: Counter[Program] = Counter()
        for engine in session.plan.schedule(table.log_snr[first:].tolist()):
            halved = paired and session.plan.engines[engine].halves
            calls[session.programs[engine]] += 1 if halved else 2
        return {program: halves / 2 for program, halves in calls.items()}

    def _position(self, order: Order) -> int | None:
        with self._changed:
            if order not in self._orders:
                return None
            if order.members:
                return 0
            before = self._orders[: self._orders.index(order)]
            return 1 + len({one.owner for one in before if one.starts} - {order.owner})

    def _preview(self, order: Order, images: int | None) -> Future[Array | None]:
        count = order.ticket.request.count if images is None else images

        def copy() -> Array | None:
            return self._decode(order, count) if 0 < count <= len(order.members) else None

        return self._errand(copy)

    def _decode(self, order: Order, count: int) -> Array:
        """Decode the current samples of the first images of a request."""
        samples = [self._device.to_array(member.sample) for member in order.members[:count]]
        return order.session.finish(np.concatenate(samples))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _errand(self, work: Callable[[], Result]) -> Future[Result]:
        """Let the engine thread do something between two calls."""
        errand = Errand(work)
        with self._changed:
            if self.crashed is not None or self._stopping:
                raise BatcherStopped("the engine thread has ended.")
            self._errands.append(errand)
            self._changed.notify_all()
        return errand.future

    def _run(self) -> None:
        """Drive the engines until the batcher is closed."""
        try:
            with self._device.stream():
                while self._prepare():
                    self._make_turn()
        except BaseException as error:
            logger.exception("the engine thread has ended")
            self.crashed = error
            if self._on_crash is not None:
                self._on_crash(error)
        finally:
            with self._changed:
                stopped = BatcherStopped("the engine thread has ended.")
                for order in self._orders:
                    fail(order, stopped)
                self._orders.clear()
                self._owners.clear()
                self._last_turn.clear()
                errands, self._errands = self._errands, []
                self._changed.notify_all()
            for errand in errands:
                errand.fail(stopped)

    def _prepare(self) -> bool:
        """Wait for work, run errands, drop orders that were given up, and fill seats; False at the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._orders or self._errands or self._stopping)
                if self._stopping:
                    return False
                self._drop()
                newcomers = self._seat()
                errand = self._errands.pop(0) if self._errands else None
            if errand is not None:  # one between two calls, or a flood of them would hold up all images
                errand.run()
            for order, start in newcomers:
                self._begin(order, start)
            if any(order.running for order in self._orders):
                return True

    def _drop(self) -> None:
        """Remove the orders that were cancelled or are late."""
        now = time.monotonic()
        for order in list(self._orders):
            if order.ticket.cancelled.is_set() or order.ticket.future.cancelled():
                if order.ticket.future.cancel() or order.ticket.future.cancelled():
                    order.ticket.future.set_running_or_notify_cancel()  # wakes up those who wait for it
            elif now > order.deadline:
                seconds = order.ticket.request.seconds
                fail(order, DeadlineExceeded(f"the request was not finished within its time limit of {seconds:g} s."))
            else:
                continue
            self._remove(order)

    def _remove(self, order: Order) -> None:
        self._orders.remove(order)
        for member in order.members:
            del self._last_turn[member], self._owners[member]
        self._changed.notify_all()

    def _seat(self) -> list[tuple[Order, Start]]:
        """Choose the images that get the free seats.

        Requests with few images on their way come first. In the turns that an image takes, a request becomes entitled
        to one more, so small requests that keep coming do not starve a large one.
        """
        if not any(order.starts for order in self._orders):
            return []
        running: Counter[object] = Counter()
        for order in self._orders:
            running[order.owner] += order.running
        free, chosen = self._limits.seats - running.total(), []
        while free > 0 and (candidates := [order for order in self._orders if order.starts]):
            order = min(candidates, key=lambda order: running[order.owner] - (self._turn - order.turn) / order.calls)
            chosen.append((order, order.starts.pop()))
            running[order.owner] += 1
            free -= 1
        return chosen

    def _begin(self, order: Order, start: Start) -> None:
        if order not in self._orders:  # another image of the same request could not begin
            return
        if order.began is None:
            order.began = time.monotonic()
        try:
            with taking_memory():
                member = Member(order.session, start, full_model=order.ticket.request.level == FULL)
        except UnetcError as error:
            with self._changed:
                fail(order, error)
                self._remove(order)
            return
        order.members.append(member)
        self._owners[member], self._last_turn[member] = order, self._turn

    def _make_turn(self) -> None:
        """Make one call, and advance its members."""
        self._turn += 1
        program, members = self._choose()
        orders = dict.fromkeys(self._owners[member] for member in members)
        for member, error in self._advance(program, members).items():
            if (order := self._owners.get(member)) is not None:  # else another image of the same request has failed too
                with self._changed:
                    fail(order, error)
                    self._remove(order)
        for order in orders:
            if order in self._orders:
                self._report(order)

    def _choose(self) -> tuple[Program, list[Member]]:
        """Choose the program and the members of the next call."""
        waiting = [(member, order) for order in self._orders for member in order.members if not member.finished]
        if len(waiting) == 1:  # one image needs no choice, which would take as long as a step of its scheduler
            member, _ = waiting[0]
            return member.call.program, [member]
        programs = {member.call.program for member, _ in waiting}

        def runs(program: Program) -> Program:
            """Run the full model as an engine that emits branches too, if that engine is called anyway."""
            return next((one for one in self._stand_ins.get(program, ()) if one in programs), program)

        units = min(order.units for _, order in waiting)  # one size for all, or small images always went first
        now, limited = time.monotonic(), [order for order in self._orders if order.deadline < math.inf]
        alone = {order: self._pace.alone(order.programs, order.units) for order in limited}
        candidates = []
        for member, order in waiting:
            program = runs(member.call.program)
            candidates.append(
                Waiting(
                    member=member,
                    key=(program, member.form),
                    rows=member.rows,
                    age=self._turn - self._last_turn[member],
                    seconds=self._pace.call(program, units),
                    urgent=order in alone and order.deadline - now < 2 * (1 - member.share) * alone[order],
                )
            )
        (program, _), members = choose(candidates, self._most)
        return program, members

    def _most(self, key: tuple[Program, object]) -> int:
        """Return the most rows of a call."""
        return self._largest.get(key[0], self._limits.rows)

    def _advance(self, program: Program, members: Sequence[Member]) -> dict[Member, UnetcError]:
        """Call a program for some members and advance them; return the members that cannot go on."""
        rows = sum(member.rows for member in members)
        units = sum(self._owners[member].units * member.part for member in members)
        padding = self._padding(rows)
        engine, phase = members[0].engine, members[0].phase
        began = time.perf_counter()
        try:
            with taking_memory():
                prediction = self._device.empty((rows + padding, *members[0].prediction_shape))
                emitted = program(join(members, padding, self._device), prediction)
        except UnetcError as error:
            if len(members) == 1:
                return {members[0]: error}
            if program not in self._complained:
                self._complained.add(program)
                logger.warning("a call of %d rows failed and is made again for each member: %s", rows, error)
            failed: dict[Member, UnetcError] = {}
            for member in members:
                failed |= self._advance(program, [member])
            return failed
        failed = self._share(program, members, prediction, emitted, rows + padding)
        seconds = time.perf_counter() - began
        self._pace.add(program, units, seconds)
        switched, self._last_program = program is not self._last_program, program
        if self._on_call is not None:
            self._on_call(
                CallRecord(
                    level=self._owners[members[0]].ticket.request.level,
                    engine=engine,
                    phase=phase,
                    rows=rows,
                    padding=padding,
                    rollouts=len(members),
                    seconds=seconds,
                    switched=switched,
                )
            )
        return failed

    def _share(
        self, program: Program, members: Sequence[Member], prediction: Tensor, emitted: Mapping[str, Tensor], of: int
    ) -> dict[Member, UnetcError]:
        """Advance members by their rows of a call; return those that cannot go on."""
        finite, failed, start = False, {}, 0
        with suppress(UnetcError), taking_memory():  # without room for all rows, each member asks for its own
            finite = self._device.is_finite(prediction)
        for member in members:
            stop = start + member.rows
            own = Rows(prediction, start, stop, of).take(self._device)
            try:
                with taking_memory():
                    if finite or self._device.is_finite(own):
                        member.advance(own, {name: Rows(value, start, stop, of) for name, value in emitted.items()})
                    else:
                        member.repeat(program)
            except UnetcError as error:
                failed[member] = error
            self._last_turn[member] = self._turn
            start = stop
        return failed

    def _padding(self, rows: int) -> int:
        """Count the rows that are added so that a call has a shape that the device is prepared for."""
        if not self._device.captures_shapes:
            return 0
        return next((size - rows for size in self._limits.prepared if size >= rows), 0)

    def _report(self, order: Order) -> None:
        """Tell a request's owner about its progress, or hand over its images."""
        ticket, members = order.ticket, order.members
        slowest = min(members, key=lambda member: member.step)
        done = 0 if order.starts else slowest.made
        progress = Progress(done=done, steps=order.calls, phase=slowest.phase, engine=slowest.engine)
        if progress != ticket.progress:
            ticket.progress = progress
            if order.on_step is not None:
                order.on_step(progress)
        if order.starts or not all(member.finished for member in members):
            return
        try:
            with taking_memory():
                images = self._decode(order, len(members))
        except UnetcError as error:
            fail(order, error)
        else:
            now, began = time.monotonic(), order.began or order.submitted
            if not ticket.future.cancelled() and ticket.future.set_running_or_notify_cancel():
                ticket.future.set_result(
                    SampleResult(
                        images=images,
                        level=ticket.request.level,
                        steps=order.calls,
                        non_finite_steps=sum(member.non_finite_steps for member in members),
                        waited=began - order.submitted,
                        took=now - order.submitted,
                    )
                )
        with self._changed:
            self._remove(order)


def _stand_ins(sessions: Iterable[Session]) -> Mapping[Program, tuple[Program, ...]]:
    """List the engines that compute everything and emit branches too, by the full model that they can replace."""
    found: dict[Program, dict[Program, None]] = {}
    for session in sessions:
        engine = session.programs[FULL_ENGINE]
        if engine is not session.full:
            found.setdefault(session.full, {})[engine] = None
    return {full: tuple(engines) for full, engines in found.items()}
