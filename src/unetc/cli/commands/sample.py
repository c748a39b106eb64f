"""`unetc sample`: bundle → picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundlePath, BundleTarget, BundleThreads, Json, QualityLevel, Seed

DEFAULT_STRENGTH = 0.8


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
        typer.Option(
            help="Classes of the samples, by number or name, as 0,3,7, in turn (default: those of the bundle)."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt of the samples; repeatable, samples take turns (default: those of the bundle)."),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Prompt that guidance moves the samples away from; needs --prompt.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance; needs --prompt or --labels (default: the bundle's)."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="PNG, JPEG or WebP to start from; it is cropped to the size of the samples.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps to make from --image, above 0; 1 makes all (default: 0.8)."),
    ] = None,
    target: BundleTarget = None,
    memory: Annotated[
        str,
        typer.Option(metavar="fast|low", help="fast, or low: weights are held once, and on a GPU two phases' engines."),
    ] = "fast",
    threads: BundleThreads = None,
    as_json: Json = False,
) -> None:
    """Sample from a bundle into one picture. Needs no torch.

    No call has more samples than the bundle's batch, which engines are compiled for.
    """
    import time
    from functools import partial

    from unetc.artifacts.record import check_writable, write_atomically
    from unetc.errors import SessionError
    from unetc.models.images import read_image
    from unetc.progress import Progress
    from unetc.report.pictures import grid, png_bytes
    from unetc.runtime.bundle import Bundle
    from unetc.runtime.session import Session, backend_for
    from unetc.runtime.text import no_text

    from ..output import ERR, print_json, progress, say
    from ..sampling import Draw, sample_in_calls, with_conditions, with_image

    if not prompt and negative_prompt is not None:
        raise typer.BadParameter("--negative-prompt belongs to --prompt; give one.")
    if not prompt and labels is None and guidance_scale is not None:
        raise typer.BadParameter("--guidance-scale belongs to --prompt or --labels; give one.")
    if strength is not None and image is None:
        raise typer.BadParameter("--strength belongs to --image; give one.")
    if strength is not None and not 0 < strength <= 1:
        raise typer.BadParameter(f"--strength is {strength:g}. Expected a number above 0 and up to 1.")
    if prompt and labels is not None:
        raise typer.BadParameter("--prompt and --labels are conditions of different models; give one of them.")
    notes: tuple[str, ...] = ()
    check_writable(output)
    with progress() as on_progress:
        on_progress(Progress(stage="loading the engines", done=0, total=1))
        opened = Bundle.open(bundle)
        if prompt and opened.manifest.text is None:
            raise SessionError(no_text(opened))
        channels, height, width = opened.manifest.image_shape
        pixels = None if image is None else read_image(image, height, width, channels=channels)[None]
        backend = backend_for(opened.manifest, target=target, threads=threads, memory=memory)
        session = Session.of(opened, backend, level=level)
        on_progress(Progress(stage="loading the engines", done=1, total=1))
        start = time.perf_counter()
        sampling = partial(session.sample, seed=seed, steps=steps, full_model=full_model)
        draw: Draw = sampling
        if pixels is not None:
            draw = with_image(sampling, session.encode(pixels), DEFAULT_STRENGTH if strength is None else strength)
        if labels is not None:
            draw = with_conditions(draw, session.encode_labels(labels.split(","), guidance_scale))
        if prompt:
            assert session.text is not None, "looked at before the engines were loaded"
            negative = None if negative_prompt is None else [negative_prompt]
            encoded = session.text.encode(prompt, negative=negative, guidance_scale=guidance_scale)
            notes = encoded.notes
            draw = with_conditions(draw, encoded)
        images = sample_in_calls(draw, batch, opened.manifest.batch, on_progress)
        seconds = time.perf_counter() - start
    for note in notes:
        say(f"{note}.", ERR)
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
        say(f"{len(images)} samples in {seconds:.2f} s; wrote {output}")
