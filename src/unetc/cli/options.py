"""Options that several commands share, in groups that make their objects.

Heavy imports stay inside the methods, so that `--help` is fast.
"""

from __future__ import annotations

import functools
import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .groups import Group

if TYPE_CHECKING:
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.analyzer.ranking import By
    from unetc.artifacts.profile import Profile
    from unetc.compiler.planner.planner import PlanOptions
    from unetc.jobs import Cluster
    from unetc.models.find import ModelSource, Sampling

BundlePath = Annotated[Path, typer.Argument(help="Bundle folder.", metavar="BUNDLE")]
BundleTarget = Annotated[
    str | None,
    typer.Option("--target", help="Where engines run (default: the target that the bundle was built for)."),
]
QualityLevel = Annotated[
    str | None,
    typer.Option("--level", help="Quality level, as 40%, or full (default: the one that saves least)."),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder for captures and partial results (default: $UNETC_CACHE or ~/.cache/unetc)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads of the target (default: all cores).")]
BundleThreads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads of the target (default: the bundle's).")
]

DEFAULT_BUDGET = 0.27


class ModelGroup(Group, panel="Model"):
    """The model and its preparation."""

    model: Annotated[
        str,
        typer.Argument(
            help="Built-in model (digits, fashion, prompted-digits), diffusers folder, Hub id, glide:base, "
            "glide:upsample, or adm:OPTIONS.",
            metavar="MODEL",
        ),
    ]
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint of glide:base, glide:upsample or adm:OPTIONS, .pt or .safetensors.")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA to fuse into the model, as style.safetensors or style.safetensors:0.8; repeatable."),
    ] = None
    controlnet: Annotated[
        bool,
        typer.Option("--controlnet", help="Give engines the inputs of a ControlNet, for unetc.diffusers."),
    ] = False
    controlnet_model: Annotated[
        Path | None,
        typer.Option(help="Measure with this ControlNet, the folder of a ControlNetModel; needs --control-images."),
    ] = None
    control_images: Annotated[
        Path | None,
        typer.Option(help="Folder of .png or .jpg control images to measure with; prompt k gets image k."),
    ] = None

    variant: Annotated[
        str | None,
        typer.Option(help="Variant of the weights to read, such as fp16 (default: the files without one)."),
    ] = None

    def source(self) -> ModelSource:
        """Make the source of the model.

        Raises:
            ModelError: If a LoRA is not given as a path and a scale.
            typer.BadParameter: If only one of a ControlNet and control images is given.
        """
        from unetc.models.control_images import ControlSource
        from unetc.models.find import ModelSource
        from unetc.models.lora import Lora

        loras = tuple(Lora.parse(text) for text in self.lora or ())
        control = None
        if self.controlnet_model is not None and self.control_images is not None:
            control = ControlSource(model=self.controlnet_model, images=self.control_images)
        elif self.controlnet_model is not None or self.control_images is not None:
            raise typer.BadParameter("--controlnet-model and --control-images measure together; give both or none.")
        return ModelSource(
            self.model,
            weights=self.weights,
            loras=loras,
            controlnet=self.controlnet,
            control=control,
            variant=self.variant,
        )


