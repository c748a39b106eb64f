"""bundle → report: sample, verify if need be, and write one HTML page."""

from __future__ import annotations

from pathlib import Path

from unetc.artifacts.profile import Profile
from unetc.artifacts.record import check_writable, write_atomically
from unetc.artifacts.verification import Verification
from unetc.errors import ArtifactError
from unetc.progress import OnProgress, ignore
from unetc.report.page import render
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session

from .verify import VerifyOptions, verify

SHOWN_SAMPLES = 8


def write_report(
    path: Path, output: Path, *, verification: Verification | None = None, on_progress: OnProgress = ignore
) -> None:
    """Write the report of a bundle.

    Args:
        path: The bundle's folder.
        output: The HTML file.
        verification: Result of `verify`; made when not given.
        on_progress: Told how far the work is.

    Raises:
        ArtifactError: If the bundle cannot be read, the verification is of another model, or the file cannot be
        written.
    """
    check_writable(output)
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    if verification is None:
        verification = verify(bundle, VerifyOptions(), on_progress)
    elif verification.plan_sha256 != manifest.plan.sha256():
        raise ArtifactError("the verification is of another bundle. Run `unetc verify` on this one.")
    session = Session.of(bundle, open_backend(manifest.target, threads=manifest.threads))
    full = session.sample(SHOWN_SAMPLES, seed=verification.seed, full_model=True)
    pruned = session.sample(SHOWN_SAMPLES, seed=verification.seed)
    page = render(
        profile=Profile.from_json(bundle.profile, f"{path}/{manifest.profile}"),
        manifest=manifest,
        verification=verification,
        full=full,
        pruned=pruned,
        log_snr=session.scheduler.table(manifest.steps).log_snr,
        schedule=session.schedule(manifest.steps),
    )
    write_atomically(output, page.encode())
