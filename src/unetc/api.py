"""The whole way in Python: the functions that the commands call, one per step.

    import unetc

    profile = unetc.analyze("digits", unetc.AnalysisOptions(samples=4))
    plan = unetc.plan(profile, unetc.PlanOptions(budget=0.27))
    unetc.build("digits", "bundle/", unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.27)), profile=profile)
    images = unetc.load("bundle/").sample(batch=4, seed=0)

Options are frozen dataclasses, paths may be strings, and every failure that has a known reason is a `UnetcError`. The
libraries of a step are imported when its function is called.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .extras import needed
from .progress import OnProgress, ignore

if TYPE_CHECKING:
    from .analyzer.analysis import AnalysisOptions
    from .analyzer.verify import VerifyOptions
    from .artifacts import Manifest, Plan, Profile, Verification
    from .artifacts.pareto import Pareto
    from .compiler.build import BuildOptions
    from .compiler.planner.planner import PlanOptions
    from .compiler.search.pareto import ParetoOptions
    from .compiler.tensorrt.options import CompileOptions
    from .compiler.tensorrt.wanted import CompiledEngine
    from .jobs import Cluster
    from .models.find import ModelSource
    from .models.model import Model
    from .triton.options import ExportOptions
    from .triton.repository import Export

AnyPath = str | Path
"""A path of a file or a folder."""


@needed()
def analyze(
    model: ModelSource | str,
    options: AnalysisOptions | None = None,
    *,
    cache: AnyPath | None = None,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Profile:
    """Measure damage and cost of every component of a model at every noise level.

        profile = unetc.analyze("digits", unetc.AnalysisOptions(samples=4))
        profile.save(Path("profile.json"))

    Interrupted, the same call continues from the cache.

    Args:
        model: The model, or just its name.
        options: How to measure; the defaults with the model's usual scheduler and steps when not given.
        cache: Folder for captures and partial results; `$UNETC_CACHE` or `~/.cache/unetc` when not given.
        cluster: A Ray cluster that measures, in place of this process.
        on_progress: Called as the work advances.

    Raises:
        ModelError: If the model cannot be found or is not supported.
        ProfileError: If it cannot be analysed.
        WorkerError: If the cluster cannot be joined or fails.
    """
    from .analyzer.analyze import analyze_model
    from .models.find import find_model

    found = find_model(model)
    return analyze_model(found, options or _usual(model), cache=_cache(cache), cluster=cluster, on_progress=on_progress)


@needed()
def plan(profile: Profile, options: PlanOptions) -> Plan:
    """Choose the components to remove or reuse at each noise level.

        plan = unetc.plan(profile, unetc.PlanOptions(budget=0.27))  # saves 27 %
        print(plan.prediction.time_ratio)

    Args:
        profile: The analysis of a model.
        options: The saving to reach, and limits.

    Returns:
        The plan. The same arguments give the same bytes.

    Raises:
        PlanError: If no plan saves that much within the limits.
    """
    from .compiler.planner.planner import make_plan

    return make_plan(profile, options)


@needed()
def build(
    model: ModelSource | str,
    destination: AnyPath,
    options: BuildOptions,
    *,
    profile: Profile | None = None,
    plan: Plan | None = None,
    analysis: AnalysisOptions | None = None,
    cache: AnyPath | None = None,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Manifest:
    """Build a bundle that saves its budget in measured time; analyse the model first if there is no profile.

        options = unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.27))
        manifest = unetc.build("digits", "bundle/", options, profile=profile)
        print(f"saves {1 - manifest.measured.time_ratio:.0%}")

    Args:
        model: The model, or just its name.
        destination: Folder of the bundle; an older bundle there is replaced. A bad one is refused before any work.
        options: The saving, quality gates, and extras of the bundle.
        profile: An analysis of this model; made when not given.
        plan: A plan of this profile to build unchanged, whatever the budget; made and fitted when not given.
        analysis: How to analyse without a profile; the model's usual scheduler at `options.steps` when not given.
        cache: Folder for captures and partial results; `$UNETC_CACHE` or `~/.cache/unetc` when not given.
        cluster: A Ray cluster that measures, in place of this process.
        on_progress: Called as the work advances.

    Raises:
        ModelError: If the model cannot be found or is not supported.
        ProfileError: If it cannot be analysed, or the profile is of another model.
        PlanError: If no plan meets the budget.
        QualityGateError: If the quality gate fails; the message names the largest budget that passes.
        ArtifactError: If the bundle cannot be written.
        WorkerError: If the cluster cannot be joined or fails.
    """
    from .compiler.build import build as build_bundle
    from .compiler.build import check_options
    from .compiler.store import check_destination

    path, folder = Path(destination), _cache(cache)
    check_destination(path)
    check_options(options, plan)
    found, known = _analysed(model, profile, analysis, options.steps, folder, cluster, on_progress, plan)
    return build_bundle(found, known, path, options, cache=folder, plan=plan, cluster=cluster, on_progress=on_progress)


@needed()
def pareto(
    model: ModelSource | str,
    options: ParetoOptions,
    *,
    profile: Profile | None = None,
    analysis: AnalysisOptions | None = None,
    cache: AnyPath | None = None,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Pareto:
    """Measure the least damage at each saving: plan, repair and sample at many budgets.

        curve = unetc.pareto("digits", unetc.ParetoOptions(budgets=4), profile=profile)
        for point in curve.front():
            print(f"saves {1 - point.time_ratio:.0%}: {point.damage.psnr.mean:.1f} dB")

    Args:
        model: The model, or just its name.
        options: Which budgets to sample, and limits.
        profile: An analysis of this model; made when not given.
        analysis: How to analyse without a profile; the model's usual scheduler at `options.steps` when not given.
        cache: Folder for captures and partial results; `$UNETC_CACHE` or `~/.cache/unetc` when not given.
        cluster: A Ray cluster that measures, in place of this process.
        on_progress: Called as the work advances.

    Raises:
        ModelError: If the model cannot be found or is not supported.
        ProfileError: If it cannot be analysed, or the profile is of another model.
        PlanError: If no budget can be met.
        WorkerError: If the cluster cannot be joined or fails.
    """
    from .compiler.search.pareto import pareto as measure

    folder = _cache(cache)
    found, known = _analysed(model, profile, analysis, options.steps, folder, cluster, on_progress)
    return measure(found, known, options, cache=folder, cluster=cluster, on_progress=on_progress)


@needed()
def compile(  # the name of the command; the builtin is not used here
    bundle: AnyPath, options: CompileOptions, *, cache: AnyPath | None = None, on_progress: OnProgress = ignore
) -> tuple[CompiledEngine, ...]:
    """Build the NVIDIA engines of a bundle into the cache, from where sessions take them.

        unetc.compile("bundle/", unetc.CompileOptions(target="tensorrt-rtx"))
        session = unetc.load("bundle/", target="tensorrt-rtx")

    Interrupted, the same call goes on with the missing engines. `tensorrt-rtx` needs no GPU for it.

    Args:
        bundle: Folder of the bundle.
        options: The target, its precision, and limits of the build.
        cache: Engines go into its folder `engines`; sessions look in `$UNETC_CACHE` or `~/.cache/unetc`, the default.
        on_progress: Called as the work advances.

    Returns:
        One engine per graph, the full model first.

    Raises:
        ArtifactError: If the bundle or the cache cannot be read or written.
        EngineBuildError: If an engine cannot be built. The finished ones are in the cache.
        MissingDependency: If the target's library is not installed.
    """
    from .compiler.tensorrt.compile_bundle import compile_bundle

    return compile_bundle(Path(bundle), options, cache=_cache(cache), on_progress=on_progress)


@needed()
def export_triton(
    bundle: AnyPath, destination: AnyPath, options: ExportOptions | None = None, *, on_progress: OnProgress = ignore
) -> Export:
    """Write a model repository for NVIDIA's Triton Inference Server from a bundle.

        export = unetc.export_triton("bundle/", "repository/")
        print(export.model, export.bytes_on_disk)

    Args:
        bundle: Folder of the bundle.
        destination: Folder of the repository; an earlier export there is replaced. A bad one is refused before any
            work.
        options: Where Triton runs the engines, and the name of the model; as the bundle says when not given.
        on_progress: Called after each engine.

    Returns:
        The models, with their largest batches, and the bytes of the repository.

    Raises:
        ArtifactError: If the bundle cannot be read or is damaged, or the repository cannot be written.
        CompileError: If Triton cannot run the engines on the target.
    """
    from .triton.export import export_bundle
    from .triton.options import ExportOptions

    return export_bundle(Path(bundle), Path(destination), options or ExportOptions(), on_progress=on_progress)


@needed()
def verify(bundle: AnyPath, options: VerifyOptions | None = None, *, on_progress: OnProgress = ignore) -> Verification:
    """Measure time and damage of a bundle on new seeds, along with simpler ways to save the same time.

        result = unetc.verify("bundle/")
        print(f"saves {1 - result.time_ratio:.0%}, relative L2 {result.damage.relative_l2.mean:.4f}")

    Args:
        bundle: Folder of the bundle.
        options: Rounds, batch, seed and target; the bundle's own when not given.
        on_progress: Called as the work advances.

    Raises:
        ArtifactError: If the bundle cannot be read or is damaged.
        SessionError: If the seed was used to make the bundle, or an option is out of range.
        MissingDependency: If the library of the target is not installed.
    """
    from .analyzer.verify import VerifyOptions
    from .analyzer.verify import verify as verify_bundle
    from .runtime.bundle import Bundle

    return verify_bundle(Bundle.open(Path(bundle)), options or VerifyOptions(), on_progress)


@needed()
def write_report(
    bundle: AnyPath,
    output: AnyPath,
    *,
    verification: Verification | None = None,
    on_progress: OnProgress = ignore,
) -> None:
    """Write one self-contained HTML page about a bundle; `unetc.report` is the package that draws it.

        unetc.write_report("bundle/", "report.html", verification=unetc.verify("bundle/"))

    Args:
        bundle: Folder of the bundle.
        output: The HTML file.
        verification: Result of `verify`; made when not given.
        on_progress: Called as the work advances.

    Raises:
        ArtifactError: If the bundle cannot be read, the verification is of another bundle or of another quality
            level than the default one, or the file cannot be written.
    """
    from .analyzer.report import write_report as write

    write(Path(bundle), Path(output), verification=verification, on_progress=on_progress)


def _analysed(
    model: ModelSource | str,
    profile: Profile | None,
    analysis: AnalysisOptions | None,
    steps: int,
    cache: Path,
    cluster: Cluster | None,
    on_progress: OnProgress,
    plan: Plan | None = None,
) -> tuple[Model, Profile]:
    """Find a model once, as that hashes its weights, and analyse it if there is no profile.

    A profile decides about ControlNet inputs, as its graph has them or not.

    Raises:
        PlanError: If there is no profile, and the plan is of another model.
    """
    from .models.find import ModelSource, find_model

    source = ModelSource.of(model)
    if profile is not None:
        return find_model(replace(source, controlnet=profile.model.controlnet)), profile
    from .analyzer.analyze import analyze_model
    from .compiler.engines import check_model

    found, options = find_model(source), analysis or _usual(source, steps)
    if plan is not None:
        check_model(plan, found.reference)
    return found, analyze_model(found, options, cache=cache, cluster=cluster, on_progress=on_progress)


def _usual(model: ModelSource | str, steps: int | None = None) -> AnalysisOptions:
    """Return the defaults of an analysis with the model's usual scheduler, and its usual steps if none are given."""
    from .analyzer.analysis import AnalysisOptions
    from .models.find import usual_sampling

    usual = usual_sampling(model)
    return AnalysisOptions(scheduler=usual.scheduler, steps=usual.steps if steps is None else steps)


def _cache(given: AnyPath | None) -> Path:
    from .environment import cache_folder

    return cache_folder() if given is None else Path(given)
