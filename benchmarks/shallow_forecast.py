"""Correct the forecast of a deep branch by the change of the shallow part, which is computed anyway.

The shallow part is the skip connection beside the branch: the decoder's next block joins both. At a skipped step the
engine computes the skip, then the branch is

    last + own · (last - earlier) + shallow · (skip - forecast of the skip)

with a number per channel and a matrix over channels, both fitted by least squares for each step. The straight line has
the extrapolation factor in place of `own`, and no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import numpy as np
from lever_models import CALIBRATED, CALIBRATED_SEED, Regime
from numpy.typing import NDArray

from unetc.artifacts.plan import Assignment, Plan
from unetc.artifacts.profile import Component
from unetc.backend import Array, Program
from unetc.device import Device, Tensor
from unetc.treatments import COMPUTED, EARLIER, EXTRAPOLATION, HELD, Treatment

RIDGE = 1e-6
"""Penalty on the weights, as a share of the mean square of their tensors."""


class Rule(StrEnum):
    """Parts of the correction that are fitted."""

    REACH = "fitted slope per channel"
    """The number per channel alone: a control that looks at no shallow part."""
    SHALLOW = "line and shallow part"
    """The matrix alone."""
    BOTH = "fitted slope and shallow part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of one step."""

    own: NDArray[np.float32]
    """[channel of the branch]."""
    shallow: NDArray[np.float32]
    """[channel of the branch, channel of the skip]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A level and the skip connection beside it."""

    level: Component
    skip: Component

    @classmethod
    def of(cls, components: Sequence[Component], level: str) -> Place:
        """Find the skip beside a level: it is the component that follows."""
        at = next(i for i, component in enumerate(components) if component.name == level)
        found = cls(level=components[at], skip=components[at + 1])
        assert found.skip.kind == "skip"
        return found

    def emitted(self, plan: Plan) -> Plan:
        """Let every engine that emits the level emit the skip too."""
        engines = [
            msgspec.structs.replace(own, emits=(*own.emits, self.skip.name)) if self.level.name in own.emits else own
            for own in plan.engines
        ]
        return msgspec.structs.replace(plan, engines=tuple(engines))


class Corrected:
    """An engine that forecasts the level, and is called twice: for the skip, then with the corrected branch."""

    def __init__(self, program: Program, place: Place, weights: Mapping[float, Weights], device: Device) -> None:
        """Wrap an engine.

        Args:
            program: The engine, which emits the skip.
            place: The level.
            weights: Weights by timestep.
            device: Where the program computes.
        """
        self._program, self._weights, self._device = program, weights, device
        self._level, self._skip = place.level.index, place.skip.index

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run; the skip of this step is not emitted, as the branch is not."""
        array = self._device.to_array
        name = f"{COMPUTED}{self._skip}"
        skip = array(self._program(inputs, output)[name])
        last, earlier, last_skip, earlier_skip = (
            array(inputs[f"{prefix}{index}"]) for index in (self._level, self._skip) for prefix in (HELD, EARLIER)
        )
        factor = float(array(inputs[f"{EXTRAPOLATION}{self._skip}"])[0])
        surprise = skip - (last_skip + np.float32(factor) * (last_skip - earlier_skip))
        weights = self._weights[float(array(inputs["timestep"])[0])]
        branch = last + weights.own[:, None, None] * (last - earlier)
        branch += np.einsum("ds,bshw->bdhw", weights.shallow, surprise, optimize=True)
        corrected = {f"{HELD}{self._level}": branch, f"{EARLIER}{self._level}": branch}
        emitted = self._program({**inputs, **corrected}, output)
        return {key: value for key, value in emitted.items() if key != name}


class Recorder:
    """Engine 0, which keeps the level and the skip of every call."""

    def __init__(self, program: Program, place: Place, device: Device) -> None:
        self._program, self._device = program, device
        self._names = [f"{COMPUTED}{component.index}" for component in (place.level, place.skip)]
        self.found: list[tuple[Array, Array]] = []
        """Level and skip by step, each [sample, channel, height, width]."""

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run."""
        emitted = self._program(inputs, output)
        level, skip = (self._device.to_array(emitted[name]) for name in self._names)
        self.found.append((level, skip))
        return emitted


def record_branches(regime: Regime, plan: Plan, place: Place) -> list[tuple[Array, Array]]:
    """Record the level and the skip at every step of the full model's trajectories."""
    engine = Assignment(treatments={}, emits=(place.level.name, place.skip.name))
    phases = (msgspec.structs.replace(plan.phases[0], high=plan.phases[-1].high, cycle=(0,)),)
    whole = msgspec.structs.replace(plan, engines=(engine,), phases=phases)
    (program,) = regime.load(whole)
    recorder = Recorder(program, place, regime.backend.device)
    regime.session(whole, [recorder]).sample(CALIBRATED, seed=CALIBRATED_SEED)
    return recorder.found


def fit_steps(
    regime: Regime, plan: Plan, place: Place, found: Sequence[tuple[Array, Array]], rule: Rule
) -> dict[float, Weights]:
    """Fit the weights of every step that forecasts the level, on the full model's trajectories."""
    timesteps = regime.table.timesteps.astype(np.float32).tolist()
    weights, computed = {}, []
    for step, engine in enumerate(plan.schedule(regime.table.log_snr.tolist())):
        own = plan.engines[engine]
        if place.level.name in own.emits:
            computed.append(step)
        elif own.treatments.get(place.level.name) is Treatment.FORECAST:
            last, before = computed[-1], computed[-2:][0]
            distance = timesteps[last] - timesteps[before]
            factor = (timesteps[step] - timesteps[last]) / distance if distance else 0.0
            weights[timesteps[step]] = fit(found[step], found[last], found[before], factor, rule)
    return weights


def fit(
    now: tuple[Array, Array], last: tuple[Array, Array], before: tuple[Array, Array], factor: float, rule: Rule
) -> Weights:
    """Fit the weights of one step by least squares over all positions of all samples.

    Args:
        now: Level and skip of the step, each [sample, channel, height, width].
        last: Those of the last computed step.
        before: Those of the computed step before it.
        factor: Extrapolation factor of the straight line.
        rule: Parts that are fitted.
    """
    change, slope = _rows(now[0] - last[0]), _rows(last[0] - before[0])
    surprise = _rows(now[1] - last[1] - np.float32(factor) * (last[1] - before[1]))
    own = np.full(len(change), factor, dtype=np.float32)
    shallow = np.zeros((len(change), len(surprise)), dtype=np.float32)
    for channel in range(len(change)):
        if rule is Rule.SHALLOW:
            shallow[channel] = _solve(surprise, change[channel] - factor * slope[channel])
        elif rule is Rule.REACH:
            own[channel] = _solve(slope[channel : channel + 1], change[channel]).item()
        else:
            solved = _solve(np.concatenate([slope[channel : channel + 1], surprise]), change[channel])
            own[channel], shallow[channel] = solved[0], solved[1:]
    return Weights(own=own, shallow=shallow)


def _rows(tensor: Array) -> NDArray[np.float64]:
    """Arrange a tensor as [channel, sample and position]."""
    return np.moveaxis(tensor, 1, 0).reshape(tensor.shape[1], -1).astype(np.float64)


def _solve(features: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the weights of features, [feature, position], that come closest to a target, [position]."""
    squares = features @ features.T
    scale = np.sqrt(np.maximum(np.diag(squares), np.finfo(np.float64).tiny))
    scaled = squares / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    solved: NDArray[np.float64] = np.linalg.solve(scaled, features @ target / scale) / scale
    return solved
