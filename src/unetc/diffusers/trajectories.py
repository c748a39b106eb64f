"""Find the trajectory that a call continues.

A cached branch may be used only by the trajectory that computed it. Pipelines do not tell their denoiser which
trajectory a call belongs to, and several may take turns: sequential guidance, tiles, two pipelines, a run that was
cancelled. A call continues an earlier one with one of three proofs:

- Its samples are a linear combination of earlier samples and predictions, up to rounding, and not just a multiple of
  one of them. Deterministic schedulers make such samples, also from a prediction that they clip to -1..1.
- Its timestep is the next element of the tensor that holds the earlier timestep, no other call has had the earlier
  element and the same conditions, and the rest that such a combination leaves has the size of the noise that a
  stochastic scheduler adds between the two noise levels. A scheduler makes a new tensor of timesteps for every run.

- In a part of the image its samples are such a combination, and in the rest a combination of earlier samples alone, as
  in inpainting. See `parts`.

Trajectories from the same noise have calls in common. So an earlier call of one trajectory may explain the samples of
another one. Where several trajectories explain a call, it continues the one whose last prediction is in its samples.

A call without proof begins a new trajectory, which reuses nothing.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor

from unetc.device import Array
from unetc.runtime.rollout import Rollout

from .parts import Proof, prove

logger = logging.getLogger(__name__)

LIVE = 8
"""Trajectories that may take turns; each holds the branches that its engines emitted.

When a new trajectory begins, those whose run has made its last timestep lose their branches: a device may have no room
for those of several images. A timestep that is passed as a number does not tell that it is the last.
"""

_HISTORY = 6
"""Calls of a trajectory that a multistep scheduler may combine."""

_ROUNDING = {torch.float16: 1e-5, torch.bfloat16: 1e-3}
_ROUNDING_OTHERS = 1e-6
"""Largest unexplained share of the samples' energy that rounding leaves, by the type of the samples."""

_SAME = 16.0
"""Unexplained share of a sample that is a multiple of another one, in squares of the type's rounding error."""

_NEEDED = 10.0
"""A prediction is needed if the unexplained share grows this many times without it."""

_CLOSE = 1e-11
"""Energy of the difference of two predictions for samples that differ by rounding, relative; models enlarge it."""

_CLOSE_TIMESTEPS = 1e-6
"""Difference of timesteps that differ by rounding, relative, or absolute near zero."""

_MOST_NOISE = 0.9
"""Unexplained share above which a sample could be any other one."""

_NOISE_MARGIN = 0.15
"""Accepted relative error of the variance of a scheduler's noise; few elements make it vary."""

_ELEMENTS = 4096
"""Elements of a sample that a proof looks at, about."""

_ELEMENTS_PER_VECTOR = 4
"""A proof needs this many times more elements than vectors to combine, or anything could be explained."""


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a timestep among all timesteps of a run."""

    run: int
    """Address of the run's timesteps."""
    index: int
    timesteps: Tensor
    """Keeps their memory, so that no other run can have the same address."""

    @classmethod
    def of(cls, timestep: Tensor | float) -> Self | None:
        """Find the place of a timestep; None if it is not an element of a larger tensor."""
        if not isinstance(timestep, Tensor) or (timestep.numel() != 1 and any(timestep.stride())):
            return None
        storage = timestep.untyped_storage()
        if storage.nbytes() < 2 * timestep.element_size():
            return None
        if _all_of(timestep).eq(timestep.flatten()[0]).all():  # one timestep several times, for a batch
            return None
        return cls(storage.data_ptr(), int(timestep.storage_offset()), timestep)

    @property
    def is_last(self) -> bool:
        """Whether no timestep of the run comes after it."""
        return self.index + 1 == _count(self.timesteps)

    def may_follow(self, other: Place) -> bool:
        """Check whether a place may be the next after another one, or the same.

        Loops may make a new copy of all timesteps for every step.
        """
        if self.run == other.run:
            return True
        own, others = _all_of(self.timesteps), _all_of(other.timesteps)
        return self.index - other.index in (0, 1) and own.device == others.device and torch.equal(own, others)


def _all_of(element: Tensor) -> Tensor:
    """Return the whole tensor that holds an element."""
    return element.as_strided((_count(element),), (1,), 0)


def _count(element: Tensor) -> int:
    """Count the elements of the whole tensor that holds an element."""
    return element.untyped_storage().nbytes() // element.element_size()


