"""Predicted duration of an analysis: number of calls × measured time of a call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unetc.artifacts.profile import GUIDANCE

from .ablation import Ablation, ablations_of
from .screen import screen_calls
from .sweep import Outline, sweep_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Work of an analysis, and its duration if no damage is cached."""

    seconds: float
    forms: int
    """Number of forms of components that are timed; 0 if that is done."""
    probes: int
    """Number of local errors."""
    ablations: int
    """Number of ablations that are carried to the final output."""

    def __str__(self) -> str:
        """Format as one line."""
        parts = [f"timing of {self.forms:,} forms of components"] if self.forms else []
        parts += [f"{self.probes:,} local probes"] if self.probes else []
        parts += [f"{self.ablations:,} ablations to the final output"] if self.ablations else []
        return f"about {_in_words(self.seconds)}: {', '.join(parts)}"


def entries_of(outline: Outline) -> tuple[tuple[Ablation, int], ...]:
    """List all ablations, each with every bin where it treats a step."""
    return tuple(
        (ablation, b)
        for ablation in ablations_of(outline.ablated, denoises=outline.denoises)
        for b in range(len(outline.bins))
        if any(map(ablation.periodic.treats, outline.steps_of(b)))
    )


def predict_duration(
    outline: Outline,
    *,
    screened: bool,
    decisive: int | None,
    limit_s: float,
    sample_ms: float,
    forms: int = 0,
    timing_s: float = 0.0,
) -> Duration:
    """Predict the duration of an analysis.

    Args:
        outline: The ablations and trajectories.
        screened: Whether local errors are measured.
        decisive: Ablations of every bin that are carried to the final output; all when None. They are not chosen yet,
            so each counts as an average one of its bin.
        limit_s: Seconds after which nothing more is begun but the full model's trajectory.
        sample_ms: Milliseconds of a denoiser call, per sample.
        forms: Number of forms of components to time.
        timing_s: Seconds that this takes.
    """
    calls, ablations = screen_calls(outline) if screened else 0.0, 0
    for b in range(len(outline.bins)):
        own = [entry for entry in entries_of(outline) if entry[1] == b]
        if not own:  # nothing is reused at the first step, so the step alone has no ablation there
            continue
        always = decisive is not None and decisive > 0 and any(entry.component == GUIDANCE for entry, _ in own)
        count = len(own) if decisive is None else min(decisive + always, len(own))
        calls += count * float(np.mean([sweep_calls(outline, [entry]) for entry in own]))
        ablations += count
    call_s = sample_ms / 1000 * outline.samples
    always_s = timing_s + 2 * outline.table.steps * call_s
    return Duration(
        seconds=always_s + min(calls * call_s, max(0.0, limit_s - always_s)),
        forms=forms,
        probes=len(entries_of(outline)) if screened else 0,
        ablations=ablations,
    )


def _in_words(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, seconds):.0f} seconds"