class AnalysisGroup(Group, panel="Sampling and measuring"):
    """How a model is sampled and measured."""

    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, euler, dpmsolver++ or another name of docs/schedulers.md (default: ddim, for glide:base "
            "ddpm, for distilled models lcm or tcd)."
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoiser calls per sample (default: 50, for GLIDE as published, 4 for lcm)."),
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="Trajectories that every ablation is measured on.")] = 16
    bins: Annotated[int, typer.Option(min=1, help="Number of noise levels to distinguish.")] = 8
    seed: Seed = 0
    target: Annotated[str, typer.Option(help="Where engines run; costs are measured there.")] = "onnxruntime:cpu"
    threads: Threads = None
    batch: Annotated[int, typer.Option(min=1, help="Batch size at which time is measured.")] = 8
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to measure on, one a line; the last quarter is kept for verify (default: the model's)."
        ),
    ] = None
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes to measure on, as 0,3,7 or by name; the last quarter is kept for verify (default: all)."
        ),
    ] = None
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to measure on, for models that inpaint or edit (default: drawn images)."),
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance; 0 to 1 turn it off (default: the pipeline's)."),
    ] = None

    @functools.lru_cache(maxsize=1)  # noqa: B019 (keeps one group; a model on the Hub is asked for over the network)
    def _usual(self, model: ModelSource) -> Sampling:
        """Look up the default scheduler and number of steps of a model, once per command."""
        from unetc.models.find import usual_sampling

        return usual_sampling(model)

    def steps_of(self, model: ModelSource) -> int:
        """Count the steps: as asked for, or as usual for the model."""
        return self.steps or self._usual(model).steps

    def options(
        self,
        model: ModelSource,
        *,
        components: tuple[str, ...] = (),
        decisive: int | None = 7,
        time_limit_s: float = math.inf,
    ) -> AnalysisOptions:
        """Make the options of the analysis.

        Raises:
            ProfileError: If a number is out of range.
            ModelError: If the prompts cannot be read.
        """
        from unetc.analyzer.analysis import AnalysisOptions
        from unetc.environment import cores
        from unetc.models.prompts import read_prompts

        return AnalysisOptions(
            scheduler=self.scheduler or self._usual(model).scheduler,
            steps=self.steps_of(model),
            samples=self.samples,
            bins=self.bins,
            seed=self.seed,
            target=self.target,
            threads=self.threads or cores(),
            batch=self.batch,
            prompts=read_prompts(self.prompts) if self.prompts else (),
            labels=tuple(self.labels.split(",")) if self.labels else (),
            images=str(self.images) if self.images else None,
            guidance_scale=self.guidance_scale,
            components=components,
            decisive=decisive,
            time_limit_s=time_limit_s,
        )


class ProfileGroup(AnalysisGroup):
    """A profile, or how to make one."""

    profile: Annotated[
        Path | None,
        typer.Option(
            help="Profile of this model, in place of the other options here except --steps (default: analyse now)."
        ),
    ] = None

    def known(self) -> Profile | None:
        """Load the profile, if one is given.

        Raises:
            ArtifactError: If it cannot be read.
        """
        from unetc.artifacts.profile import Profile

        return Profile.load(self.profile) if self.profile else None

    def analysis(self, model: ModelSource) -> AnalysisOptions | None:
        """Make the options of the analysis, unless there is a profile: then their numbers need not fit each other."""
        return None if self.profile else self.options(model)


class BudgetGroup(Group, panel="Saving"):
    """How much time to save, said in one of two ways."""

    budget: Annotated[
        float | None,
        typer.Option(help=f"Share of the time to save, in [0, 1): 0.27 saves 27 % (default: {DEFAULT_BUDGET})."),
    ] = None
    speedup: Annotated[
        float | None,
        typer.Option(help="The same as a factor of at least 1: 1.37 saves 27 %, as --budget 0.27 does."),
    ] = None

    def share(self) -> float:
        """Compute the share of the time to save; planning checks its range.

        Raises:
            typer.BadParameter: If it is given both ways.
            PlanError: If the speed-up is out of range.
        """
        if self.speedup is None:
            return DEFAULT_BUDGET if self.budget is None else self.budget
        return _share_of(self.speedup, self.budget)


