"""Whose turn it is: the choice of the members that share the next call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

PATIENCE = 8.0
"""Calls that a member waits for as much precedence as the largest group has."""
SHORT = 0.5
"""Calls that take less than this share of the longest one are short."""

Who = TypeVar("Who")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Waiting(Generic[Who, Key]):
    """A member that waits for its next call."""

    member: Who
    key: Key
    """Members with equal keys can share a call."""
    rows: int
    age: int
    """Calls since its last one."""
    seconds: float = 0.0
    """Time that its engine takes for a small call; sizes of images do not count."""
    urgent: bool = False
    """Whether it misses its deadline unless it runs in every call from now on."""


def choose(waiting: Sequence[Waiting[Who, Key]], largest: Callable[[Key], int]) -> tuple[Key, list[Who]]:
    """Choose the members of the next call.

    Members that can share a call form a group. Short calls go before long ones: they cost little, and their members
    may then share the long one. Otherwise a group counts for more the larger it is. It also counts for more the longer
    its oldest member has waited, so none waits forever: after `2 * PATIENCE` calls it outranks every group that is
    younger. A group with an urgent member goes first. Within a group, urgent members and then the oldest ones are
    taken.

    Args:
        waiting: All members that wait; at least one.
        largest: Returns the most rows of a call with a key. A single member with more rows runs alone.

    Returns:
        The key of the group, and its members in the order in which they are given.
    """
    groups: dict[Key, list[Waiting[Who, Key]]] = {}
    for one in waiting:
        groups.setdefault(one.key, []).append(one)

    longest = max(one.seconds for one in waiting)
    rows_of = {key: min(largest(key), sum(one.rows for one in group)) for key, group in groups.items()}
    most_rows = max(rows_of.values())

    def precedence(key: Key) -> tuple[bool, float]:
        group = groups[key]
        short = group[0].seconds < SHORT * longest
        age = max(one.age for one in group)
        return any(one.urgent for one in group), short + rows_of[key] / most_rows + age / PATIENCE

    best = max(groups, key=precedence)
    group, most = groups[best], largest(best)
    first_come = sorted(range(len(group)), key=lambda i: (not group[i].urgent, -group[i].age))
    taken: list[int] = []
    rows = 0
    for i in first_come:
        if taken and rows + group[i].rows > most:
            break
        taken.append(i)
        rows += group[i].rows
    return best, [group[i].member for i in sorted(taken)]
