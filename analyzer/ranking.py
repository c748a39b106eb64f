"""Rank the components of a profile by how redundant they are, per noise level and over all of them.

Two figures describe a treatment of a component over a range of noise levels. Its saving is a share of the full model's
time there: the component's share of a call, times the share of treated steps. A reused component is still computed in
one step of each period. Its damage is the mean relative L2 of the final output. Over all noise levels
savings are averaged, weighted by steps, and damages are added, as the planner does: errors of one component point the
same way. A noise level without a figure counts as the worst of the others.

Worth is saving per damage. Each component is represented by the treatment and period that are worth most. Two cases
need a rule:

- A saving of zero or below is measured noise around nothing. Its worth is 0, and it comes last in every order.
- A damage of zero with a saving is worth infinity. Such components come first, the largest saving ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from unetc.artifacts.profile import Effect, Profile
from unetc.treatments import Treatment


class By(StrEnum):
    """Orders of a ranking."""

    WORTH = "worth"
    """Largest saving per damage first."""
    SAVING = "saving"
    """Largest saving first."""
    DAMAGE = "damage"
    """Least damage first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One component with its best treatment in a range of noise levels."""

    component: str
    treatment: Treatment
    period: int
    """One step of each period computes the component; 1 if none does."""
    saving: float
    """Share of the full model's time over the range; noise can make it negative."""
    damage: float
    """Relative L2 of the final output, dimensionless."""
    measured: int
    """Noise levels whose damage was measured on the final output; the other damages are estimates."""
    bins: int
    """Noise levels in the range."""

    @property
    def way(self) -> str:
        """The treatment in words, with its period if it has one."""
        return f"{self.treatment}, period {self.period}" if self.period > 1 else self.treatment.value

    @property
    def basis(self) -> str:
        """Whether the damage was measured or estimated, in words."""
        if self.measured == self.bins:
            return "measured"
        return f"{self.measured} of {self.bins} measured" if self.measured else "estimated"

    @property
    def worth(self) -> float:
        """Saving per damage: 0 without a saving, infinite without damage."""
        if self.saving <= 0:
            return 0.0
        return self.saving / self.damage if self.damage > 0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The components of a profile in order."""

    by: By
    overall: tuple[Ranked, ...]
    """Over all noise levels, one treatment throughout."""
    bins: tuple[tuple[Ranked, ...], ...]
    """Per bin of the profile, from high noise to low."""


def rank(profile: Profile, by: By = By.WORTH) -> Ranking:
    """Rank all components that have a measured cost and an effect.

    A way that ends in NaN or infinity in one of the noise levels is no way over them.

    Args:
        profile: The analysis.
        by: The order. Equal components keep the order of worth, saving, damage, and last of the network.
    """
    shares = {cost.component: cost.saved_ms.mean / profile.full_ms.mean for cost in profile.costs}
    ways: dict[tuple[str, Treatment, int], dict[int, Effect]] = {}
    for effect in profile.effects:
        if effect.component in shares:
            way = ways.setdefault((effect.component, effect.treatment, effect.period), {})
            way[effect.bin] = effect
    broken = {one.key for one in profile.broken}
    steps = [bin.steps for bin in profile.bins]
    position = {component.name: i for i, component in enumerate(profile.components)}

    def in_order(candidates: Iterable[Ranked]) -> tuple[Ranked, ...]:
        best: dict[str, Ranked] = {}
        for own in candidates:
            known = best.get(own.component)
            if known is None or _order(own, By.WORTH) < _order(known, By.WORTH):
                best[own.component] = own
        return tuple(sorted(best.values(), key=lambda own: (*_order(own, by), position[own.component])))

    def over(bins: Sequence[int]) -> tuple[Ranked, ...]:
        return in_order(
            _rank_way(*way, shares[way[0]], effects, bins, steps)
            for way, effects in ways.items()
            if any(bin in effects for bin in bins) and not any((*way, bin) in broken for bin in bins)
        )

    every = range(len(steps))
    return Ranking(by=by, overall=over(every), bins=tuple(over([bin]) for bin in every))


def _order(own: Ranked, by: By) -> tuple[float, ...]:
    """Make the sort key: components that save nothing come last, then the requested order counts."""
    worth, saving = (-own.worth, -own.saving, own.damage), (-own.saving, own.damage)
    key = {By.WORTH: worth, By.SAVING: saving, By.DAMAGE: (own.damage, *worth)}[by]
    return (own.saving <= 0, *key)


def _rank_way(
    component: str,
    treatment: Treatment,
    period: int,
    share: float,
    effects: Mapping[int, Effect],
    bins: Sequence[int],
    steps: Sequence[int],
) -> Ranked:
    """Add up one treatment over some bins; those without a figure count as the worst of the others."""
    known = [effects[bin] for bin in bins if bin in effects]
    worst = max(effect.relative_l2.mean for effect in known)
    total = sum(steps[bin] for bin in bins)
    computed = math.ceil(total / period) if period > 1 else 0
    return Ranked(
        component=component,
        treatment=treatment,
        period=period,
        saving=share * (total - computed) / total if total else 0.0,
        damage=sum(effect.relative_l2.mean for effect in known) + worst * (len(bins) - len(known)),
        measured=sum(effect.measured for effect in known),
        bins=len(bins),
    )
