"""How much damage do peers do in the time that DeepCache takes, on the same trained, prompted model?

    python benchmarks/bench_peers.py             # about an hour and a half on two cores; resumes

The setting is `prompted-digits`, DDIM, 50 steps, diffusers' default guidance (7.5), 80 prompts that name every
attribute, and seeds that neither analysis nor build has used. Every contender samples the same noise under the same
prompts and is compared with the full model in the same runtime:

- DeepCache: the published package (0.1.1) around the unmodified diffusers pipeline, in torch
- T-GATE: `tgate.py` around the unmodified pipeline, in torch, with the gate step that saves the same time
- TaylorSeer's hook in diffusers, and the package hicache-pp, in torch, with the interval of DeepCache
- the rules of ZEUS, Spectrum, AdaptiveDiffusion and Adaptive Guidance, written here in `peer_rules.py`, in torch, with
  as many calls of the denoiser as fit into the same time
- the plan: `unetc build` with DeepCache's saving as its budget, in onnxruntime
- in onnxruntime, the controls of its bundle (docs/concepts.md#controls), and T-GATE's rule as a plan, which holds
  cross-attention from a step on, leaves guidance unchanged, and saves the same time if it can

DeepCache counts the steps of schedulers that repeat timesteps wrongly. A table shows what it does with two of them.

Finally, a plan with a budget of 0.27 draws more pictures, to check whether it follows its prompts as well as the full
model does.

Times cover the denoising loop. Torch and onnxruntime differ in speed, so a time ratio compares a contender with the
full model in the same runtime, sampled alternately. Writes `results/peers.json` and `docs/images/peers.svg`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captioned_digits import PICTURES, new_ruler
from captioned_digits import draw as draw_pictures
from command_line import add_results
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from image_classifier import ImageClassifier
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from peer_rules import AdaptiveDiffusion, HiCache, Rule, Spectrum, Zeus, guided_until, skipping, taylorseer
from prompt_following import Request, followed, full_requests
from result_file import picture_of, write
from spread_out import spread_out
from tgate import gated

import unetc
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts.plan import Phase, Plan, Prediction
from unetc.artifacts.profile import Profile
from unetc.artifacts.record import to_builtins
from unetc.backend import Array
from unetc.cli.output import progress
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.set_up import Setup, set_up
from unetc.conditions import Conditions
from unetc.environment import cores
from unetc.jobs import InProcess
from unetc.metrics.damage import measure_damage
from unetc.metrics.distances import relative_l2
from unetc.models.find import find_model
from unetc.models.pipeline import PipelineModel
from unetc.report.charts import FAINT, MUTED, PLAN, WIDTH, inline, number, styled
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise
from unetc.timing import interleaved_ms
from unetc.treatments import Treatment

MODEL = "prompted-digits"
STEPS = 50
BATCH = 8
SEED = 5000
REPEATING = {
    "pndm": partial(PNDMScheduler.from_config, skip_prk_steps=True),
    "heun": HeunDiscreteScheduler.from_config,
}
"""Schedulers that call the denoiser twice at some timesteps."""
CONTROLS = {
    "fewer_steps": "fewer steps",
    "other_solver": "another solver",
    "chosen_steps": "chosen steps",
    "steps_only": "unetc, whole steps only",
    "deep-hold": "DeepCache's rule, best level and period",
}
"""Controls of a bundle, and their names here."""
INTERVALS = (2, 3)
"""DeepCache's intervals, in steps: the full model runs at one step of each interval."""
SLOWER = 1.1
"""Most time of a peer / time of DeepCache, where both count as equally fast."""
BUDGET, BUDGET_SEEDS = 0.27, 4
"""Budget of the plan that draws more pictures, and number of pictures per prompt."""
ANALYSIS = AnalysisOptions(samples=6, batch=BATCH)

Contender = Callable[[Conditions, Array], Array]
"""Conditions and noise of a batch → latents."""


