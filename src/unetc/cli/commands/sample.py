"""`unetc sample`: bundle → picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundlePath, BundleTarget, Json, QualityLevel, Seed


def sample(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG to write.")] = Path("samples.png"),
    batch: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 16,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoiser calls (default: the bundle's).")] = None,
    level: QualityLevel = None,
    full_model: Annotated[bool, typer.Option("--full-model", help="Run the full model at every step.")] = False,
    labels: Annotated[
        str | None,
        typer.Option(help="Class labels of the samples, as 0,3,7, in turn (default: those of the bundle)."),
    ] = None,
    target: BundleTarget = None,
    memory: Annotated[
        str,
        typer.Option(metavar="fast|low", help="fast, or low: weights are held once, and on a GPU two phases' engines."),
    ] = "fast",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of the target (default: the bundle's)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sample from a bundle into one picture. Needs no torch.

    No call has more samples than the bundle's batch, which engines are compiled for.
    """
    import time
    from functools import partial

    from unetc.artifacts.record import check_writable, write_atomically
    from unetc.progress import Progress
    from unetc.report.pictures import grid, png_bytes
    from unetc.runtime.bundle import Bundle
    from unetc.runtime.session import Session, backend_for

    from ..output import OUT, print_json, progress
    from ..sampling import Draw, sample_in_calls, with_labels

    check_writable(output)
    with progress() as on_progress:
        on_progress(Progress(stage="loading the engines", done=0, total=1))
        opened = Bundle.open(bundle)
        backend = backend_for(opened.manifest, target=target, threads=threads, memory=memory)
        session = Session.of(opened, backend, level=level)
        on_progress(Progress(stage="loading the engines", done=1, total=1))
        start = time.perf_counter()
        draw: Draw = partial(session.sample, seed=seed, steps=steps, full_model=full_model)
        if labels is not None:
            draw = with_labels(draw, opened.calls, labels)
        images = sample_in_calls(draw, batch, opened.manifest.batch, on_progress)
        seconds = time.perf_counter() - start
    write_atomically(output, png_bytes(grid(images)))
    if as_json:
        print_json(
            {
                "output": str(output),
                "shape": list(images.shape),
                "seconds": seconds,
                "non_finite_steps": session.non_finite_steps,
            }
        )
    else:
        OUT.print(f"{len(images)} samples in {seconds:.2f} s; wrote {output}", soft_wrap=True)
