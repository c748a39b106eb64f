"""A promise, and the outcome of one trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.tiny_build import build_tiny_bundle, once, save_tiny_model


@dataclass(frozen=True, slots=True)
class Place:
    """Where a promise is tried."""

    shared: Path
    """Folder for models and bundles that several promises read."""
    own: Path
    """Empty folder of this promise."""

    @property
    def tiny_model(self) -> Path:
        """Folder of a pipeline with 45 000 weights."""
        return once(self.shared / "tiny-model", save_tiny_model)

    @property
    def tiny_build(self) -> Path:
        """Folder with profile.json, plan.json and bundle/ of the tiny model. Trials change copies alone."""
        model = self.tiny_model
        return once(self.shared / "tiny-build", lambda folder: build_tiny_bundle(model, folder, self.cache))

    @property
    def prompted_build(self) -> Path:
        """Folder with bundle/, of a tiny Stable Diffusion with encoded prompts, guidance and a decoder."""
        from tests.server.bundles import make_prompted_server  # imports torch

        return make_prompted_server(self.shared)

    @property
    def cache(self) -> Path:
        """Cache that holds the capture of the tiny model after `tiny_build`."""
        return self.shared / "cache"

    @property
    def captured(self) -> Mapping[str, Path]:
        """Captures in that cache, by their place in a folder with a cache/ of its own."""
        _ = self.tiny_build
        return {str(path.relative_to(self.shared)): path for path in self.cache.glob("*/graph")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one trial found."""

    tries: int = 1
    """How often the promise was put to the test."""
    broken: tuple[str, ...] = ()
    """A sentence for each try that broke it."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Measured values by name, with the unit in the name; the largest of all trials counts."""


Trial = Callable[[int], Outcome]
"""Runs the trial of a number, which seeds everything that is random in it. Trials do not depend on each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What unetc promises, and how the promise is tried."""

    name: str
    """One word."""
    promised: str
    """The promise, in one sentence."""
    tried: str
    """How it is tried, in one sentence without the number of tries."""
    prepare: Callable[[Place], AbstractContextManager[Trial]]
    """Sets up what all trials need."""
    trials: int
    """Number of trials in full."""
    short: int
    """Number of trials in CI, where all of them together take seconds."""
    seconds: float
    """About how long one trial takes on one core."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Largest value of a figure that keeps the promise."""

    def judged(self, outcome: Outcome) -> Outcome:
        """Count a trial with a figure above its limit as broken."""
        exceeded = tuple(
            f"{name} is {outcome.figures[name]:.4g}, above {limit:.4g}"
            for name, limit in self.limits.items()
            if outcome.figures.get(name, limit) > limit
        )
        return replace(outcome, broken=outcome.broken or exceeded)
