"""The predicted memory of a plan bounds the weights that its engines read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.every_day import every_nth
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.backend import SerialisedGraph
from unetc.compiler.engines import compile_engines
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.choices import Choices
from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.compiler.search.set_up import Setup, set_up
from unetc.errors import PlanError
from unetc.models.find import find_model
from unetc.treatments import Treatment

ANALYSIS = AnalysisOptions(steps=8, samples=2, bins=4, batch=2, rounds=2, threads=1, decisive=4)
ROUNDING = 1e-9


@pytest.fixture(scope="module")
def setup(tiny_model: Path, cache: Path) -> Iterator[Setup]:
    model = find_model(str(tiny_model))
    with set_up(model, analyze_model(model, ANALYSIS, cache=cache), steps=8, cache=cache) as setup:
        yield setup


def share_of(setup: Setup, *graphs: SerialisedGraph) -> float:
    """Add up the weights that graphs read, relative to the full model's weights."""
    weights = load_file(setup.prepared.gated.weights)
    read = sum(weights[name].nbytes for graph in graphs for name in graph.weights)
    return read / setup.profile.full_bytes


def engine(setup: Setup, treatments: Mapping[str, Treatment]) -> SerialisedGraph:
    means = np.frombuffer(setup.profile.means[0], dtype="<f4")
    return specialise(setup.prepared.gated, treatments, means)


def test_the_full_engine_counts_one(setup: Setup) -> None:
    assert share_of(setup, engine(setup, {})) == 1
    assert Choices(setup.profile).memory([{}]) == 1


@pytest.mark.parametrize(
    "treatment", every_nth(2, [Treatment.DROP, Treatment.MEAN, Treatment.HOLD, Treatment.FORECAST])
)
def test_every_removal_frees_the_memory_that_the_profile_states(setup: Setup, treatment: Treatment) -> None:
    choices = Choices(setup.profile)
    for name in choices.names:
        predicted = choices.memory([{name: treatment}]) - 1
        assert share_of(setup, engine(setup, {name: treatment})) == pytest.approx(predicted, abs=ROUNDING)


def test_the_prediction_bounds_the_memory_of_engines_without_several_components(setup: Setup) -> None:
    choices = Choices(setup.profile)
    generator = np.random.default_rng(0)
    kinds = [Treatment.DROP, Treatment.MEAN, Treatment.HOLD]
    shared = 0
    for _ in range(60):
        names = generator.choice(choices.names[:-1], size=int(generator.integers(2, 7)), replace=False).tolist()
        treatments = {name: kinds[int(generator.integers(len(kinds)))] for name in names}
        read, bound = share_of(setup, engine(setup, treatments)), choices.memory([treatments]) - 1
        assert read <= bound + ROUNDING
        shared += read < bound - ROUNDING
    assert shared < 60  # the bound is sometimes exact


@pytest.mark.parametrize(("max_memory", "planner"), every_nth(5, [3.0, 2.0, 1.5], ["exact", "fast"]))
def test_the_engines_of_a_plan_fit_into_the_requested_memory(setup: Setup, max_memory: float, planner: str) -> None:
    options = [
        PlanOptions(budget=budget, max_memory=max_memory, max_engines=3, planner=planner) for budget in (0.1, 0.3, 0.5)
    ]
    met = 0
    for option in options:
        try:
            plan = make_plan(setup.profile, option)
        except PlanError:
            continue
        met += 1
        read = share_of(setup, *compile_engines(setup.prepared.gated, plan, setup.profile))
        assert read <= plan.prediction.memory + ROUNDING
        assert plan.prediction.memory <= max_memory + 1e-5
    assert met
