"""The commands and their options. Heavy imports stay inside the commands, so that `--help` is fast."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import unetc

if TYPE_CHECKING:
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.models.lora import Lora

app = typer.Typer(
    name="unetc",
    help="Measure which parts of a diffusion model matter at which noise level, and build one pruned engine per phase.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        help="Built-in model (digits, prompted-digits), diffusers folder, Hub id, or glide:base or glide:upsample.",
        metavar="MODEL",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint of glide:base or glide:upsample, .pt or .safetensors.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", help="LoRA to fuse into the model, as style.safetensors or style.safetensors:0.8; repeatable."
    ),
]
BundlePath = Annotated[Path, typer.Argument(help="Bundle folder.", metavar="BUNDLE")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Scheduler = Annotated[
    str | None, typer.Option(help="ddim, ddpm, euler or dpmsolver++ (default: ddim, for glide:base ddpm).")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoiser calls per sample (default: 50, for GLIDE as it was published).")
]
Samples = Annotated[int, typer.Option(min=1, help="Trajectories every ablation is measured on.")]
Bins = Annotated[int, typer.Option(min=1, help="Noise levels that are told apart.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Target = Annotated[str, typer.Option(help="Where engines run; costs are measured there.")]
BundleTarget = Annotated[
    str | None, typer.Option("--target", help="Where engines run (default: the target the bundle was built for).")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the target (default: all cores).")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size at which time is measured.")]
Budget = Annotated[float, typer.Option(help="Share of the time to save, in [0, 1).")]
MaxEngines = Annotated[int, typer.Option(min=1, help="Most engines beside the full model.")]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        min=1,
        help="Most weights of all engines together, as a multiple of the full model's, which is one of them "
        "(default: no limit).",
    ),
]
Exhaustive = Annotated[
    bool, typer.Option("--exhaustive", help="Carry every ablation to the final output; takes some ten times longer.")
]
ScreenOnly = Annotated[
    bool,
    typer.Option("--screen-only", help="Carry no ablation to the final output; damages are rough estimates."),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(min=1, help="Seconds after which no ablation is begun; what is left is estimated (default: none)."),
]
Components = Annotated[
    list[str] | None,
    typer.Option(help="Ablate only components like this, as 'up_blocks.*.attentions.*'; repeatable (default: all)."),
]
Planner = Annotated[str, typer.Option(help="fast, or exact: an integer program, some hundred times slower.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Prompts to measure on, one a line; the last quarter is kept for verify (default: the model's)."),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Of classifier-free guidance; 1 is none (default: the pipeline's).")
]
ControlNet = Annotated[
    bool, typer.Option("--controlnet", help="Let engines take what a ControlNet adds, for unetc.diffusers.")
]
KnownProfile = Annotated[Path | None, typer.Option(help="Profile of this model (default: analyse now).")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder for captures and partial results (default: $UNETC_CACHE or ~/.cache/unetc)."),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(unetc.__version__)
        raise typer.Exit


@app.command()
def analyze(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile to write.")] = Path("profile.json"),
    weights: Weights = None,
    lora: Loras = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    samples: Samples = 16,
    bins: Bins = 8,
    seed: Seed = 0,
    target: Target = "onnxruntime:cpu",
    threads: Threads = None,
    batch: Batch = 8,
    prompts: Prompts = None,
    guidance_scale: GuidanceScale = None,
    controlnet: ControlNet = False,
    components: Components = None,
    exhaustive: Exhaustive = False,
    screen_only: ScreenOnly = False,
    time_limit: TimeLimit = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure damage and cost of every component at every noise level. Interrupted, the same command continues."""
    from unetc.analyzer.analyze import analyze_model
    from unetc.artifacts.record import check_writable
    from unetc.models.find import find_model

    from . import summary
    from .output import OUT, print_json, progress

    check_writable(output)
    if exhaustive and screen_only:
        raise typer.BadParameter("--exhaustive carries all ablations to the final output, --screen-only none.")
    scheduler, steps = _sampling(model, scheduler, steps)
    options = _analysis(scheduler, steps, samples, bins, seed, target, threads, batch, prompts, guidance_scale)
    options = replace(options, components=tuple(components or ()), time_limit_s=time_limit or math.inf)
    if exhaustive or screen_only:
        options = replace(options, decisive=None if exhaustive else 0)
    with progress() as on_progress:
        found = find_model(model, weights, loras=_loras(lora), controlnet=controlnet)
        profile = analyze_model(found, options, cache=_cache(cache), on_progress=on_progress)
    profile.save(output)
    if as_json:
        print_json(summary.profile_facts(profile, output))
    else:
        OUT.print(summary.profile_table(profile))
        OUT.print(f"wrote {output}", soft_wrap=True)


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="Profile from `unetc analyze`.", metavar="PROFILE")],
    budget: Budget = 0.27,
    max_engines: MaxEngines = 4,
    max_memory: MaxMemory = None,
    planner: Planner = "fast",
    output: Annotated[Path, typer.Option("-o", "--output", help="Plan to write.")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Choose what to remove or reuse at which noise level. Pure: the same profile and options give the same bytes."""
    from unetc.artifacts.profile import Profile
    from unetc.compiler.planner.planner import PlanOptions, make_plan

    from . import summary
    from .output import OUT, print_json

    options = PlanOptions(budget=budget, max_engines=max_engines, max_memory=max_memory, planner=planner)
    made = make_plan(Profile.load(profile), options)
    made.save(output)
    if as_json:
        print_json(made)
    else:
        OUT.print(summary.plan_table(made))
        OUT.print(f"wrote {output}", soft_wrap=True)


@app.command()
def build(
    model: Model,
    budget: Budget = 0.27,
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to write.")] = Path("bundle"),
    max_engines: MaxEngines = 4,
    max_memory: MaxMemory = None,
    quality_gate: Annotated[
        str | None, typer.Option(help="Refuse a worse build: psnr>=DB, ssim>=VALUE or relative-l2<=VALUE.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Instead of a budget: build the fastest plan of the curve that passes, as psnr>=32."),
    ] = None,
    profile: KnownProfile = None,
    plan: Annotated[
        Path | None, typer.Option(help="Build this plan of the profile as it is, whatever the budget.")
    ] = None,
    repair: Annotated[int, typer.Option(min=0, help="Schedules sampled in search of less damage; 0 for none.")] = 40,
    controls: Annotated[bool, typer.Option(help="Put control plans into the bundle, for verify and report.")] = True,
    weights: Weights = None,
    lora: Loras = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    samples: Samples = 16,
    bins: Bins = 8,
    seed: Seed = 0,
    target: Target = "onnxruntime:cpu",
    threads: Threads = None,
    batch: Batch = 8,
    prompts: Prompts = None,
    guidance_scale: GuidanceScale = None,
    controlnet: ControlNet = False,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Build a bundle that saves the budget in measured time, running what is missing, analysis included."""
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.analyzer.analyze import analyze_model
    from unetc.artifacts.plan import Plan
    from unetc.artifacts.profile import Profile
    from unetc.compiler.build import BuildOptions
    from unetc.compiler.build import build as build_bundle
    from unetc.compiler.planner.planner import PlanOptions
    from unetc.compiler.search.quality_gate import QualityGate
    from unetc.compiler.search.repair import RepairOptions
    from unetc.compiler.store import check_destination
    from unetc.models.find import find_model

    from . import summary
    from .output import ERR, OUT, print_json, progress

    if at is not None and plan is not None:
        raise typer.BadParameter("--at chooses a plan itself; give one of --at and --plan.")
    scheduler, steps = _sampling(model, scheduler, steps)
    analysis = (
        AnalysisOptions()  # not used, so the numbers need not fit each other
        if profile
        else _analysis(scheduler, steps, samples, bins, seed, target, threads, batch, prompts, guidance_scale)
    )
    options = BuildOptions(
        plan=PlanOptions(budget=budget, max_engines=max_engines, max_memory=max_memory),
        steps=steps,
        quality_gate=QualityGate.parse(quality_gate) if quality_gate else None,
        at=QualityGate.parse(at) if at else None,
        repair=RepairOptions(evaluations=repair),
        controls=controls,
    )
    known = Profile.load(profile) if profile else None
    given = Plan.load(plan) if plan else None
    with progress() as on_progress:
        check_destination(output)
        found = find_model(
            model, weights, loras=_loras(lora), controlnet=known.model.controlnet if known else controlnet
        )
        known = known or analyze_model(found, analysis, cache=_cache(cache), on_progress=on_progress)
        manifest = build_bundle(found, known, output, options, cache=_cache(cache), plan=given, on_progress=on_progress)
    for note in manifest.notes:
        ERR.print(note, soft_wrap=True)
    if as_json:
        print_json(summary.bundle_facts(manifest, output))
    else:
        OUT.print(summary.bundle_table(manifest))
        OUT.print(f"wrote {output}", soft_wrap=True)
        if command := summary.compiling(manifest, output):
            OUT.print(f"its engines are not built yet: {command}", soft_wrap=True)


@app.command()
def pareto(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Curve to write; a .svg is put beside it.")] = Path(
        "pareto.json"
    ),
    budgets: Annotated[int, typer.Option(min=1, help="Number of budgets between 0.1 and 0.8.")] = 8,
    max_engines: MaxEngines = 4,
    max_memory: MaxMemory = None,
    profile: KnownProfile = None,
    weights: Weights = None,
    lora: Loras = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    samples: Samples = 16,
    bins: Bins = 8,
    seed: Seed = 0,
    target: Target = "onnxruntime:cpu",
    threads: Threads = None,
    batch: Batch = 8,
    prompts: Prompts = None,
    guidance_scale: GuidanceScale = None,
    controlnet: ControlNet = False,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure the least damage at any time: plan, repair and sample at many budgets; all that was sampled is kept."""
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.analyzer.analyze import analyze_model
    from unetc.artifacts.profile import Profile
    from unetc.artifacts.record import check_writable, write_atomically
    from unetc.compiler.search.pareto import ParetoOptions
    from unetc.compiler.search.pareto import pareto as measure
    from unetc.models.find import find_model
    from unetc.report.curve import draw

    from . import summary
    from .output import OUT, print_json, progress

    picture = output.with_suffix(".svg")
    check_writable(output)
    check_writable(picture)
    known = Profile.load(profile) if profile else None
    scheduler, steps = _sampling(model, scheduler, steps)
    analysis = (
        AnalysisOptions()
        if known
        else _analysis(scheduler, steps, samples, bins, seed, target, threads, batch, prompts, guidance_scale)
    )
    options = ParetoOptions(budgets=budgets, steps=steps, max_engines=max_engines, max_memory=max_memory)
    with progress() as on_progress:
        found = find_model(
            model, weights, loras=_loras(lora), controlnet=known.model.controlnet if known else controlnet
        )
        known = known or analyze_model(found, analysis, cache=_cache(cache), on_progress=on_progress)
        curve = measure(found, known, options, cache=_cache(cache), on_progress=on_progress)
    curve.save(output)
    write_atomically(picture, draw(curve).encode())
    if as_json:
        print_json(summary.pareto_facts(curve, output))
    else:
        OUT.print(summary.pareto_table(curve))
        OUT.print(f"wrote {output} and {picture}", soft_wrap=True)


@app.command()
def sample(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG to write.")] = Path("samples.png"),
    batch: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 16,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoiser calls (default: the bundle's).")] = None,
    full_model: Annotated[bool, typer.Option("--full-model", help="Run the full model at every step.")] = False,
    target: BundleTarget = None,
    memory: Annotated[str, typer.Option(help="fast, or low: weights once; on a GPU two phases' engines.")] = "fast",
    threads: Threads = None,
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

    from .output import OUT, print_json, progress
    from .sampling import sample_in_calls

    check_writable(output)
    with progress() as on_progress:
        on_progress(Progress(stage="loading the engines", done=0, total=1))
        opened = Bundle.open(bundle)
        backend = backend_for(opened.manifest, target=target, threads=threads, memory=memory)
        session = Session.of(opened, backend)
        on_progress(Progress(stage="loading the engines", done=1, total=1))
        start = time.perf_counter()
        draw = partial(session.sample, seed=seed, steps=steps, full_model=full_model)
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


@app.command("compile")
def compile_(
    bundle: BundlePath,
    target: Annotated[
        str, typer.Option(help="tensorrt-rtx, or tensorrt for the GPU of this machine.")
    ] = "tensorrt-rtx",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16 (default: what the target ends with, or fp32); the borders of a graph stay fp32."
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Rows of a call, twice the samples where a call is guided: N, LEAST,MOST or LEAST,USUAL,MOST "
            "(default: 1 to the bundle's)."
        ),
    ] = None,
    height: Annotated[
        str | None,
        typer.Option(help="Height of samples, in the same form (default: the bundle's); of latents, not of pixels."),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(help="Width of samples, in the same form (default: the bundle's); of latents, not of pixels."),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds that building one engine may take.")] = 3600.0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Most engines built at once; fewer if memory is short, one with tensorrt.")
    ] = 1,
    trust_engines: Annotated[
        bool,
        typer.Option(
            "--trust-engines",
            help="Take engines in the cache that others have built, from now on. Loading one runs code.",
        ),
    ] = False,
    on_this_gpu: Annotated[
        bool,
        typer.Option("--on-this-gpu", help="Build tensorrt-rtx engines for this machine's GPU alone, not for many."),
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Build the engines of the control plans too, which verify runs.")
    ] = False,
    fallback: Annotated[
        bool,
        typer.Option(help="Below fp32: build the full model in fp32 too, which makes a step again that overflows."),
    ] = True,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Engines go into its folder engines; they are run from $UNETC_CACHE or ~/.cache/unetc (default)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build NVIDIA engines of a bundle into the cache, from where `unetc sample --target` runs them.

    Interrupted, the same command goes on with the engines that are missing. tensorrt-rtx needs no GPU for it.
    """
    from unetc.artifacts.manifest import MANIFEST, Manifest
    from unetc.compiler.tensorrt.compile_bundle import CompileOptions, compile_bundle, target_of

    from . import summary
    from .output import OUT, print_json, progress

    library, own = target_of(target, precision)
    options = CompileOptions(
        target=library,
        precision=own,
        batch=batch,
        height=height,
        width=width,
        time_limit_s=time_limit,
        jobs=jobs,
        trust_engines=trust_engines,
        on_this_gpu=on_this_gpu,
        controls=controls,
        fallback=fallback,
    )
    with progress() as on_progress:
        engines = compile_bundle(bundle, options, cache=_cache(cache), on_progress=on_progress)
    if as_json:
        print_json(summary.engine_facts(engines))
    else:
        OUT.print(summary.engine_table(engines, Manifest.load(bundle / MANIFEST)))


@app.command()
def verify(
    bundle: BundlePath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Verification to write as JSON.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Batches that every contender samples, in turns.")] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size (default: the bundle's).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="A seed that the build has not used.")] = None,
    target: BundleTarget = None,
    as_json: Json = False,
) -> None:
    """Measure time and damage on new seeds, beside simpler ways to save the same time."""
    from unetc.analyzer.verify import VerifyOptions
    from unetc.analyzer.verify import verify as verify_bundle
    from unetc.artifacts.record import check_writable
    from unetc.runtime.bundle import Bundle

    from . import summary
    from .output import OUT, print_json, progress

    if output is not None:
        check_writable(output)
    opened = Bundle.open(bundle)
    with progress() as on_progress:
        result = verify_bundle(opened, VerifyOptions(rounds=rounds, batch=batch, seed=seed, target=target), on_progress)
    if output is not None:
        result.save(output)
    if as_json:
        print_json(result)
    else:
        OUT.print(summary.verification_table(result))


@app.command()
def report(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    verification: Annotated[
        Path | None, typer.Option(help="Result of `unetc verify -o` (default: verify now).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: damage map with the plan, samples, controls, time line."""
    from unetc.analyzer.report import write_report
    from unetc.artifacts.verification import Verification

    from .output import OUT, print_json, progress

    known = Verification.load(verification) if verification else None
    with progress() as on_progress:
        write_report(bundle, output, verification=known, on_progress=on_progress)
    if as_json:
        print_json({"output": str(output), "bytes": output.stat().st_size})
    else:
        OUT.print(f"wrote {output}", soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Bundle folder, profile or plan.", metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Show what a bundle, a profile or a plan holds, and which engines of a bundle the cache has."""
    from unetc.artifacts.manifest import Manifest

    from . import engine_inventory as compiled
    from . import summary
    from .output import OUT, print_json

    artifact = summary.open_artifact(path)
    facts, shown = summary.facts(artifact, path), [summary.render(artifact)]
    if isinstance(artifact, Manifest):
        sets = compiled.find(artifact)
        facts |= {"compiled": compiled.facts(sets, artifact)}
        shown += compiled.shown(sets, artifact)
    if as_json:
        print_json(facts)
    else:
        OUT.print(*shown, sep="\n")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check which libraries and targets work here, and say how to get those that do not."""
    from . import summary
    from .diagnosis import diagnose
    from .output import OUT, print_json

    findings = diagnose()
    if as_json:
        print_json({"findings": [finding.__dict__ for finding in findings]})
    else:
        OUT.print(summary.diagnosis_table(findings))
    if not all(finding.works for finding in findings if finding.needed):
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("unetc-demo"),
    budget: Budget = 0.27,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Analyse, build, verify and report the built-in model `digits`, in a few minutes on two cores."""
    from unetc.demo import run_demo

    from . import summary
    from .output import OUT, print_json, progress

    with progress() as on_progress:
        result = run_demo(output, budget=budget, cache=_cache(cache), on_progress=on_progress)
    if as_json:
        print_json(result.verification)
        return
    OUT.print(summary.verification_table(result.verification))
    OUT.print("\nLook at:")
    for path, meaning in result.files:
        OUT.print(f"  {path}  {meaning}", soft_wrap=True)


def _sampling(model: str, scheduler: str | None, steps: int | None) -> tuple[str, int]:
    """Fill in what the user has not said of the sampling."""
    from unetc.models.find import usual_sampling

    usual = usual_sampling(model)
    return scheduler or usual.scheduler, steps or usual.steps


def _analysis(
    scheduler: str,
    steps: int,
    samples: int,
    bins: int,
    seed: int,
    target: str,
    threads: int | None,
    batch: int,
    prompts: Path | None,
    guidance_scale: float | None,
) -> AnalysisOptions:
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.environment import cores
    from unetc.models.prompts import read_prompts

    return AnalysisOptions(
        scheduler=scheduler,
        steps=steps,
        samples=samples,
        bins=bins,
        seed=seed,
        target=target,
        threads=threads or cores(),
        batch=batch,
        prompts=read_prompts(prompts) if prompts else (),
        guidance_scale=guidance_scale,
    )


def _loras(given: list[str] | None) -> tuple[Lora, ...]:
    from unetc.models.lora import Lora

    return tuple(Lora.parse(text) for text in given or ())


def _cache(given: Path | None) -> Path:
    from unetc.environment import cache_folder

    return cache_folder() if given is None else given