class Torch:
    """The diffusers pipeline, unmodified or with a peer around it."""

    def __init__(
        self,
        model: PipelineModel,
        guidance: float,
        scheduler: Callable[[Mapping[str, Any]], Any] = DDIMScheduler.from_config,
    ) -> None:
        """Load the pipeline, with a scheduler made of the model's configuration."""
        self._pipeline = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)
        self._pipeline.scheduler = scheduler(model.scheduler_config)
        self._pipeline.set_progress_bar_config(disable=True)
        self._guidance = guidance

    def cached(self, conditions: Conditions, noise: Array, *, interval: int) -> Array:
        """Sample latents with DeepCache."""
        helper = DeepCacheSDHelper(pipe=self._pipeline)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            return self.sample(conditions, noise)
        finally:
            helper.disable()

    def gated(self, conditions: Conditions, noise: Array, *, gate: int) -> Array:
        """Sample latents with T-GATE."""
        with gated(self._pipeline, gate) as options:
            return self.sample(conditions, noise, **options)

    def guided_until(self, conditions: Conditions, noise: Array, *, step: int) -> Array:
        """Sample latents without guidance from a step on."""
        with guided_until(self._pipeline, step) as options:
            return self.sample(conditions, noise, **options)

    def taylorseer(self, conditions: Conditions, noise: Array, *, interval: int, order: int) -> Array:
        """Sample latents with the TaylorSeer hook of diffusers."""
        with taylorseer(self._pipeline, interval, order):
            return self.sample(conditions, noise)

    def skipping(self, conditions: Conditions, noise: Array, *, rule: Callable[[], Rule]) -> Array:
        """Sample latents with a rule that skips calls."""
        with skipping(self._pipeline, rule()):
            return self.sample(conditions, noise)

    def calls_of(self, rule: Rule, conditions: Conditions, noise: Array) -> int:
        """Count the calls that a rule makes."""
        with skipping(self._pipeline, rule) as computed:
            self.sample(conditions, noise)
        return len(computed)

    def sample(self, conditions: Conditions, noise: Array, **options: Any) -> Array:
        """Sample latents."""
        own, negative = (torch.from_numpy(c["encoder_hidden_states"]) for c in (conditions.own, conditions.negative))
        latents = self._pipeline(
            prompt_embeds=own,
            negative_prompt_embeds=negative,
            latents=torch.from_numpy(noise),
            guidance_scale=self._guidance,
            num_inference_steps=STEPS,
            output_type="latent",
            **options,
        ).images
        result: Array = latents.numpy()
        return result


def in_session(session: Session, conditions: Conditions, noise: Array, **how: Any) -> Array:
    """Sample latents with a session."""
    return session.sample(noise=noise, conditions=conditions, latents=True, **how)


def time_ratio(one: Callable[[], Array], full: Callable[[], Array]) -> float:
    """Measure a contender's time / the full model's time, running them alternately."""
    times = interleaved_ms([full, one], rounds=5, warmup=1)
    return float(np.median(times[:, 1] / times[:, 0]))


def gate_step(earliest: float, saving: float) -> int:
    """Choose the gate step for a saving, or the largest saving that the method allows.

    Args:
        earliest: Time of sampling with the gate after the first step / time of the full model's sampling.
        saving: Share of the sampling time.
    """
    behind = (earliest * STEPS - 1) / (STEPS - 1)  # time of a step after the gate / time of a step before it
    return int(np.clip(round(STEPS * (1 - saving / max(1e-3, 1 - behind))), 1, STEPS - 1))


def rules_at(
    torch_side: Torch, interval: int, saving: float, conditions: Conditions, noise: Array
) -> dict[str, Contender]:
    """Set peers that skip calls to a saving, or to the interval that DeepCache has.

    Args:
        torch_side: The pipeline.
        interval: The interval in steps.
        saving: Share of the sampling time.
        conditions: Conditions of one batch, which is not among those compared.
        noise: Its noise.
    """
    calls = int(STEPS * (1 - saving))
    thresholds = np.geomspace(1e-4, 1.0, 15)  # of these, the smallest that needs no more calls
    threshold = next(
        (one for one in thresholds if torch_side.calls_of(AdaptiveDiffusion(one), conditions, noise) <= calls),
        thresholds[-1],
    )
    full = partial(torch_side.sample, conditions, noise)
    earliest = time_ratio(partial(torch_side.guided_until, conditions, noise, step=1), full)
    guided = gate_step(earliest, saving)
    rules: dict[str, Callable[[], Rule]] = {
        "rule of ZEUS": partial(Zeus, STEPS, calls),
        "rule of Spectrum": partial(Spectrum, STEPS, calls),
        f"rule of AdaptiveDiffusion, threshold {threshold:.1g}": partial(AdaptiveDiffusion, threshold),
        f"hicache-pp 1.3.0, Hermite, interval {interval}": partial(HiCache, STEPS, interval, "hermite"),
        f"hicache-pp 1.3.0, DMD, interval {interval}": partial(HiCache, STEPS, interval, "dmd"),
    }
    return {
        **{
            f"TaylorSeer in diffusers, order {order}, interval {interval}": partial(
                torch_side.taylorseer, interval=interval, order=order
            )
            for order in (1, 2)
        },
        **{name: partial(torch_side.skipping, rule=rule) for name, rule in rules.items()},
        f"rule of Adaptive Guidance, {guided} guided steps": partial(torch_side.guided_until, step=guided),
    }


