"""Bundle → report: sample, verify if there is no verification, rank, and write one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unetc.artifacts.manifest import BundleEngine, Manifest
from unetc.artifacts.profile import ModelReference, Profile
from unetc.artifacts.record import check_writable, write_atomically
from unetc.artifacts.verification import EngineUse, Verification
from unetc.errors import ArtifactError
from unetc.progress import OnProgress, ignore
from unetc.report.charts import level
from unetc.report.page import RankedComponent, RankedRange, render
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session

from .ranking import Ranked, rank
from .verify import VerifyOptions, verify

SHOWN_SAMPLES = 8
RANKED = 10
"""Components that are listed over all noise levels."""
RANKED_IN_BIN = 2
"""Components that are listed per noise level."""


def write_report(
    path: Path, output: Path, *, verification: Verification | None = None, on_progress: OnProgress = ignore
) -> None:
    """Write the report of a bundle.

    Args:
        path: The bundle's folder.
        output: The HTML file.
        verification: Result of `verify`; made when not given.
        on_progress: Called as the work advances.

    Raises:
        ArtifactError: If the bundle cannot be read, the verification is of another bundle or of another quality level
            than the default one, or the file cannot be written.
    """
    check_writable(output)
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    if verification is None:
        verification = verify(bundle, VerifyOptions(), on_progress)
    else:
        _require_own(verification, manifest, path)
    session = Session.of(bundle, open_backend(manifest.target, threads=manifest.threads))
    full = session.sample(SHOWN_SAMPLES, seed=verification.seed, full_model=True)
    pruned = session.sample(SHOWN_SAMPLES, seed=verification.seed)
    profile = Profile.from_json(bundle.profile, f"{path}/{manifest.profile}")
    page = render(
        profile=profile,
        manifest=manifest,
        verification=verification,
        full=full,
        pruned=pruned,
        log_snr=session.scheduler.table(manifest.steps).log_snr,
        schedule=session.schedule(manifest.steps),
        ranking=_ranking(profile),
    )
    write_atomically(output, page.encode())


def _require_own(verification: Verification, manifest: Manifest, path: Path) -> None:
    """Refuse a verification of anything but the default level of a bundle.

    One plan may be built more than once, with other steps or other engines. The measured times of the engines tell
    builds apart whose settings are equal.
    """
    levels = {level.plan.sha256(): level for level in manifest.levels}
    shown = manifest.levels[0]
    level = levels.get(verification.plan_sha256, shown)
    facts = {
        "model": (_model(verification.model), _model(manifest.model)),
        "scheduler": (verification.scheduler, manifest.scheduler.name),
        "steps": (verification.steps, manifest.steps),
        "threads": (verification.threads, manifest.threads),
        "plan": (verification.plan_sha256[:_DIGITS], level.plan.sha256()[:_DIGITS]),
        "milliseconds of the engines": (_times(verification.engines), _times(level.engines)),
    }
    for name, (got, own) in facts.items():
        if got != own:
            raise ArtifactError(
                f"the verification is of another bundle: it has {name} {got}, the bundle has {own}. Run "
                f"`unetc verify {path} -o FILE`."
            )
    if level is not shown:
        raise ArtifactError(
            f"the verification is of the quality level {level.name}, and the report shows {shown.name}. Run "
            f"`unetc verify {path} --level {shown.name} -o FILE`."
        )


_DIGITS = 12
"""Digits of a hash that are told."""


def _model(model: ModelReference) -> str:
    return f"{model.name} with weights {model.sha256[:_DIGITS]}"


def _times(engines: Sequence[EngineUse | BundleEngine]) -> str:
    return ", ".join(f"{engine.step_ms:.6g}" for engine in engines)


def _ranking(profile: Profile) -> tuple[RankedRange, ...]:
    """List the most redundant components over all noise levels, then of each noise level."""
    ranking = rank(profile)
    ranges = [RankedRange(levels="all", components=_rows(ranking.overall[:RANKED]))]
    for bin, ranked in zip(profile.bins, ranking.bins, strict=True):
        low = "−∞" if bin is profile.bins[0] else level(bin.low)
        high = "∞" if bin is profile.bins[-1] else level(bin.high)
        ranges.append(RankedRange(levels=f"{low} to {high}", components=_rows(ranked[:RANKED_IN_BIN])))
    return tuple(ranges)


def _rows(ranked: Sequence[Ranked]) -> tuple[RankedComponent, ...]:
    return tuple(
        RankedComponent(
            component=own.component,
            treatment=own.way,
            saving=own.saving,
            damage=own.damage,
            worth=own.worth,
            basis=own.basis,
        )
        for own in ranked
    )