@dataclass(frozen=True, slots=True)
class Call:
    """A call before its prediction."""

    sample: Array
    """Input samples of the denoiser, [batch, channel, height, width]."""
    dtype: torch.dtype
    """Type of the samples in the pipeline."""
    timestep: float
    log_snr: float
    place: Place | None
    conditions: str
    """Hash of the conditions, without ControlNet inputs: those change from step to step."""

    @property
    def repeats(self) -> bool:
        """Whether the second half of the rows has the samples of the first, as in a pipeline that guides."""
        return len(self.sample) % 2 == 0 and _repeats(self.sample, 2)


@dataclass(slots=True)
class _Node:
    """Samples of a trajectory, and all predictions made for them; calls with other conditions share a node."""

    timestep: float
    log_snr: float
    sample: Array
    predictions: list[Array] = field(default_factory=list)

    def is_of(self, call: Call) -> bool:
        """Check whether a call has the same samples at the same timestep."""
        return self.timestep == call.timestep and np.array_equal(self.sample, call.sample)


@dataclass(slots=True, eq=False)
class Trajectory:
    """A rollout, and where it stands."""

    rollout: Rollout
    last: Call
    shared: bool = False
    """Whether another trajectory of the run has the same timesteps and conditions."""
    split: bool = False
    """Whether a call had equal samples in both halves, and other predictions in the second."""
    guided: bool = False
    """Whether the samples after such a call were equal again: then the pipeline combines both predictions."""
    cut_off: str = ""
    """Why it does not continue the trajectory that its first samples come from; empty if nothing shows that."""
    nodes: deque[_Node] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    predicted: Array | None = None
    """Its own prediction for the last samples; others may share them, with other conditions."""


