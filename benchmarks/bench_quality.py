"""How good are the images of a plan, the full model and simpler methods?

    apt-get install dataset-fashion-mnist
    python benchmarks/bench_quality.py                            # hours on two cores; resumes
    python benchmarks/bench_quality.py --only "fashion, ddim 20"  # some regimes; the result keeps its other rows

Fidelity compares with the full model's samples, and cannot say whether a difference makes an image worse. This
benchmark can: it samples the class-conditional reference model, and measures the Fréchet distance between the
classifier's features of these samples and of the 10,000 test images of Fashion-MNIST, and how often the classifier
sees the class that was asked for. The distance is not FID. All contenders sample the same noise and the same classes.
Intervals of 95 % are a jackknife over ten groups of samples, with Student's t of nine degrees of freedom. Times are
those that `unetc verify` measures. Writes `results/quality.json`, and draws samples of the last row's contenders as
`docs/images/quality.png`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from builds import Effort, Regime, Workplace, measured, unmeasured
from checkout import ROOT, commit
from command_line import add_only, add_results, chosen
from fashion_images import NAMES, UNSEEN, as_samples, read
from image_classifier import ImageClassifier, frechet_distance
from numpy.typing import NDArray
from result_file import earlier, picture_of, write
from scipy.stats import t as student

import unetc
from unetc.environment import describe
from unetc.report.pictures import grid, png_bytes
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.loaded_bundle import LoadedBundle
from unetc.runtime.session import Session

GUIDANCE = 2.0
REGIMES = tuple(
    Regime(model="fashion", scheduler="ddim", steps=steps, budgets=(0.27, 0.5), guidance=GUIDANCE)
    for steps in (10, 20, 50)
)
EFFORT = Effort(analysis=("--samples", "8"), rounds=4)
SAMPLES = 500
BATCH = 50
SEED = 4001
"""Seed that neither builds nor verifications use."""
GROUPS = 10
T_95 = float(student.ppf(0.975, GROUPS - 1))
"""Half the width of an interval in standard errors, which come from the groups."""
SETTINGS = {"samples": SAMPLES, "guidance_scale": GUIDANCE, "seed": SEED}
Features = NDArray[np.float64]


def contenders(bundle: Path) -> Iterator[tuple[str, Session, bool]]:
    """List the full model, the plan and every control of a bundle: session, and whether it runs the full model."""
    opened = Bundle.open(bundle)
    loaded = LoadedBundle(opened, open_backend(opened.manifest.target, threads=opened.manifest.threads))
    own = Session.over(loaded)
    yield "full", own, True
    yield "plan", own, False
    for control in opened.manifest.controls:
        if not re.search(r"-\d+$", control.name):  # the random plans
            yield control.name, Session.over(loaded, control=control), control.plan is None


def draw(session: Session, *, full_model: bool) -> NDArray[np.float32]:
    """Sample all classes in turn."""
    labels = [*range(len(NAMES))] * (BATCH // len(NAMES))
    conditions = session.encode_labels(labels, GUIDANCE)
    parts = [
        session.sample(BATCH, seed=SEED, first_index=first, conditions=conditions, full_model=full_model)
        for first in range(0, SAMPLES, BATCH)
    ]
    return np.concatenate(parts)


def judge(features: Features, of_full: Features, real: Features) -> dict[str, Any]:
    """Measure the distance to real images, and how much larger it is than the full model's, with intervals."""

    def distances(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        own = frechet_distance(features[kept], real)
        return np.array([own, own - frechet_distance(of_full[kept], real)])

    group = np.arange(len(features)) * GROUPS // len(features)
    everything = distances(np.ones(len(features), bool))
    without = np.stack([distances(group != one) for one in range(GROUPS)])
    errors = T_95 * np.sqrt((GROUPS - 1) / GROUPS * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    return {
        name: {"mean": float(value), "low": float(value - error), "high": float(value + error)}
        for name, value, error in zip(("distance", "more_than_full"), everything, errors, strict=True)
    }


def measure(bundle: Path, verified: Mapping[str, Any], pictures: dict[str, Any]) -> dict[str, Any]:
    """Judge every contender of a bundle."""
    classifier = ImageClassifier.load(Path(unetc.__file__).parent / "models/fashion/classifier/model.safetensors")
    real, _ = classifier.describe(as_samples(read(UNSEEN)[0]).numpy())
    wanted = np.arange(SAMPLES) % len(NAMES)
    times = {"full": 1.0, "plan": verified["time_ratio"]}
    times |= {name: one["time_ratio"] for name, one in verified["controls"].items()}
    found: dict[str, Any] = {}
    of_full: Features | None = None
    for name, session, full_model in contenders(bundle):
        images = draw(session, full_model=full_model)
        pictures[name] = images[: len(NAMES)]
        features, chances = classifier.describe(images)
        of_full = features if of_full is None else of_full
        found[name] = {
            "time": times[name],
            "right": float((chances.argmax(1) == wanted).mean()),
            **judge(features, of_full, real),
        }
        print(f"{name}: {found[name]}", flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write all distances in one table."""
    names = list(dict.fromkeys(name for one in rows for name in one["contenders"]))

    def shown(own: Mapping[str, Any] | None) -> str:
        if own is None:
            return "–"
        more = own["more_than_full"]
        return f"{own['distance']['mean']:.2f} ({more['low']:+.2f} to {more['high']:+.2f}) at {own['time']:.2f}"

    return {
        "title": "Fréchet distance to real images (and how much more than the full model's) at time / full model",
        "columns": ["regime", "budget", "commit", *names],
        "rows": [
            [one["regime"], one["budget"], one["commit"], *(shown(one["contenders"].get(name)) for name in names)]
            for one in rows
        ],
    }


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the plan's distance with the full model's and with the best control's."""
    found = []
    for one in rows:
        what = f"{one['regime']}, budget {one['budget']:g}"
        own = one["contenders"]
        others = {name: v["distance"]["mean"] for name, v in own.items() if name not in ("full", "plan")}
        best = min(others, key=others.__getitem__)
        plan = own["plan"]["distance"]["mean"]
        found.append(
            {"figure": f"{what}: distance of the plan / full model", "value": plan / own["full"]["distance"]["mean"]}
        )
        found.append({"figure": f"{what}: distance of the plan / {best}", "value": plan / others[best]})
        found.append({"figure": f"{what}: share of right classes, full model", "value": own["full"]["right"]})
        found.append({"figure": f"{what}: share of right classes, plan", "value": own["plan"]["right"]})
    return found


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the result of some rows."""
    return {
        "settings": SETTINGS,
        "figures": figures(rows),
        "tables": [table(rows)],
        "absent": unmeasured(rows, REGIMES),
        "rows": rows,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/quality", help="caches and bundles")
    add_results(parser)
    add_only(parser)
    options = parser.parse_args()
    place = Workplace(ROOT, options.work / commit())
    place.folder.mkdir(parents=True, exist_ok=True)
    again = chosen(parser, options.only, (one.name for one in REGIMES))
    rows = earlier(options.results, "quality", "regime", "budget", again=again, settings=SETTINGS)
    for regime in (one for one in REGIMES if one.name in again):
        for budget in regime.budgets:
            verified = place.measure(regime, budget, EFFORT)
            pictures: dict[str, Any] = {}
            judged = measure(place.folder / f"{regime.slug}-{budget:g}", verified, pictures)
            rows[regime.name, budget] = {
                "regime": regime.name,
                "budget": budget,
                "commit": commit(),
                "environment": describe(),
                "settings": SETTINGS,
                "contenders": judged,
                "verification": verified,
            }
            write(options.results, "quality", record_of(measured(rows, REGIMES)))
            drawn = grid(np.concatenate([*pictures.values()]), columns=len(NAMES))
            picture_of(options.results, "quality.png").write_bytes(png_bytes(drawn))


if __name__ == "__main__":
    main()