class LadderGroup(Group, panel="Saving"):
    """How much time each quality level saves, said in one of two ways."""

    budget: Annotated[
        str | None,
        typer.Option(
            metavar="X[,X...]",
            help="Share of the time to save, in [0, 1): 0.27 saves 27 %. Several, as 0.27,0.4,0.55, make a ladder of "
            f"quality levels (default: {DEFAULT_BUDGET}).",
        ),
    ] = None
    speedup: Annotated[
        float | None,
        typer.Option(help="The same as a factor of at least 1: 1.37 saves 27 %, as --budget 0.27 does."),
    ] = None

    def shares(self) -> tuple[float, ...]:
        """Compute the share of the time that each level saves; the options of the build check their ranges.

        Raises:
            typer.BadParameter: If it is given both ways, or a budget is not a number.
            PlanError: If the speed-up is out of range.
        """
        if self.speedup is not None:
            return (_share_of(self.speedup, self.budget),)
        if self.budget is None:
            return (DEFAULT_BUDGET,)
        try:
            return tuple(float(text) for text in self.budget.split(","))
        except ValueError:
            raise typer.BadParameter(
                f"cannot read the budget {self.budget!r}. Expected numbers in [0, 1) with commas between them, as 0.27 "
                "or 0.27,0.4,0.55."
            ) from None


def _share_of(speedup: float, budget: object) -> float:
    """Compute the share of the time that a speed-up saves.

    Raises:
        typer.BadParameter: If a budget is given too.
        PlanError: If the speed-up is out of range.
    """
    from unetc.errors import PlanError

    if budget is not None:
        raise typer.BadParameter("--speedup is another way to give --budget; give one of them.")
    if not 1 <= speedup < math.inf:
        raise PlanError(
            f"a speed-up is full time / planned time, at least 1 and finite; got {speedup:g}. "
            "Try 1.37, which saves 27 %."
        )
    return 1 - 1 / speedup


class LimitGroup(Group, panel="Planning"):
    """The planner and the limits that it keeps to."""

    max_engines: Annotated[int, typer.Option(min=1, help="Most engines in addition to the full model.")] = 4
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Most weights of all engines together, the full model included, as a multiple of the full model's "
            "(default: no limit).",
        ),
    ] = None
    planner: Annotated[
        str,
        typer.Option(metavar="fast|exact", help="fast, or exact: an integer program, about a hundred times slower."),
    ] = "fast"

    def plan(self, budget: float) -> PlanOptions:
        """Make the options of the planner.

        Raises:
            PlanError: If the budget is out of range, or there is no such planner.
        """
        from unetc.compiler.planner.planner import PlanOptions

        return PlanOptions(
            budget=budget, max_engines=self.max_engines, max_memory=self.max_memory, planner=self.planner
        )


class ClusterGroup(Group, panel="Cluster"):
    """The machines that measure."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Measure on a Ray cluster: host:6379, auto for the one on this machine, or local to start one "
            "(default: in this process).",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Most workers of the cluster (default: CPUs / --threads, or one for each GPU)."),
    ] = None

    def cluster(self) -> Cluster | None:
        """Return the cluster; None for this process.

        Raises:
            typer.BadParameter: If a number of workers is given without a cluster.
            ModuleNotFoundError: Without Ray.
        """
        from unetc.jobs import Cluster
        from unetc.ray_token import guard

        if self.ray is None:
            if self.workers is not None:
                raise typer.BadParameter("--workers limits the workers of a cluster; give --ray too.")
            return None
        guard(self.ray)
        import_module("ray")  # so that a missing extra is named before the model is read
        return Cluster(address=self.ray, most_workers=self.workers)


class RankingGroup(Group, panel="Ranking"):
    """Which components of a profile to show, in which order."""

    top: Annotated[int, typer.Option(min=0, help="Number of components to show; 0 shows all.")] = 10
    by: Annotated[
        str,
        typer.Option(
            metavar="worth|saving|damage",
            help="Order of the components; worth is the time saved per damage. Those that save nothing come last.",
        ),
    ] = "worth"
    bin: Annotated[
        int | None,
        typer.Option(min=1, help="Show one noise level alone; 1 is the noisiest (default: all, and each in short)."),
    ] = None

    def order(self) -> By:
        """Read the order.

        Raises:
            typer.BadParameter: If there is no such order.
        """
        from unetc.analyzer.ranking import By

        if self.by not in tuple(By):
            raise typer.BadParameter(f"cannot rank by {self.by!r}. Expected one of: {', '.join(By)}.")
        return By(self.by)
