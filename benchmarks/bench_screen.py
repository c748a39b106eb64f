"""Does the two-tier analysis agree with brute force, at a tenth of its cost?

    python benchmarks/bench_screen.py            # about 20 minutes on two cores; resumes

The benchmark analyses the reference model twice on the same trajectories. By brute force (`decisive=None`), every
ablation is measured on the final output. In two tiers (the default), all ablations are screened, and the decisive ones
are measured on the final output. Writes `results/screen.json`.

An entry is a component with a treatment and a period in a bin. Its price is its brute-force damage / the share of time
that it saves. The *decisive* entries are the quarter of a bin's time-saving entries with the lowest price.

Both analyses share a cache folder, so they use the same measured costs. Effects are measured and cached per job, which
is a batch of ablations. The two analyses form different batches, so an entry that both measure may differ in its last
digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from command_line import add_results
from result_file import write
from scipy import stats

from unetc.analyzer.ablation import PeriodicTreatment
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts.profile import Effect, Profile
from unetc.cli.output import progress
from unetc.models.find import find_model
from unetc.treatments import Treatment

DECISIVE_SHARE = 0.25

Entry = tuple[str, Treatment, int, int]
"""Component, treatment, period, bin."""


def entries_of(profile: Profile) -> dict[Entry, Effect]:
    """Index the effects of a profile."""
    return {effect.key: effect for effect in profile.effects}


def ranked_by_price(profile: Profile) -> list[list[Entry]]:
    """List the time-saving entries of every bin, lowest damage per time saved first."""
    saved = {cost.component: cost.saved_ms.mean / profile.full_ms.mean for cost in profile.costs}
    prices: list[dict[Entry, float]] = [{} for _ in profile.bins]
    for entry, effect in entries_of(profile).items():
        component, treatment, period, b = entry
        share = saved[component] * PeriodicTreatment(treatment=treatment, period=period).share
        if share > 0:
            prices[b][entry] = effect.relative_l2.mean / share
    return [sorted(own, key=own.__getitem__) for own in prices]


def compare(brute: Profile, tiers: Profile, decisive: int) -> list[dict[str, object]]:
    """Compare the damages of two analyses."""
    expected, found = entries_of(brute), entries_of(tiers)
    both = [entry for entry in expected if entry in found]

    def rank_correlation(entries: list[Entry]) -> float:
        pairs = [(expected[entry].relative_l2.mean, found[entry].relative_l2.mean) for entry in entries]
        return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)

    ranked = [[entry for entry in own if entry in found] for own in ranked_by_price(brute)]
    cheapest = [entry for own in ranked for entry in own[: round(DECISIVE_SHARE * len(own))]]
    wanted = [entry for own in ranked for entry in own[:decisive]]
    screened = [entry for entry in both if not found[entry].measured and expected[entry].relative_l2.mean > 0]
    factors = [
        abs(float(np.log(found[entry].relative_l2.mean / expected[entry].relative_l2.mean)))
        for entry in screened
        if found[entry].relative_l2.mean > 0
    ]
    covered = [
        found[entry].relative_l2.low <= expected[entry].relative_l2.mean <= found[entry].relative_l2.high
        for entry in screened
    ]
    within = [rank_correlation([entry for entry in both if entry[3] == b]) for b in range(len(brute.bins))]
    return [
        {"figure": "samplings, brute force", "value": brute.samplings},
        {"figure": "samplings, two-tier", "value": tiers.samplings},
        {
            "figure": "samplings, two-tier / brute force",
            "value": tiers.samplings / brute.samplings,
            "goal": {"at_most": 0.1},
        },
        {"figure": "entries, brute force", "value": len(expected)},
        {"figure": "entries, in both", "value": len(both)},
        {"figure": "entries measured on the final output, two-tier", "value": sum(e.measured for e in found.values())},
        {"figure": "Spearman correlation of relative L2, all entries", "value": rank_correlation(both)},
        {
            "figure": "Spearman correlation of relative L2, all entries of one bin, mean over bins",
            "value": float(np.mean(within)),
        },
        {"figure": "decisive entries", "value": len(cheapest)},
        {"figure": "Spearman correlation of relative L2, decisive entries", "value": rank_correlation(cheapest)},
        {
            "figure": "share of the decisive entries that two-tier has measured on the final output",
            "value": float(np.mean([found[entry].measured for entry in cheapest])),
        },
        {
            "figure": f"share of brute force's {decisive} cheapest entries of every bin that two-tier has measured",
            "value": float(np.mean([found[entry].measured for entry in wanted])),
        },
        {"figure": "entries only screened", "value": len(screened)},
        {"figure": "Spearman correlation of relative L2, entries only screened", "value": rank_correlation(screened)},
        {"figure": "abs(log(estimated / measured)) of the screened, median", "value": float(np.median(factors))},
        {
            "figure": "abs(log(estimated / measured)) of the screened, 90th percentile",
            "value": float(np.percentile(factors, 90)),
        },
        {
            "figure": "share of the screened whose measured damage lies in the estimated 95 % interval",
            "value": float(np.mean(covered)),
        },
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache")
    add_results(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4, help="trajectories of both analyses")
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15, help="timed repetitions per component")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("steps", "samples", "bins", "seed", "rounds")}
    two_tier = AnalysisOptions(**sizes)
    assert two_tier.decisive is not None
    model = find_model("digits")
    with progress() as on_progress:
        tiers = analyze_model(model, two_tier, cache=options.work, on_progress=on_progress)
        brute = analyze_model(
            model, AnalysisOptions(**sizes, decisive=None), cache=options.work, on_progress=on_progress
        )
    measured = {
        "settings": {"model": "digits", **sizes, "decisive": two_tier.decisive, "threads": two_tier.threads},
        "figures": compare(brute, tiers, two_tier.decisive),
    }
    write(options.results, "screen", measured)


if __name__ == "__main__":
    main()
