"""Do a second-order forecast, a correction by the shallow part, or healed weights lower the damage at equal time?

    taskset -c 0 python benchmarks/bench_levers.py     # about 25 minutes on one core, with the builds; resumes

Three changes are tried on `digits` with ddim (50 steps) and dpmsolver++ (20), and none is part of the product:

- *second order*: forecasts with the last three values, at several shares of the curvature (`second_order.py`)
- *shallow part*: the forecast of a level corrected by the skip connection beside it (`shallow_forecast.py`)
- *healing*: weights of a pruned engine, trained on calls of the full model (`healing.py`)

Schedules are those of real plans: for ddim the plans of `results/budget.json`, for dpmsolver++ two plans that
`unetc build` makes here with one thread. One more schedule forecasts the largest level in every second step, where
DeepCache holds it. Each lever keeps its plan's schedule, so it calls the same engines in the same steps. It is compared
with what unetc does there today: with the plain rows of the scheduler, and with rows tuned to each contender. All
choices and fits use one seed, all damages another. The time that a lever itself takes is not counted, which favours it.
Healed engines take the time of the pruned ones, and stand next to the plans that were built.

Writes `results/levers.json`. Rows have the mean relative L2 with its 95 % interval, and the ratio to the control on the
same samples, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout
from builds import Workplace
from command_line import add_only, add_results, chosen
from healing import heal, record_calls, steps_of
from lever_models import CALIBRATED_SEED, Damages, Regime, compared, read_plan, with_engines
from result_file import RESULTS, absent, earlier, write
from second_order import TAYLOR, Damping, second_order
from shallow_forecast import Corrected, Place, Rule, fit_steps, record_branches

from unetc.artifacts.plan import Assignment, Plan
from unetc.artifacts.profile import Profile
from unetc.backend import Program
from unetc.compiler.engines import compile_engines
from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.compiler.planner.restriction import Restriction
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler
from unetc.models.find import find_model
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTables
from unetc.treatments import Treatment

BUDGETS = (0.27, 0.5)
DAMPINGS: tuple[Damping, ...] = (-0.25, 0.125, 0.25, 0.5, 1.0, TAYLOR)
"""Shares of the curvature that are tried; below zero a forecast bends the other way."""
LEVEL = "level:up_blocks.2.upsamplers.0"
"""The largest level of `digits`: all below the full resolution."""
FULL_STEPS = 3
"""Steps that the schedule by hand computes first."""
HEALED_SAMPLES = 64
"""Trajectories of the full model that weights are trained on."""
ROWS = ("plain", "tuned")
TODAY = "today"
LEVERS = (SECOND_ORDER, SHALLOW, HEALING) = ("second order", "shallow part", "healing")
KEYS = ("lever", "regime", "plan", "rows", "contender")
"""Keys that tell rows apart."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan that is sampled today's way and with a lever."""

    lever: str
    name: str
    regime: Regime
    plan: Plan
    programs: Sequence[Program]

    @classmethod
    def of(cls, lever: str, name: str, regime: Regime, plan: Plan) -> Case:
        """Load the engines of a plan that removes nothing."""
        return cls(lever=lever, name=name, regime=regime, plan=plan, programs=regime.load(plan))

    def session(self, programs: Sequence[Program] | None = None) -> Session:
        """Open a session, perhaps with changed engines."""
        return self.regime.session(self.plan, programs or self.programs)

    def damages(self, session: Session, kind: str) -> Damages:
        """Measure damages with plain or tuned rows."""
        if kind == "tuned":
            session.tuned, _ = self.regime.tune(session)
        return self.regime.damages(session)


def rows_of(case: Case, contenders: dict[str, Callable[[str], Damages]]) -> list[dict[str, Any]]:
    """Compare contenders with what unetc does today, the first of them, for each kind of rows.

    Args:
        case: The plan.
        contenders: Measures damages with a kind of rows, by the contender's name.
    """
    time, rows = case.regime.time_ratio(case.plan, case.programs), []
    for kind in ROWS:
        control: Damages | None = None
        for name, measure in contenders.items():
            own = measure(kind)
            control = own if control is None else control
            known = {"lever": case.lever, "regime": case.regime.name, "plan": case.name, "time": time}
            rows.append({**known, "rows": kind, "contender": name, **compared(own, control)})
            print(rows[-1], flush=True)
    return rows