class Trajectories:
    """The trajectories that calls may continue."""

    def __init__(self, begin: Callable[[], Rollout], *, reuses: bool) -> None:
        """Know no trajectory.

        Args:
            begin: Begins a rollout.
            reuses: Whether rollouts reuse anything, so that a missing proof costs time.
        """
        self._begin = begin
        self._reuses = reuses
        self._live: list[Trajectory] = []
        """Most recently continued first."""
        self._ended: deque[Trajectory] = deque(maxlen=LIVE)
        """Trajectories that made room, without their branches; their next calls may still come."""
        self._warned = False

    def clear(self) -> None:
        """Forget all trajectories."""
        self._live.clear()
        self._ended.clear()

    def of(self, call: Call) -> Trajectory:
        """Return the trajectory that a call continues, or a new one."""
        alike = [one for one in self._live if _fits(one, call)]
        candidates = [one for one in alike if call.timestep <= one.last.timestep and not _of_other_runs(one, call)]
        tolerance, rests = _ROUNDING.get(call.dtype, _ROUNDING_OTHERS), []
        for one in candidates:
            rests.append(_rest(call, one))
        explained = [one for one, rest in zip(candidates, rests, strict=True) if rest and max(rest) <= tolerance]
        if own := self._only(call, explained, tolerance):
            return self._continue(own, call)
        shared = False
        if call.place is not None:
            run = [one for one in alike if _same_run(one, call)]
            shared = any(one.shared or _place(one) == call.place.index for one in run)
            for one in run:
                one.shared = shared
            before = [
                (one, rest)
                for one, rest in zip(candidates, rests, strict=True)
                if _same_run(one, call) and _place(one) == call.place.index - 1
            ]
            for one, rest in () if shared or explained else before:
                if rest is not None and _is_noise(rest, call, one):
                    return self._continue(one, call)
        new = Trajectory(rollout=self._begin(), last=call, shared=shared)
        if self._reuses:
            for one, rest in () if explained else zip(candidates, rests, strict=True):
                if rest is None or call.timestep >= one.last.timestep or not _same_run(one, call):
                    continue
                if (proof := _in_parts(call, one, tolerance)) is Proof.WHOLE:
                    return self._continue(one, call)
                if proof is Proof.PART and not new.nodes:
                    new.nodes.extend(one.nodes)  # the next call may be explained as a whole
                    new.cut_off = "no scheduler makes a part of its samples from earlier ones"
            self._explain(call, new, candidates, rests, several=bool(explained))
        self._release_finished()
        if len(self._live) >= LIVE:  # calls that nothing proved, and that nothing continued, make room first
            lone = [one for one in self._live if one.last.place is None and len(one.nodes) < 2]
            ended = lone[-1] if lone else self._live[-1]
            self._live.remove(ended)
            self._ended.appendleft(replace(ended, rollout=self._begin()))
            if self._reuses and _same_run(ended, call):
                self._warn(f"more than {LIVE} trajectories take turns, so the oldest lose their branches")
        self._live.insert(0, new)
        return new

    def add(self, trajectory: Trajectory, prediction: Array) -> None:
        """Add the prediction of a trajectory's last call, [batch, channel, height, width].

        Channels beyond the samples' own hold a predicted variance, which no scheduler adds to the samples.
        """
        call = trajectory.last
        trajectory.split |= call.repeats and not _repeats(prediction, 2)
        own = (one for one in self._live if one.nodes and (call.place is None or _same_run(one, call)))
        node = next((one.nodes[-1] for one in own if one.nodes[-1].is_of(call)), None)
        if node is None:
            node = _Node(call.timestep, call.log_snr, call.sample)
        predicted = prediction[:, : call.sample.shape[1]]
        known = next((one for one in node.predictions if np.array_equal(one, predicted)), None)
        if known is None:  # otherwise from an equal run before
            node.predictions.append(predicted)
        trajectory.predicted = predicted if known is None else known
        if not (trajectory.nodes and trajectory.nodes[-1] is node):
            trajectory.nodes.append(node)

    def _release_finished(self) -> None:
        """Release the branches of trajectories whose run has made its last timestep.

        A run that lost its proof on the way has several trajectories, one after another; tiles have several at once.
        """
        finished = [one for one in self._live if one.last.place is not None and one.last.place.is_last]
        for one in self._live:
            after = [other for other in finished if _fits(one, other.last) and _same_run(one, other.last)]
            if one in finished or (after and not one.shared):
                one.rollout = self._begin()

    def drop(self, trajectory: Trajectory) -> None:
        """Forget a trajectory whose last call failed."""
        self._live = [one for one in self._live if one is not trajectory]

    def _only(self, call: Call, explained: list[Trajectory], tolerance: float) -> Trajectory | None:
        """Choose the trajectory that a call continues from the trajectories that explain it; None if it is not sure.

        A trajectory with other conditions may explain the call too: its prompt may have changed just now. A trajectory
        that made room may do so as well.

        Args:
            call: The call.
            explained: The trajectories with the same conditions that explain it.
            tolerance: Largest unexplained share that rounding leaves.
        """
        if not explained:
            return None
        nodes = [one.nodes[-1] for one in explained]
        rivals = (
            one
            for one in (*self._live, *self._ended)
            if one.nodes
            and not any(one.nodes[-1] is node for node in nodes)
            and not any(one is other for other in explained)
            and one.last.sample.shape == call.sample.shape
            and call.timestep <= one.last.timestep
            and not _of_other_runs(one, call)
        )
        left = [one for one in explained if _same_run(one, call)] or explained
        if not _alike(left, call.dtype) or any((rest := _rest(call, one)) and max(rest) <= tolerance for one in rivals):
            left = [one for one in left if _needs(call, one, one.nodes[-1].predictions)]
            if not _alike(left, call.dtype):
                left = [one for one in left if one.predicted is not None and _needs(call, one, [one.predicted])]
            if not _alike(left, call.dtype):
                left = _best(call, left)
        return left[0] if left and _alike(left, call.dtype) else None

    def _explain(
        self,
        call: Call,
        new: Trajectory,
        candidates: list[Trajectory],
        rests: list[list[float] | None],
        *,
        several: bool,
    ) -> None:
        """Warn that a call begins a new trajectory, if it seems to continue an earlier one.

        A prompt may change once, and inpainting pastes once before anything explains it. So these are said only if the
        earlier call was cut off too.
        """
        if self._warned:
            return
        earlier = [one for one in candidates if call.timestep < one.last.timestep]
        said = f"nothing proves which trajectory the call at timestep {call.timestep:g} continues: "
        if new.cut_off:
            if any(one.cut_off == new.cut_off and len(one.nodes) > 1 for one in earlier):
                self._warn(said + new.cut_off)
        elif earlier:
            reason = "its timestep is not an element of the scheduler's timesteps"
            if call.place is not None:
                reason = "no scheduler makes its samples from earlier ones"
                if any(rest is not None and max(rest) > _MOST_NOISE for rest in rests):
                    reason = "nearly all of its samples is new noise, or they belong to another image"
            if several:
                reason = "several runs from the same noise explain its samples"
            if new.shared:
                reason = "several calls have the same timestep and the same conditions (tiles?)"
            self._warn(said + reason)
        else:
            self._explain_cut(call, new)

    def _explain_cut(self, call: Call, new: Trajectory) -> None:
        """Find the trajectory that a call would continue with other conditions, or with another tensor of timesteps."""
        tolerance = _ROUNDING.get(call.dtype, _ROUNDING_OTHERS)
        for one in self._live:
            if one.last.sample.shape != call.sample.shape or call.timestep >= one.last.timestep:
                continue
            rest = _rest(call, one)
            if rest is None or max(rest) > tolerance:
                continue
            if one.last.conditions != call.conditions:
                new.cut_off = "the conditions differ from the last step's"
                advice = "keep the embeddings of a run as they are"
            else:
                new.cut_off = "its timestep is in another tensor than the last one"
                advice = "pass elements of scheduler.timesteps"
            if one.cut_off == new.cut_off:
                self._warn(f"the call at timestep {call.timestep:g} begins a new trajectory: {new.cut_off}", advice)
            return

    def _warn(
        self,
        problem: str,
        advice: str = "pass elements of scheduler.timesteps, or use one drop-in for each trajectory",
    ) -> None:
        """Warn once that time is lost."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s. Nothing is reused in such calls, so they save less time. The images stay right. To save more, %s.",
                problem,
                advice,
            )

    def _continue(self, trajectory: Trajectory, call: Call) -> Trajectory:
        trajectory.guided |= trajectory.split and call.repeats and call.timestep < trajectory.last.timestep
        trajectory.last = call
        self._live.remove(trajectory)
        self._live.insert(0, trajectory)
        return trajectory


def _place(trajectory: Trajectory) -> int | None:
    return None if trajectory.last.place is None else trajectory.last.place.index


def _fits(trajectory: Trajectory, call: Call) -> bool:
    """Check whether a trajectory has the conditions and the shape of a call."""
    return trajectory.last.conditions == call.conditions and trajectory.last.sample.shape == call.sample.shape


def _same_run(trajectory: Trajectory, call: Call) -> bool:
    place = trajectory.last.place
    return place is not None and call.place is not None and place.run == call.place.run


def _of_other_runs(trajectory: Trajectory, call: Call) -> bool:
    """Check whether the timesteps prove that a call belongs to another run."""
    place = trajectory.last.place
    return place is not None and call.place is not None and not call.place.may_follow(place)


def _best(call: Call, trajectories: list[Trajectory]) -> list[Trajectory]:
    """Choose the trajectories that explain a call best; the first steps of some schedulers differ by rounding alone."""
    rests = [max(_rest(call, one) or [math.inf]) for one in trajectories]
    limit = max(_NEEDED * min(rests, default=0.0), _SAME * torch.finfo(call.dtype).eps ** 2)
    return [one for one, rest in zip(trajectories, rests, strict=True) if rest <= limit]


def _alike(trajectories: list[Trajectory], dtype: torch.dtype) -> bool:
    """Check whether all trajectories have the same last samples and predictions, so that any may go on.

    Schedulers scale their samples and compute their timesteps in different ways, so both may differ by rounding.
    """
    exact = _SAME * torch.finfo(dtype).eps ** 2
    return all(
        math.isclose(
            one.nodes[-1].timestep,
            first.nodes[-1].timestep,
            rel_tol=_CLOSE_TIMESTEPS,
            abs_tol=_CLOSE_TIMESTEPS,  # those of EDM cross zero
        )
        and _distance(one.nodes[-1].sample, first.nodes[-1].sample) <= exact
        and _distance(one.predicted, first.predicted) <= max(exact, _CLOSE)
        for first, one in pairwise(trajectories)
    )


def _distance(one: Array | None, other: Array | None) -> float:
    """Compute the energy of a difference relative to one of the two arrays."""
    if one is other or one is None or other is None:
        return 0.0 if one is other else math.inf
    return float(np.square(one - other, dtype=np.float64).sum() / (np.square(one, dtype=np.float64).sum() or 1.0))


def _needs(call: Call, trajectory: Trajectory, last: list[Array]) -> bool:
    """Check whether only some last predictions of a trajectory explain a call; every scheduler uses its last one."""
    rounding = _SAME * torch.finfo(call.dtype).eps ** 2
    rows = zip(_rows(call, trajectory), _rows(call, trajectory, without=last), strict=True)
    return any(
        _unexplained(wanted, [*samples, *others])
        > max(rounding, _NEEDED * _unexplained(wanted, [*samples, *predictions]))
        for (wanted, samples, predictions), (_, _, others) in rows
    )


def _rest(call: Call, trajectory: Trajectory) -> list[float] | None:
    """Compute the share of every sample's energy that a trajectory's samples and predictions leave unexplained.

    Guidance combines predictions for equal samples, so a row's vectors include the predictions of its equals.

    Returns:
        A share for each distinct row, 0 to 1; None if nothing can be said.
    """
    if not trajectory.nodes or len(trajectory.nodes[-1].sample) != len(call.sample):
        return None
    shares = []
    for wanted, samples, predictions in _rows(call, trajectory):
        # A multiple of one earlier sample is another run from the same noise, at a lower timestep.
        if any(_unexplained(wanted, [one]) <= _SAME * torch.finfo(call.dtype).eps ** 2 for one in samples):
            return None
        shares.append(_unexplained(wanted, [*samples, *predictions]))
    return shares


def _rows(
    call: Call, trajectory: Trajectory, without: Sequence[Array] = ()
) -> Iterator[tuple[Array, list[Array], list[Array]]]:
    """List the distinct rows of a call, each with the samples and the predictions that a scheduler may combine.

    Args:
        call: The call.
        trajectory: The trajectory with the samples and predictions.
        without: Predictions that are left out.
    """
    rows = len(call.sample)
    blocks = max(count for count in (1, 2, 3) if rows % count == 0 and _repeats(call.sample, count))
    distinct = rows // blocks
    for row in range(distinct):
        samples = [node.sample[row] for node in trajectory.nodes]
        predictions = [
            one[row + block * distinct]
            for node in trajectory.nodes
            for one in node.predictions
            if not any(one is other for other in without)
            for block in range(blocks)
        ]
        if blocks == 1 and not without:
            predictions += _clipped(samples[-1], predictions[-1], trajectory.nodes[-1].log_snr)
        yield call.sample[row], samples, predictions


def _in_parts(call: Call, trajectory: Trajectory, tolerance: float) -> Proof:
    """Look for proofs in parts of every distinct row; the weakest counts."""
    proofs = {prove(*row, tolerance) for row in _rows(call, trajectory)}
    return next(proof for proof in (Proof.NONE, Proof.PART, Proof.WHOLE) if proof in proofs)


def _is_noise(rest: list[float], call: Call, trajectory: Trajectory) -> bool:
    """Check whether the unexplained shares are the noise that a stochastic scheduler adds.

    Ancestral steps, SDE steps and DDPM add the variance of the posterior. DDPM with a large variance adds more, and LCM
    draws all noise anew. Where nearly everything is noise, nothing can be told.

    Source:
        Ho et al. 2020, arXiv:2006.11239, section 3.2, for both variances of DDPM.
    """
    before, after = trajectory.last.log_snr, call.log_snr
    if after <= before:
        return False
    signal_before, signal = (1 / (1 + math.exp(-level)) for level in (before, after))
    added = 1 - signal_before / signal
    variances = (1 - signal) / (1 - signal_before) * added, added, 1 - signal
    energies = [float(np.square(sample, dtype=np.float64).mean()) for sample in call.sample[: len(rest)]]
    return all(
        share <= _MOST_NOISE and any(abs(share * energy / variance - 1) <= _NOISE_MARGIN for variance in variances)
        for share, energy in zip(rest, energies, strict=True)
    )


def _clipped(sample: Array, prediction: Array, log_snr: float) -> list[Array]:
    """Clip the denoised sample to -1..1, for a prediction of the noise, of v and of the sample."""
    signal = 1 / (1 + math.exp(-log_snr))
    alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
    denoised = (sample - sigma * prediction) / max(alpha, 1e-6), alpha * sample - sigma * prediction, prediction
    return [np.clip(one, -1, 1) for one in denoised]


def _repeats(sample: Array, count: int) -> bool:
    """Check whether a batch is the same samples several times."""
    first, *others = np.split(sample, count)
    return all(np.array_equal(first, other) for other in others)


def _unexplained(sample: Array, vectors: list[Array]) -> float:
    """Compute the share of an array's energy that no linear combination of others of its shape explains."""
    stride = max(1, sample.size // _ELEMENTS)  # as good a proof as all elements, and quick on large samples
    wanted, *columns = (array.ravel()[::stride].astype(np.float64) for array in (sample, *vectors))
    if len(wanted) < _ELEMENTS_PER_VECTOR * len(columns):
        return 1.0
    matrix = np.stack(columns, axis=1)
    weights, *_ = np.linalg.lstsq(matrix, wanted)
    freedom = 1 - len(columns) / len(wanted)  # vectors explain a part of any noise by chance
    return float(np.square(wanted - matrix @ weights).sum() / (np.square(wanted).sum() or 1.0) / freedom)
