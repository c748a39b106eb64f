"""Run the gated graph along trajectories."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from unetc.artifacts.profile import GUIDANCE
from unetc.backend import Array, Backend, Loader, Program
from unetc.compiler.graph.gate import gate_values
from unetc.compiler.graph.gated import HOLDS, GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.device import Tensor
from unetc.runtime.branch_cache import BranchCache
from unetc.sampler.prediction_type import PredictionType
from unetc.treatments import COMPUTED, HELD, Treatment


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCall:
    """Time and memory of a call, measured before any plan of the work."""

    load_s: float
    """Seconds that loading the graph took."""
    call_s: float
    """Seconds of the second call."""
    branch_bytes: int
    """Bytes of all branches, per sample."""


class GatedDenoiser:
    """A gated graph on a backend, with the conditions of some samples."""

    def __init__(
        self,
        gated: GatedGraph,
        backend: Backend,
        conditions: Conditions = UNCONDITIONAL,
        prediction_type: PredictionType | None = None,
    ) -> None:
        """Load the weights.

        Args:
            gated: The graph.
            backend: Where to run it.
            conditions: Conditions of each sample. A batch holds all samples, once or several times.
            prediction_type: How the denoised sample follows from a prediction; None if it is never reused.
        """
        self._gated = gated
        self._condition(conditions)
        self._device = backend.device
        self.prediction_type = prediction_type
        """How the denoised sample follows from a prediction; None if it is never reused."""
        self._forms = _Forms(gated, backend.open_weights(gated.read_weights()))
        self._no_means = np.zeros(gated.channels, dtype=np.float32)

    def of_first(self, samples: int) -> GatedDenoiser:
        """Return a denoiser of the first samples; it shares the loaded programs."""
        other = copy.copy(self)
        other._condition(self._conditions(samples))
        return other

    def _condition(self, conditions: Conditions) -> None:
        """Take conditions: sample k of a call gets row k, modulo their number."""
        self._conditions = functools.cache(lambda rows: conditions.take(range(rows)))
        self._own = functools.cache(lambda rows: replace(conditions.take(range(rows)), negative={}))

    def try_call(self, sample: Array, timestep: float) -> FirstCall:
        """Measure a call that emits all branches, for samples [batch, channel, height, width]."""
        begin = time.perf_counter()
        program = self._forms.emitting
        loaded = time.perf_counter()
        _, emitted = self._run(program, sample, timestep, {}, {})
        size = sum(self._device.to_array(branch).nbytes for branch in emitted.values())
        ran = time.perf_counter()
        self._run(program, sample, timestep, {}, {})
        call_s = time.perf_counter() - ran
        return FirstCall(load_s=loaded - begin, call_s=call_s, branch_bytes=size // len(sample))

    def gates(self, treatments: Mapping[str, Treatment], batch: int) -> Array:
        """Return the gates of one assignment for a batch, [batch, component, 2]."""
        return np.repeat(gate_values(self._gated.components, treatments)[None], batch, axis=0)

    def predict(self, sample: Array, timestep: float, *, gates: Array, means: Array) -> Array:
        """Run the denoiser.

        Args:
            sample: Input of the denoiser, [batch, channel, height, width].
            timestep: The scheduler's value.
            gates: [batch, component, 2].
            means: [channel of all components].

        Returns:
            The guided prediction; it has more channels than the sample if the denoiser also predicts a variance.
        """
        predicted, _ = self._run(self._forms.gated, sample, timestep, {"gates": gates}, {"means": means})
        return self._guided(predicted, sample)

    def branch_means(self, sample: Array, timestep: float) -> Array:
        """Measure the mean of every branch per channel at a timestep, [channel of all components]."""
        inputs = self._conditions(len(sample)).widen(sample, timestep, gates=self.gates({}, len(sample)))
        return self._call(self._forms.observing, {**inputs, "means": self._no_means}, (self._gated.channels,))[0]

    def compute_branches(self, sample: Array, timestep: float, cache: BranchCache, *, log_snr: float) -> Array:
        """Run the denoiser with all components kept, and store every branch and the denoised sample in a cache.

        Args:
            sample: Input of the denoiser, [batch, channel, height, width].
            timestep: The scheduler's value.
            cache: Where to store them.
            log_snr: The noise level.
        """
        predicted, emitted = self._run(self._forms.emitting, sample, timestep, {}, {})
        cache.store(emitted, timestep)
        if (kind := self.prediction_type) is not None:
            cache.store_denoised(kind, self._widened(sample), predicted, timestep, log_snr)
        return self._guided(predicted, sample)

    def recall(
        self,
        sample: Array,
        timestep: float,
        cache: BranchCache,
        *,
        log_snr: float,
        treatments: Mapping[int, Treatment],
        holds: Array,
    ) -> Array:
        """Run the denoiser with branches that a treatment makes of earlier ones.

        Args:
            sample: [batch, channel, height, width].
            timestep: The scheduler's value.
            cache: Branches of earlier steps, from a batch of the same size.
            log_snr: The noise level.
            treatments: By component index, a treatment that reuses branches.
            holds: [batch, component], 1 where a sample's component gets its treatment.
        """
        inputs = cache.inputs(timestep, rows=1)
        for index, treatment in treatments.items():
            recall = treatment.row.recall
            assert recall is not None
            own = inputs
            if treatment.row.of_x0:
                assert self.prediction_type is not None
                implied = cache.denoised_inputs(self.prediction_type, self._widened(sample), log_snr)
                own = inputs | {f"{prefix}{index}": value for prefix, value in implied.items()}
            inputs[f"{HELD}{index}"] = recall(partial(self._array_of, own, index))
        rows = {"gates": self.gates({}, len(sample)), HOLDS: holds}
        predicted, _ = self._run(self._forms.remembering, sample, timestep, rows, {"means": self._no_means, **inputs})
        return self._guided(predicted, sample)

    def _widened(self, sample: Array) -> Array:
        """Repeat the samples for every row of a call."""
        return np.concatenate([sample] * self._conditions(len(sample)).rows_per_sample)

    def _guided(self, predicted: Array, sample: Array) -> Array:
        """Combine the rows of a call."""
        guided: Array = self._conditions(len(sample)).guide(predicted, sample.shape[1])
        return guided

    def compute_guidance(self, sample: Array, timestep: float, cache: BranchCache) -> Array:
        """Run the denoiser with all components kept, and store the difference between the halves of a guided call."""
        predicted = self._whole(sample, timestep, self._conditions(len(sample)))
        half = len(sample)
        cache.store({f"{COMPUTED}{GUIDANCE}": predicted[half:] - predicted[:half]}, timestep)
        return self._guided(predicted, sample)

    def recall_guidance(self, sample: Array, timestep: float, cache: BranchCache, treatment: Treatment) -> Array:
        """Run the denoiser with the samples' own conditions, and guide with a difference that a treatment makes.

        Args:
            sample: [batch, channel, height, width].
            timestep: The scheduler's value.
            cache: Differences of earlier steps, from a batch of the same size; empty for a treatment that drops it.
            treatment: The treatment.
        """
        own = self._whole(sample, timestep, self._own(len(sample)))
        difference = cache.guidance(treatment, timestep)
        negative = own if difference is None else own - difference
        return self._guided(np.concatenate([negative, own]), sample)

    def _whole(self, sample: Array, timestep: float, conditions: Conditions) -> Array:
        """Predict with all components kept, for every row of a call."""
        rows = {"gates": self.gates({}, len(sample))}
        return self._run(self._forms.gated, sample, timestep, rows, {"means": self._no_means}, conditions)[0]

    def _array_of(self, inputs: Mapping[str, Tensor], index: int, prefix: str) -> Array:
        """Copy an input of a component from the device; only the inputs that a formula reads are copied."""
        value = inputs[f"{prefix}{index}"]
        return value if isinstance(value, np.ndarray) else self._device.to_array(value)

    def _run(
        self,
        program: Program,
        sample: Array,
        timestep: float,
        rows: Mapping[str, Array],
        others: Mapping[str, Tensor],
        conditions: Conditions | None = None,
    ) -> tuple[Array, Mapping[str, Tensor]]:
        """Run a form of the graph; return the prediction before guidance, and the emitted branches."""
        conditions = conditions or self._conditions(len(sample))
        inputs = conditions.widen(sample, timestep, **rows)
        shape = (len(inputs["sample"]), self._gated.predicted_channels, *sample.shape[2:])
        return self._call(program, {**inputs, **others}, shape)

    def _call(
        self, program: Program, inputs: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> tuple[Array, Mapping[str, Tensor]]:
        """Call a program with arrays and earlier branches; return its output, and its branches on the device."""
        output = self._device.empty(shape)
        put = self._device.put
        emitted = program(
            {name: put(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()}, output
        )
        return self._device.to_array(output), emitted


class _Forms:
    """The four forms of a gated graph; each is loaded when it is first used."""

    def __init__(self, gated: GatedGraph, loader: Loader) -> None:
        self._gated, self._loader = gated, loader

    @cached_property
    def gated(self) -> Program:
        return self._loader.load(self._gated.runnable())

    @cached_property
    def observing(self) -> Program:
        return self._loader.load(self._gated.observing())

    @cached_property
    def emitting(self) -> Program:
        names = [component.name for component in self._gated.components]
        no_means = np.zeros(self._gated.channels, dtype=np.float32)
        return self._loader.load(specialise(self._gated, {}, no_means, names))

    @cached_property
    def remembering(self) -> Program:
        return self._loader.load(self._gated.remembering())