def try_second_order(case: Case) -> list[dict[str, Any]]:
    """Choose the share of the curvature on the calibration's samples, for each kind of rows, and judge it."""
    regime = case.regime
    found: dict[str, dict[Damping, float]] = {kind: {} for kind in ROWS}
    for damping in DAMPINGS:
        with second_order(regime.gated.components, damping):
            found["plain"][damping] = float(regime.damages(case.session(), CALIBRATED_SEED).mean())
            found["tuned"][damping] = regime.tune(case.session())[1]
    best = {kind: min(own, key=lambda damping: own[damping]) for kind, own in found.items()}

    def lever(kind: str) -> Damages:
        with second_order(regime.gated.components, best[kind]):
            return case.damages(case.session(), kind)

    rows = rows_of(case, {TODAY: lambda kind: case.damages(case.session(), kind), "second order": lever})
    return [
        {**row, "damping": best[row["rows"]], "calibration": {str(k): own for k, own in found[row["rows"]].items()}}
        if row["contender"] != TODAY
        else row
        for row in rows
    ]


def try_shallow(case: Case, level: str) -> list[dict[str, Any]]:
    """Fit every rule on the calibration's samples, and judge it."""
    regime, place = case.regime, Place.of(case.regime.gated.components, level)
    device, wide = regime.backend.device, place.emitted(case.plan)
    found = record_branches(regime, case.plan, place)

    def forecasts(engine: Assignment) -> bool:
        return engine.treatments.get(level) is Treatment.FORECAST

    loader = regime.backend.open_weights(regime.gated.read_weights())
    engines = [
        Assignment(treatments=own.treatments, emits=(*own.emits, place.skip.name)) if forecasts(own) else own
        for own in wide.engines
    ]
    programs = [loader.load(regime.graph(engine)) for engine in engines]

    def lever(rule: Rule) -> Callable[[str], Damages]:
        weights = fit_steps(regime, wide, place, found, rule)
        changed = [
            Corrected(program, place, weights, device) if forecasts(own) else program
            for own, program in zip(wide.engines, programs, strict=True)
        ]
        return lambda kind: case.damages(regime.session(wide, changed), kind)

    contenders = {TODAY: lambda kind: case.damages(case.session(), kind)}
    return rows_of(case, contenders | {str(rule): lever(rule) for rule in Rule})


def try_healing(regime: Regime, profile: Profile, budget: float, updates: int, work: Path) -> list[dict[str, Any]]:
    """Plan one pruned engine, train its weights on the steps where it runs, and judge the plan."""
    options = PlanOptions(budget=budget, max_engines=1, restriction=Restriction.REMOVAL_ONLY)
    plan, weights = make_plan(profile, options), regime.gated.read_weights()
    graphs = compile_engines(regime.gated, plan, profile)
    programs = [regime.backend.open_weights(weights).load(graph) for graph in graphs]
    case = Case(
        lever=HEALING, name=f"one pruned engine, planned for {budget:g}", regime=regime, plan=plan, programs=programs
    )
    steps = steps_of(plan, 1, regime.table.log_snr.tolist())
    pairs = record_calls(regime, case.session(), programs[0], steps, HEALED_SAMPLES)
    healed = heal(graphs[1], weights, pairs, updates, work)
    contenders = {
        TODAY: lambda kind: case.damages(case.session(), kind),
        "healed": lambda kind: case.damages(case.session([programs[0], healed.program]), kind),
    }
    size = {
        "pruned_steps": len(steps),
        "changed_numbers": healed.changed,
        "changed_mb": 4 * healed.changed / 1e6,
        "weights_mb": len(weights) / 1e6,
        "relative_change": healed.relative_change,
        "loss_before": healed.loss_before,
        "loss_after": healed.loss_after,
        "training_seconds": round(healed.seconds, 1),
    }
    return [{**row, **size} if row["contender"] == "healed" else row for row in rows_of(case, contenders)]


def built(place: Workplace, scheduler: str, steps: int) -> tuple[Profile, list[Plan]]:
    """Analyse `digits` and build a plan per budget, unless it was done before."""
    name, cache = f"digits-{scheduler.replace('+', 'p')}-{steps}", ("--cache", str(place.folder / "cache"))
    profile, sampling = place.folder / f"{name}.json", ("--scheduler", scheduler, "--steps", str(steps))
    place.make(profile, "analyze", "digits", *sampling, "--samples", "8", *cache)
    plans = []
    for budget in BUDGETS:
        bundle = place.folder / f"{name}-{budget:g}"
        asked = ("--profile", str(profile), "--budget", f"{budget:g}", "--steps", str(steps), "--no-controls")
        place.make(bundle, "build", "digits", *asked, *cache)
        plans.append(read_plan(bundle / "manifest.json", "levels", 0, "plan"))
    return Profile.load(profile), plans


def table_of(rows: Sequence[dict[str, Any]], lever: str) -> dict[str, Any]:
    """Tabulate the rows of a lever."""
    columns = ["plan", "time / full", "rows", "contender", "relative L2", "low", "high", "/ today", "low", "high"]
    lines = [
        [
            f"{row['regime']}, {row['plan']}",
            row["time"],
            row["rows"],
            row["contender"],
            *row["relative_l2"],
            *row["of_control"],
        ]
        for row in rows
        if row["lever"] == lever
    ]
    return {"title": lever.capitalize(), "columns": columns, "rows": lines}


