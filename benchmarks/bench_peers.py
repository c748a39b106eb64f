"""What do peers lose at the time that DeepCache takes, on the same trained, prompted model?

    python benchmarks/bench_peers.py             # about 25 minutes on two cores; resumes

`prompted-digits`, DDIM, 50 steps, with the guidance of its card, 80 prompts that name everything, seeds that neither
analysis nor build has seen. Every contender samples the same noise under the same prompts and is held against the full
model of its own runtime:

- DeepCache: its own package (0.1.1) around the unmodified diffusers pipeline, in torch
- the plan: `unetc build` with the budget that DeepCache saves, in onnxruntime
- DeepCache's rule, T-GATE's rule (cross-attention held from a step on, where that saves so much) and fewer steps, in
  onnxruntime

Time is that of the denoising loop. Torch and onnxruntime have different speeds, so a time ratio compares a contender
with the full model in the same runtime, sampled in turns. Writes `results/peers.json` and `docs/images/peers.svg`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captioned_digits import Ruler
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, StableDiffusionPipeline
from matplotlib.figure import Figure
from prompt_following import followed, full_requests

import unetc
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.damage import measure_damage
from unetc.analyzer.metrics.classifier import DigitClassifier
from unetc.artifacts.plan import Phase, Plan, Prediction
from unetc.artifacts.profile import Profile, Treatment
from unetc.artifacts.record import to_builtins
from unetc.backend import Array
from unetc.cli.output import progress
from unetc.compiler.emissions import with_emissions
from unetc.compiler.planner import PlanOptions
from unetc.conditions import Conditions
from unetc.environment import cores, describe
from unetc.models import Model, find_model
from unetc.report.charts import MUTED, PLAN, WIDTH, inline, styled
from unetc.runtime.backend import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.solver.noise import initial_noise
from unetc.timing import interleaved_ms
from unetc.workflow.build import BuildOptions, build
from unetc.workflow.setup import Setup, set_up

HERE = Path(__file__).parent
MODEL = "prompted-digits"
STEPS = 50
BATCH = 8
SEED = 5000
INTERVALS = (2, 3)
"""DeepCache computes everything at one of so many steps."""
ANALYSIS = AnalysisOptions(samples=6, batch=BATCH)

Contender = Callable[[Conditions, Array], Array]
"""Conditions and noise of a batch → latents."""


class Torch:
    """The pipeline of diffusers, as it is or with DeepCache around it."""

    def __init__(self, model: Model, guidance: float) -> None:
        """Load the pipeline."""
        self._pipeline = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)
        self._pipeline.scheduler = DDIMScheduler.from_config(model.scheduler_config)
        self._pipeline.set_progress_bar_config(disable=True)
        self._guidance = guidance

    def sample(self, conditions: Conditions, noise: Array, interval: int | None = None) -> Array:
        """Sample latents; with DeepCache if an interval is given."""
        helper = DeepCacheSDHelper(pipe=self._pipeline) if interval else None
        if helper:
            helper.set_params(cache_interval=interval, cache_branch_id=0)
            helper.enable()
        own, negative = (torch.from_numpy(c["encoder_hidden_states"]) for c in (conditions.own, conditions.negative))
        latents = self._pipeline(
            prompt_embeds=own,
            negative_prompt_embeds=negative,
            latents=torch.from_numpy(noise),
            guidance_scale=self._guidance,
            num_inference_steps=STEPS,
            output_type="latent",
        ).images
        if helper:
            helper.disable()
        result: Array = latents.numpy()
        return result


def in_session(session: Session, conditions: Conditions, noise: Array, **how: Any) -> Array:
    """Sample latents with a session."""
    return session.sample(noise=noise, conditions=conditions, latents=True, **how)


def gated_at(profile: Profile, log_snr: Sequence[float], step: int) -> Plan:
    """Plan T-GATE's rule: cross-attention is held from a step to the end.

    Source:
        Zhang et al. 2024, arXiv:2404.02747, algorithm 1, without the end of guidance, which is no treatment of a
        component.
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
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0),
    )


def tgate(setup: Setup, saving: float) -> tuple[int, Session]:
    """Find the gate step that saves what is asked, or else as much as cross-attention can."""
    log_snr = setup.solver.table(STEPS).log_snr.tolist()
    earliest = setup.workbench.compile(gated_at(setup.profile, log_snr, 1))
    share = max(1e-3, earliest.saving) * STEPS / (STEPS - 1)
    step = int(np.clip(round(STEPS * (1 - saving / share)), 1, STEPS - 1))
    return step, setup.workbench.compile(gated_at(setup.profile, log_snr, step)).session


def sample_all(contenders: dict[str, Contender], conditions: Conditions) -> tuple[dict[str, Any], dict[str, Array]]:
    """Let all contenders sample all prompts in turns, a batch at a time; return times and latents."""
    count = conditions.rows or 0
    times, latents = [], {name: [] for name in contenders}
    shape = find_model(MODEL).sample_shape
    for first in range(0, count, BATCH):
        rows = range(first, min(first + BATCH, count))
        own, noise = conditions.take(rows), initial_noise(SEED, rows, shape)
        made: dict[str, Array] = {}
        calls = [partial(_keep, made, name, contender, own, noise) for name, contender in contenders.items()]
        times.append(interleaved_ms(calls, rounds=1, warmup=int(first == 0))[0])
        for name in contenders:
            latents[name].append(made[name])
    columns = dict(zip(contenders, np.array(times).T, strict=True))
    return columns, {name: np.concatenate(parts) for name, parts in latents.items()}