def repeating(model: PipelineModel, guidance: float) -> list[list[object]]:
    """Run DeepCache with schedulers that repeat timesteps; each row has the damage and the time of one."""
    conditions = model.encode([request.prompt for request in full_requests()[:BATCH]], guidance)
    noise = initial_noise(SEED, range(BATCH), model.sample_shape)
    rows: list[list[object]] = []
    for name, scheduler in REPEATING.items():
        one = Torch(model, guidance, scheduler)
        full = one.sample(conditions, noise)
        for interval in INTERVALS:
            cached = partial(one.cached, conditions, noise, interval=interval)
            damage = float(relative_l2(full, cached()).mean())
            rows.append([name, interval, time_ratio(cached, partial(one.sample, conditions, noise)), damage])
    return rows


def gated_at(profile: Profile, log_snr: Sequence[float], step: int) -> Plan:
    """Plan T-GATE's rule: hold cross-attention from a step to the end.

    Source:
        Zhang et al. 2024, arXiv:2404.02747, algorithm 1, without ending guidance, which no treatment of a component
        can express.
    """
    crossing = {c.name: Treatment.HOLD for c in profile.components if c.name.endswith("attn2")}
    low, high = profile.bins[0].low, profile.bins[-1].high
    edge = (log_snr[step - 1] + log_snr[step]) / 2
    return Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.0,
        max_engines=1,
        engines=with_emissions([{}, crossing], profile.components),
        phases=(Phase(low=low, high=edge, cycle=(0,)), Phase(low=edge, high=high, cycle=(1,))),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )


def tgate(setup: Setup, saving: float) -> tuple[int, Session]:
    """Choose the gate step for a saving, or the largest saving that cross-attention allows."""
    log_snr, workbench = setup.scheduler.table(STEPS).log_snr.tolist(), setup.workbench
    earliest = workbench.compile(gated_at(setup.profile, log_snr, 1))
    step = gate_step(earliest.time_ratio, saving)
    assert isinstance(workbench.workers, InProcess)
    return step, workbench.workers.bench.session(workbench.compile(gated_at(setup.profile, log_snr, step)))