def figures_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """List the damage of every lever / today's, in each case with the rows that do today's plan less damage."""
    cases = dict.fromkeys((row["lever"], row["regime"], row["plan"]) for row in rows)
    figures: list[dict[str, object]] = []
    for lever, regime, plan in cases:
        own = [row for row in rows if (row["lever"], row["regime"], row["plan"]) == (lever, regime, plan)]
        today = min(row["relative_l2"][0] for row in own if row["contender"] == TODAY)
        for name in dict.fromkeys(row["contender"] for row in own if row["contender"] != TODAY):
            best = min(row["relative_l2"][0] for row in own if row["contender"] == name)
            figures.append({"figure": f"{regime}, {plan}: {name} / today", "value": best / today})
    return figures


def record_of(rows: Sequence[dict[str, Any]], settings: dict[str, object]) -> dict[str, object]:
    """Make the result."""
    return {
        "settings": settings,
        "figures": figures_of(rows),
        "tables": [table for lever in LEVERS if (table := table_of(rows, lever))["rows"]],
        "absent": absent(LEVERS, [row["lever"] for row in rows]),
        "rows": rows,
    }


def by_hand(regime: Regime, built_one: Plan) -> Plan:
    """Forecast the largest level in every second step."""
    engines = Assignment(treatments={}, emits=(LEVEL,)), Assignment(treatments={LEVEL: Treatment.FORECAST})
    schedule = [int(step >= FULL_STEPS and (step - FULL_STEPS) % 2 == 0) for step in range(regime.table.steps)]
    return with_engines(built_one, engines, schedule, regime.table)


def forecast_levels(regime: Regime, plan: Plan) -> list[str]:
    """List the levels that a plan forecasts in engines which compute the skip beside them."""
    components = regime.gated.components
    places = [Place.of(components, component.name) for component in components if component.kind == "level"]
    return [
        place.level.name
        for place in places
        if any(
            engine.treatments.get(place.level.name) is Treatment.FORECAST and place.skip.name not in engine.treatments
            for engine in plan.engines
        )
    ]


def try_all(again: Sequence[str], options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Try levers case by case."""
    place = Workplace(checkout.ROOT, options.work)
    options.work.mkdir(parents=True, exist_ok=True)
    model = find_model("digits")
    gated = prepare(model, options.work / "cache").gated

    def regime(scheduler: str, steps: int) -> Regime:
        table = extract(make_scheduler(scheduler, model.scheduler_config), steps)
        return Regime(
            gated=gated,
            backend=open_backend("onnxruntime:cpu", threads=1),
            tables=SchedulerTables(name=scheduler, tables=(table,)),
            steps=steps,
            sample_shape=model.sample_shape,
            judged=options.samples,
        )

    profile, few = built(place, "dpmsolver++", 20)
    many = [read_plan(RESULTS / "budget.json", "budgets", f"{budget:g}", "plan") for budget in BUDGETS]
    plans = {regime("dpmsolver++", 20): few, regime("ddim", 50): many}
    if SECOND_ORDER in again:
        for own, built_ones in plans.items():
            for budget, plan in zip(BUDGETS, built_ones, strict=True):
                yield try_second_order(Case.of(SECOND_ORDER, f"built for {budget:g}", own, plan))
    if SHALLOW in again:
        for own, (plan, _) in plans.items():
            for level in forecast_levels(own, plan):
                yield try_shallow(Case.of(SHALLOW, f"built for {BUDGETS[0]:g}", own, plan), level)
            yield try_shallow(Case.of(SHALLOW, "largest level, every second step", own, by_hand(own, plan)), LEVEL)
    if HEALING in again:
        yield try_healing(next(iter(plans)), profile, BUDGETS[0], options.updates, options.work)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/levers", help="caches and bundles")
    parser.add_argument("--samples", type=int, default=32, help="samples that damages are measured on")
    parser.add_argument("--updates", type=int, default=400, help="updates of healed weights")
    add_only(parser)
    add_results(parser)
    options = parser.parse_args()
    again = chosen(parser, options.only, LEVERS)
    settings = {"model": "digits", "samples": options.samples, "updates": options.updates, "threads": 1}
    rows = earlier(options.results, "levers", *KEYS, again=again, settings=settings)
    for found in try_all(again, options):
        rows |= {tuple(row[key] for key in KEYS): {**row, "settings": settings} for row in found}
        ordered = sorted(rows.values(), key=lambda row: LEVERS.index(row["lever"]))
        write(options.results, "levers", record_of(ordered, settings))


if __name__ == "__main__":
    main()
