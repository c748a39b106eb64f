"""A treatment needs only a row of the table: the gated graph and `specialise` follow it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models import Tiny, relative_error, tiny_of
from unetc.compiler.graph.gate import gate_values
from unetc.compiler.graph.specialise import specialise
from unetc.treatments import COMPUTED, EARLIER, EXTRAPOLATION, HELD, ROWS, Row, Treatment


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("attention", shared)


@pytest.fixture(scope="module")
def inputs(tiny: Tiny) -> dict[str, np.ndarray]:
    return tiny.inputs(batch=2, height=2 * tiny.stride, width=2 * tiny.stride)


def test_a_removal_by_another_multiple_of_the_mean(
    tiny: Tiny, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROWS, Treatment.MEAN, Row(letter="m", contributes="a quarter of its mean", mean=0.25))  # type: ignore[arg-type]
    means = np.random.default_rng(0).standard_normal(tiny.gated.channels).astype(np.float32)
    chosen = {tiny.names[0]: Treatment.MEAN, tiny.names[-2]: Treatment.MEAN}
    rows = np.repeat(gate_values(tiny.gated.components, chosen)[None], 2, axis=0)
    assert set(rows[..., 1].flatten()) == {0.0, 0.25}
    expected = tiny.run(tiny.load(tiny.gated.runnable()), {**inputs, "gates": rows, "means": means})
    engine = tiny.run(tiny.load(specialise(tiny.gated, chosen, means)), inputs)
    assert relative_error(engine, expected) < 1e-5


def test_a_reuse_by_another_formula(tiny: Tiny, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    def reflect(take):  # type: ignore[no-untyped-def]
        return take(HELD) + take(HELD) - take(EARLIER) * take(EXTRAPOLATION)

    monkeypatch.setitem(ROWS, Treatment.HOLD, Row(letter="h", contributes="a reflection", recall=reflect))  # type: ignore[arg-type]
    means = np.zeros(tiny.gated.channels, np.float32)
    name, index = tiny.names[0], tiny.gated.components[0].index
    _, emitted = tiny.run_emitting(tiny.load(specialise(tiny.gated, {}, means, [name])), inputs)
    branch = emitted[f"{COMPUTED}{index}"]
    own = {HELD: branch, EARLIER: 0.5 * branch, EXTRAPOLATION: np.full(1, 2.0, np.float32)}  # b + b - b / 2 * 2 = b
    engine = tiny.load(specialise(tiny.gated, {name: Treatment.HOLD}, means))
    full = tiny.run(tiny.load(specialise(tiny.gated, {}, means)), inputs)
    output = tiny.run(engine, {**inputs, **{f"{prefix}{index}": value for prefix, value in own.items()}})
    assert relative_error(output, full) < 1e-5
