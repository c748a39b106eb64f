"""`unetc compile`: bundle → NVIDIA engines in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..groups import Group
from ..options import BundlePath, Json

if TYPE_CHECKING:
    from unetc.compiler.tensorrt.options import CompileOptions


class EngineGroup(Group, panel="Engines"):
    """The target of the engines and the sizes that they accept."""

    target: Annotated[str, typer.Option(help="tensorrt-rtx, or tensorrt for the GPU of this machine.")] = "tensorrt-rtx"
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16 (default: the end of the target's name, or fp32); inputs and outputs stay fp32."
        ),
    ] = None
    batch: Annotated[
        str | None,
        typer.Option(
            help="Rows of a call, twice the samples where a call is guided: N, LEAST,MOST or LEAST,USUAL,MOST "
            "(default: 1 to the bundle's)."
        ),
    ] = None
    height: Annotated[
        str | None,
        typer.Option(help="Height of samples, in the same form (default: the bundle's); of latents, not of pixels."),
    ] = None
    width: Annotated[
        str | None,
        typer.Option(help="Width of samples, in the same form (default: the bundle's); of latents, not of pixels."),
    ] = None
    on_this_gpu: Annotated[
        bool,
        typer.Option("--on-this-gpu", help="Build tensorrt-rtx engines for this machine's GPU alone, not for many."),
    ] = False
    controls: Annotated[
        bool, typer.Option("--controls", help="Build the engines of the control plans too, which verify runs.")
    ] = False
    fallback: Annotated[
        bool,
        typer.Option(help="Below fp32: build the full model in fp32 too, which repeats a step that overflows."),
    ] = True


class EffortGroup(Group, panel="Effort"):
    """Limits of the work."""

    time_limit: Annotated[float, typer.Option(min=1, help="Seconds that building one engine may take.")] = 3600.0
    jobs: Annotated[
        int, typer.Option(min=1, help="Most engines built at once; fewer if memory is short, one with tensorrt.")
    ] = 1
    trust_engines: Annotated[
        bool,
        typer.Option(
            "--trust-engines",
            help="Accept engines in the cache that others have built, from now on. Loading one runs code.",
        ),
    ] = False


def _options(engines: EngineGroup, effort: EffortGroup) -> CompileOptions:
    from unetc.compiler.tensorrt.options import CompileOptions, target_of

    target, precision = target_of(engines.target, engines.precision)
    return CompileOptions(
        target=target,
        precision=precision,
        batch=engines.batch,
        height=engines.height,
        width=engines.width,
        time_limit_s=effort.time_limit,
        jobs=effort.jobs,
        trust_engines=effort.trust_engines,
        on_this_gpu=engines.on_this_gpu,
        controls=engines.controls,
        fallback=engines.fallback,
    )


def compile_(
    bundle: BundlePath,
    engines: EngineGroup,
    effort: EffortGroup,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Engines go into its folder engines; sessions look in the default folder alone "
            "(default: $UNETC_CACHE or ~/.cache/unetc)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build NVIDIA engines of a bundle into the cache, from where `unetc sample --target` runs them.

    Interrupted, the same command goes on with the missing engines. tensorrt-rtx needs no GPU for it.
    """
    from unetc.api import compile as make
    from unetc.artifacts.manifest import MANIFEST, Manifest

    from .. import summary
    from ..output import OUT, print_json, progress

    options = _options(engines, effort)
    with progress() as on_progress:
        made = make(bundle, options, cache=cache, on_progress=on_progress)
    if as_json:
        print_json(summary.engine_facts(made))
    else:
        OUT.print(summary.engine_table(made, Manifest.load(bundle / MANIFEST)))