def sample_all(
    contenders: dict[str, Contender], conditions: Conditions, seed: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Sample all prompts with all contenders, alternating after every batch; return times and latents."""
    count = conditions.rows or 0
    times = []
    latents: dict[str, list[Array]] = {name: [] for name in contenders}
    shape = find_model(MODEL).sample_shape
    for first in range(0, count, BATCH):
        rows = range(first, min(first + BATCH, count))
        own, noise = conditions.take(rows), initial_noise(seed, rows, shape)
        made: dict[str, Array] = {}
        calls = [partial(_keep, made, name, contender, own, noise) for name, contender in contenders.items()]
        times.append(interleaved_ms(calls, rounds=1, warmup=int(first == 0))[0])
        for name in contenders:
            latents[name].append(made[name])
    columns = dict(zip(contenders, np.array(times).T, strict=True))
    return columns, {name: np.concatenate(parts) for name, parts in latents.items()}


def _keep(into: dict[str, Array], name: str, contender: Contender, conditions: Conditions, noise: Array) -> None:
    into[name] = contender(conditions, noise)


class Judge:
    """Checks whether pictures follow their prompts."""

    def __init__(self, model: PipelineModel) -> None:
        """Load the classifier and calibrate the ruler."""
        self._classifier = ImageClassifier.load(model.folder / "classifier/model.safetensors")
        self._ruler = new_ruler(draw_pictures(PICTURES, seed=0))  # the pictures that the model was trained on

    def followed(self, requests: Sequence[Request], images: Array) -> dict[str, float]:
        """Compute the share of images `[count, 3, 32, 32]` that show each requested attribute, and all of them."""
        grey = torch.from_numpy(images).mean(dim=1, keepdim=True).clamp(-1, 1)
        return followed(requests, grey, self._classifier, self._ruler)


def build_at(saving: float, work: Path, *, controls: bool) -> Bundle:
    """Build a bundle that saves a share of the time."""
    path = work / f"peers-{saving:.3f}"
    model, options = find_model(MODEL), BuildOptions(plan=PlanOptions(budget=saving), controls=controls)
    with progress() as on_progress:
        profile = analyze_model(model, ANALYSIS, cache=work, on_progress=on_progress)
        build(model, profile, path, options, cache=work, on_progress=on_progress)
    return Bundle.open(path)


def compare(interval: int, model: PipelineModel, judge: Judge, work: Path, guidance: float) -> list[dict[str, Any]]:
    """Measure all contenders at the time of DeepCache with one interval."""
    requests = full_requests()
    conditions = model.encode([request.prompt for request in requests], guidance)
    torch_side = Torch(model, guidance)
    few, noise = conditions.take(range(BATCH)), initial_noise(SEED - 1, range(BATCH), model.sample_shape)
    in_full = partial(torch_side.sample, few, noise)
    saving = 1 - time_ratio(partial(torch_side.cached, few, noise, interval=interval), in_full)
    earliest = time_ratio(partial(torch_side.gated, few, noise, gate=1), in_full)
    torch_gate = gate_step(earliest, saving)
    bundle = build_at(saving, work, controls=True)
    backend = open_backend(bundle.manifest.target, threads=bundle.manifest.threads)
    session = Session.of(bundle, backend)
    profile = Profile.from_json(bundle.profile, "the bundle's profile")
    with set_up(model, profile, steps=STEPS, cache=work) as setup:
        gate, crossing_held = tgate(setup, saving)
    controls = {
        CONTROLS[control.name]: partial(
            in_session, Session.of(bundle, backend, control=control), full_model=control.plan is None
        )
        for control in bundle.manifest.controls
        if control.name in CONTROLS
    }
    contenders: dict[str, Contender] = {
        "full, torch": torch_side.sample,
        f"DeepCache 0.1.1, interval {interval}": partial(torch_side.cached, interval=interval),
        f"T-GATE, gate {torch_gate}": partial(torch_side.gated, gate=torch_gate),
        **rules_at(torch_side, interval, saving, few, noise),
        "full": partial(in_session, session, full_model=True),
        f"unetc, budget {saving:.2f}": partial(in_session, session),
        f"T-GATE's rule as a plan, from step {gate}": partial(in_session, crossing_held),
        **controls,
    }
    times, latents = sample_all(contenders, conditions, SEED)
    images = {name: session.decode(own) for name, own in latents.items()}
    rows, reference = [], ""
    for name, own in images.items():
        reference = name if name.startswith("full") else reference
        rows.append(
            {
                "interval": interval,
                "contender": name,
                "time_ratio": float(np.median(times[name] / times[reference])),
                "damage": to_builtins(measure_damage(images[reference], own)),
                "followed": judge.followed(requests, own),
            }
        )
    return rows


def accuracy(model: PipelineModel, judge: Judge, work: Path, guidance: float) -> list[dict[str, Any]]:
    """Compare how well a plan and the full model follow the prompts from the same noise."""
    bundle = build_at(BUDGET, work, controls=False)
    session = Session.of(bundle, open_backend(bundle.manifest.target, threads=bundle.manifest.threads))
    contenders: dict[str, Contender] = {
        "full": partial(in_session, session, full_model=True),
        f"unetc, budget {BUDGET}": partial(in_session, session),
    }
    requests = full_requests()
    conditions = model.encode([request.prompt for request in requests], guidance)
    sampled = [sample_all(contenders, conditions, SEED + 1 + i) for i in range(BUDGET_SEEDS)]
    times, images = (
        {name: np.concatenate([part[name] for part in parts]) for name in contenders}
        for parts in zip(*sampled, strict=True)
    )
    images = {name: session.decode(own) for name, own in images.items()}
    return [
        {
            "contender": name,
            "samples": len(own),
            "time_ratio": float(np.median(times[name] / times["full"])),
            "damage": to_builtins(measure_damage(images["full"], own)),
            "followed": judge.followed(requests * BUDGET_SEEDS, own),
        }
        for name, own in images.items()
    ]


_SETTINGS = re.compile(r", (interval|gate|from step|threshold|budget) [\d.]+|, \d+ guided steps| \(.*\)")
"""What differs between the contenders of one method."""
_LABEL_GAP = 0.042
"""Least distance between two names in the picture, as a share of its height."""


@styled
def draw(rows: list[dict[str, Any]]) -> str:
    """Draw damage against time, one line per method, with the names of all methods in a column on the right."""
    figure = Figure((WIDTH, 5.2))
    axes = figure.add_axes((0.07, 0.1, 0.68, 0.87))
    axes.set(yscale="log", xlabel="time / time of the full model in the same runtime", ylabel="damage, relative L2")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.grid(axis="y", which="major", color=FAINT, linewidth=0.5)
    methods: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (damage := row["damage"]["relative_l2"]["mean"]) > 0:
            methods.setdefault(_SETTINGS.sub("", row["contender"]), []).append((row["time_ratio"], damage))
    colors = {method: PLAN if method.startswith("unetc") else MUTED for method in methods}
    for method, points in methods.items():
        marker = "D-" if method.startswith("unetc") else "o-"
        axes.plot(*zip(*points, strict=True), marker, color=colors[method], markersize=4, linewidth=1)
    highest_first = sorted(methods, key=lambda method: -max(methods[method])[1])
    axes.autoscale_view()  # the places of names depend on the limits
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform(max(methods[method]))[1]) for method in highest_first]
    for method, height in zip(highest_first, spread_out(wanted, _LABEL_GAP), strict=True):
        axes.annotate(
            method,
            max(methods[method]),
            (1.03, height),
            textcoords="axes fraction",
            color=colors[method],
            fontsize=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 4},
        )
    return inline(figure, "Damage against time of unetc and its peers")


def figures(rows: list[dict[str, Any]], at_budget: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute the figures, with their goals."""
    found: list[dict[str, Any]] = []
    for interval in INTERVALS:
        own = [row for row in rows if row["interval"] == interval]
        mine, theirs = (
            next(row for row in own if row["contender"].startswith(name))
            for name in ("unetc, budget", "DeepCache 0.1.1")
        )
        peers = [row for row in own if not row["contender"].startswith(("full", "unetc", *CONTROLS.values()))]
        in_time = [row for row in peers if row["time_ratio"] <= SLOWER * theirs["time_ratio"]]
        best = min(in_time, key=_damage_of)
        found += [
            {
                "figure": f"damage of unetc / damage of DeepCache, interval {interval}",
                "value": _damage_of(mine) / _damage_of(theirs),
                "goal": {"at_most": 0.5},
            },
            {
                "figure": f"damage of unetc / damage of the best peer in that time ({best['contender']}), "
                f"interval {interval}",
                "value": _damage_of(mine) / _damage_of(best),
                "goal": {"at_most": 0.5},
            },
            {
                "figure": f"time of unetc / time of the best peer in that time ({best['contender']}), "
                f"interval {interval}",
                "value": mine["time_ratio"] / best["time_ratio"],
            },
            {
                "figure": f"time of unetc / time of DeepCache (both ratios to full), interval {interval}",
                "value": mine["time_ratio"] / theirs["time_ratio"],
            },
        ]
    full, planned = at_budget
    return found + [
        {
            "figure": f"budget {BUDGET}: full model − plan, {words}, points",
            "value": 100 * (full["followed"][name] - planned["followed"][name]),
            "goal": {"at_most": 1},
        }
        for name, words in (("digit", "right digit"), ("everything", "everything right"))
    ]


def _damage_of(row: Mapping[str, Any]) -> float:
    return float(row["damage"]["relative_l2"]["mean"])


def table_of(title: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Lay out contenders in a table."""
    columns = ["contender", "time ratio", "relative L2", "PSNR dB", "SSIM", "right digit", "everything right"]
    cells = [
        [
            row["contender"],
            row["time_ratio"],
            *(row["damage"][metric]["mean"] for metric in ("relative_l2", "psnr", "ssim")),
            row["followed"]["digit"],
            row["followed"]["everything"],
        ]
        for row in rows
    ]
    return {"title": title, "columns": columns, "rows": cells}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache and bundles")
    add_results(parser)
    options = parser.parse_args()
    torch.set_num_threads(cores())
    model = find_model(MODEL)
    assert isinstance(model, PipelineModel)
    guidance, judge = model.guidance_scale, Judge(model)
    rows = [row for interval in INTERVALS for row in compare(interval, model, judge, options.work, guidance)]
    at_budget = accuracy(model, judge, options.work, guidance)
    settings = {"model": MODEL, "steps": STEPS, "batch": BATCH, "seed": SEED, "guidance": guidance}
    tables = [
        table_of(
            f"At the time of DeepCache with interval {interval}, {len(full_requests())} prompts, same noise",
            [row for row in rows if row["interval"] == interval],
        )
        for interval in INTERVALS
    ]
    tables.append(
        {
            "title": "DeepCache with schedulers that repeat timesteps, against the full model with the same one",
            "columns": ["scheduler", "interval", "time ratio", "relative L2 of the latents"],
            "rows": repeating(model, guidance),
        }
    )
    tables.append(table_of(f"At a budget of {BUDGET}, {at_budget[0]['samples']} samples", at_budget))
    record = {
        "settings": settings,
        "figures": figures(rows, at_budget),
        "tables": tables,
        "contenders": rows,
        "at_budget": at_budget,
    }
    write(options.results, "peers", record)
    picture_of(options.results, "peers.svg").write_text(draw(rows))


if __name__ == "__main__":
    main()