def _keep(into: dict[str, Array], name: str, contender: Contender, conditions: Conditions, noise: Array) -> None:
    into[name] = contender(conditions, noise)


def compare(interval: int, model: Model, work: Path, guidance: float) -> list[dict[str, Any]]:
    """Measure everything at the time of DeepCache with one interval."""
    requests = full_requests()
    conditions = model.encode([request.prompt for request in requests], guidance)
    torch_side = Torch(model, guidance)
    deepcache = partial(torch_side.sample, interval=interval)
    few = conditions.take(range(BATCH))
    noise = initial_noise(SEED - 1, range(BATCH), model.sample_shape)
    trial = interleaved_ms([lambda: torch_side.sample(few, noise), lambda: deepcache(few, noise)], rounds=5, warmup=1)
    saving = float(1 - np.median(trial[:, 1] / trial[:, 0]))
    path = work / f"peers-{interval}"
    with progress() as on_progress:
        options = BuildOptions(plan=PlanOptions(budget=saving), analysis=ANALYSIS)
        build(MODEL, path, options, cache=work, on_progress=on_progress)
    bundle = Bundle.open(path)
    backend = open_backend(bundle.manifest.target, threads=bundle.manifest.threads)
    session = Session.of(bundle, backend)
    profile = Profile.from_json(bundle.profile, "the bundle's profile")
    setup = set_up(MODEL, analysis=ANALYSIS, steps=STEPS, cache=work, profile=profile)
    gate, gated = tgate(setup, saving)
    fewer = max(1, round(STEPS * (1 - saving)))
    deep = next(control for control in bundle.manifest.controls if control.name == "deep-hold")
    contenders: dict[str, Contender] = {
        "full, torch": torch_side.sample,
        f"DeepCache 0.1.1, interval {interval}": deepcache,
        "full": partial(in_session, session, lossless=True),
        f"unetc, budget {saving:.2f}": partial(in_session, session),
        "DeepCache's rule, best level and period": partial(in_session, Session.of(bundle, backend, control=deep)),
        f"T-GATE's rule from step {gate}": partial(in_session, gated),
        f"fewer steps ({fewer})": partial(in_session, session, lossless=True, steps=fewer),
    }
    times, latents = sample_all(contenders, conditions)
    images = {name: session.decode(own) for name, own in latents.items()}
    classifier = DigitClassifier.load(model.folder / "classifier/model.safetensors")
    ruler = Ruler()
    rows = []
    for place, (name, own) in enumerate(images.items()):
        reference = "full, torch" if place < 2 else "full"
        grey = torch.from_numpy(own).mean(dim=1, keepdim=True).clamp(-1, 1)
        rows.append(
            {
                "interval": interval,
                "contender": name,
                "time_ratio": float(np.median(times[name] / times[reference])),
                "damage": to_builtins(measure_damage(images[reference], own)),
                "followed": followed(requests, grey, classifier, ruler),
            }
        )
    return rows


@styled
def draw(rows: list[dict[str, Any]]) -> str:
    """Draw damage against time of all contenders."""
    figure = Figure((WIDTH, 4.4))
    axes = figure.add_axes((0.08, 0.12, 0.86, 0.8))
    axes.set(yscale="log", xlabel="time / time of the full model in the same runtime", ylabel="damage, relative L2")
    for row in rows:
        if (damage := row["damage"]["relative_l2"]["mean"]) > 0:
            mine = row["contender"].startswith("unetc")
            axes.plot([row["time_ratio"]], [damage], "D" if mine else "o", color=PLAN if mine else MUTED)
            place = (row["time_ratio"], damage)
            axes.annotate(row["contender"], place, (5, 4), textcoords="offset points", color=MUTED, fontsize=7.5)
    return inline(figure, "Damage against time of unetc and its peers")


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read off the goals."""
    found = []
    for interval in INTERVALS:
        own = {row["contender"].split(",")[0].split(" ")[0]: row for row in rows if row["interval"] == interval}
        mine, theirs = own["unetc"], own["DeepCache"]
        ratio = mine["damage"]["relative_l2"]["mean"] / theirs["damage"]["relative_l2"]["mean"]
        found += [
            {
                "figure": f"damage of unetc / damage of DeepCache, interval {interval}",
                "value": ratio,
                "goal": {"at_most": 0.5},
            },
            {
                "figure": f"time of unetc / time of DeepCache (both ratios to full), interval {interval}",
                "value": mine["time_ratio"] / theirs["time_ratio"],
            },
        ]
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache and bundles")
    options = parser.parse_args()
    torch.set_num_threads(cores())
    model = find_model(MODEL)
    guidance = model.guidance_scale
    rows = [row for interval in INTERVALS for row in compare(interval, model, options.work, guidance)]
    columns = ["contender", "time ratio", "relative L2", "PSNR dB", "SSIM", "right digit", "everything right"]
    table = [
        [
            f"{row['contender']} (interval {row['interval']})" if row["contender"] == "full" else row["contender"],
            row["time_ratio"],
            *(row["damage"][metric]["mean"] for metric in ("relative_l2", "psnr", "ssim")),
            row["followed"]["digit"],
            row["followed"]["everything"],
        ]
        for row in rows
    ]
    record = {
        "command": "python benchmarks/bench_peers.py",
        "environment": describe(),
        "settings": {"model": MODEL, "steps": STEPS, "batch": BATCH, "seed": SEED, "guidance": guidance},
        "figures": figures(rows),
        "tables": [{"title": "Same prompts, same noise", "columns": columns, "rows": table}],
        "contenders": rows,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/peers.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE.parent / "docs/images/peers.svg").write_text(draw(rows))


if __name__ == "__main__":
    main()
