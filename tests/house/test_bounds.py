"""The bounds in pyproject.toml are the ones that were tried, and the lowest releases are among the tried ones."""

from __future__ import annotations

import json

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.house import bounds

SEEN = json.loads(bounds.SEEN.read_text())
RUN_AGAIN = "bounds changed: run `make bounds`, which tries them"


def tried(end: str) -> dict[str, list[Version]]:
    """Collect the versions of every package in the environments at one end of the bounds."""
    found: dict[str, list[Version]] = {}
    for versions in SEEN[end]["versions"].values():
        for name, version in versions.items():
            found.setdefault(name, []).append(Version(version))
    return found


def test_the_bounds_are_those_that_were_tried() -> None:
    assert SEEN["bounds"] == bounds.bounds_of("full") | bounds.bounds_of("base"), RUN_AGAIN


@pytest.mark.parametrize("name", SEEN["bounds"])
def test_every_lower_bound_was_installed(name: str) -> None:
    (lower,) = (Version(own.version) for own in specifiers(name) if own.operator == ">=")
    assert lower in tried("lowest")[name], RUN_AGAIN


@pytest.mark.parametrize("name", SEEN["bounds"])
def test_every_upper_bound_is_above_a_release_that_was_installed(name: str) -> None:
    (upper,) = (Version(own.version) for own in specifiers(name) if own.operator == "<")
    highest = max(tried("highest")[name])
    assert highest < upper
    part = len(upper.release) - 1  # the part of the version that the bound limits
    assert (*highest.release, 0, 0)[:part] == upper.release[:part]
    assert (*highest.release, 0, 0)[part] == upper.release[part] - 1, "releases below the bound have not been tried"


def specifiers(name: str) -> SpecifierSet:
    return SpecifierSet(SEEN["bounds"][name].partition(";")[0])
