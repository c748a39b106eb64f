"""Metrics of the server, in the format of Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
"""Bounds of histograms of requests."""
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Bounds of the histogram of engine calls."""
FULL_MODEL = "full"
"""Phase of calls of the full model."""


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    INVALID = "invalid"
    """A field was wrong."""
    REFUSED = "refused"
    """The queue was full, it could not be finished in time, or the server was not ready."""
    CANCELLED = "cancelled"
    """Its client went away or cancelled it."""
    DEADLINE = "deadline"
    """It was not finished in time."""
    FAILED = "failed"


class Call(Protocol):
    """One engine call, as `unetc.runtime.batching` reports it."""

    @property
    def phase(self) -> int | None:
        """Phase of the plan; None for the full model."""
        ...

    @property
    def rollouts(self) -> int:
        """Rollouts that shared the call."""
        ...

    @property
    def rows(self) -> int:
        """Rows that rollouts need; with guidance, several per image."""
        ...

    @property
    def padding(self) -> int:
        """Further rows, which only fill the call."""
        ...

    @property
    def seconds(self) -> float:
        """Duration of the call."""
        ...

    @property
    def switched(self) -> bool:
        """Whether the call before was of another engine."""
        ...


class Metrics:
    """The metrics of one service. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Begin at zero, in a separate registry: several services may live in one process."""
        self._registry = registry = CollectorRegistry()
        model = ("model",)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"unetc_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"unetc_{name}", text, labels, registry=registry, buckets=buckets)

        self._requests = counter("requests", "Requests by the way they ended.", "model", "outcome")
        self._images = counter("images", "Finished images by quality level.", "model", "level")
        self._degraded = counter("degraded_requests", "Requests served below the level asked for.", "model", "level")
        self._non_finite = counter("non_finite_steps", "Steps that the full model repeated.", *model)
        self._switches = counter("engine_switches", "Engine calls after a call of another engine.", *model)
        self._rows = counter("rows", "Rows of engine calls, without padding.", *model)
        self._padding = counter("padding_rows", "Rows that engines computed for no request.", *model)
        self._queue_seconds = histogram("queue_seconds", "Seconds between submission and the first step.", *model)
        self._compute_seconds = histogram("compute_seconds", "Seconds between the first step and the images.", *model)
        self._request_seconds = histogram("request_seconds", "Seconds between submission and the images.", *model)
        self._step_seconds = histogram(
            "step_seconds",
            "Seconds of engine calls by phase and number of images.",
            "model",
            "phase",
            "batch",
            buckets=_STEP_SECONDS,
        )
        self._metrics_of = functools.cache(self._find_metrics)
        self._queued = Gauge("unetc_queued_images", "Images that wait.", model, registry=registry)
        self._running = Gauge("unetc_running_images", "Images on their way.", model, registry=registry)
        self._ready = Gauge("unetc_ready", "1 if requests are taken, otherwise 0.", registry=registry)

    def show_ready(self, ready: Callable[[], bool]) -> None:
        """Read at every scrape whether requests are taken."""
        self._ready.set_function(lambda: float(ready()))

    def show_load(self, model: str, queued: Callable[[], int], running: Callable[[], int]) -> None:
        """Read the load of a model at every scrape."""
        self._queued.labels(model).set_function(lambda: float(queued()))
        self._running.labels(model).set_function(lambda: float(running()))

    def call(self, model: str, call: Call) -> None:
        """Count an engine call."""
        seconds, rows, padding, switches = self._metrics_of(model, call.phase, call.rollouts)
        seconds.observe(call.seconds)
        rows.inc(call.rows)
        if call.padding:
            padding.inc(call.padding)
        if call.switched:
            switches.inc()

    def _find_metrics(
        self, model: str, phase: int | None, rollouts: int
    ) -> tuple[Histogram, Counter, Counter, Counter]:
        """Look up the metrics that a call changes; engine threads do it at every step, so results are kept."""
        named = FULL_MODEL if phase is None else str(phase)
        return (
            self._step_seconds.labels(model, named, str(rollouts)),
            self._rows.labels(model),
            self._padding.labels(model),
            self._switches.labels(model),
        )

    def ended(self, model: str, outcome: Outcome) -> None:
        """Count the end of a request; `-` stands for the model where a request names none."""
        self._requests.labels(model, outcome.value).inc()

    def finished(
        self,
        model: str,
        *,
        level: str,
        images: int,
        degraded: bool,
        non_finite_steps: int,
        waited: float,
        took: float,
    ) -> None:
        """Count the images of a request that has succeeded."""
        self.ended(model, Outcome.OK)
        self._images.labels(model, level).inc(images)
        if degraded:
            self._degraded.labels(model, level).inc()
        self._non_finite.labels(model).inc(non_finite_steps)
        self._queue_seconds.labels(model).observe(waited)
        self._compute_seconds.labels(model).observe(took - waited)
        self._request_seconds.labels(model).observe(took)

    def to_text(self) -> bytes:
        """Write all metrics in the text format."""
        return generate_latest(self._registry)

    def families(self) -> list[Metric]:
        """Read all metrics as they are now."""
        return list(self._registry.collect())


class Together(Collector):
    """Metrics of several processes as one; each keeps its values, under the label `replica`."""

    def __init__(self, processes: Mapping[str, Iterable[Metric]]) -> None:
        """Keep the metrics of each process, by its name."""
        self._processes = processes

    def collect(self) -> Iterable[Metric]:
        """Put the values of each metric together."""
        together: dict[str, Metric] = {}
        for replica, families in self._processes.items():
            for family in families:
                values = [value._replace(labels={"replica": replica, **value.labels}) for value in family.samples]
                whole = together.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += values
        return together.values()

    def to_text(self) -> bytes:
        """Write all metrics in the text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)
