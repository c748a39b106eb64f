"""The real library builds every kind of engine of a UNet with the blocks of Stable Diffusion 1.5."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.graph.test_real_sizes import CONTEXT_WIDTH, captured
from unetc.artifacts.profile import STEP
from unetc.backend import WEIGHTS
from unetc.call import CONTEXT
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.lowering import lower_graphs
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.tensorrt.messages import BuildRequest
from unetc.compiler.tensorrt.supervise import build_engine
from unetc.nvidia.key import Effort
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.treatments import EARLIER, EXTRAPOLATION, HELD, Treatment

pytestmark = [pytest.mark.rtx, pytest.mark.nightly]

TOKENS = 77
FIXED = Range(least=16, usual=16, most=16)
SIZES = Sizes(batch=Range(least=1, usual=2, most=8), height=FIXED, width=FIXED)
ENGINES = ("full", "drops", "holds", "forecasts", "repeats the step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("stable-diffusion")
    gated = GatedGraph.build(captured("sd15"), folder / "gated")
    shutil.copyfile(gated.weights, folder / WEIGHTS)
    first = {component.kind: component.name for component in reversed(gated.components)}
    last = {component.kind: component.name for component in gated.components}
    means = np.ones(gated.channels, np.float32)
    treatments = {
        "full": {},
        "drops": {first["skip"]: Treatment.DROP, last["skip"]: Treatment.MEAN, last["residual"]: Treatment.DROP},
        "holds": {last["level"]: Treatment.HOLD},
        "forecasts": {first["residual"]: Treatment.FORECAST, last["residual"]: Treatment.HOLD},
        "repeats the step": {STEP: Treatment.HOLD},
    }
    emits = (last["level"], first["residual"], last["residual"], STEP)
    for name in ENGINES:
        graph = specialise(gated, treatments[name], means, emits if name == "full" else ())
        (folder / f"{name}.onnx").write_bytes(graph.graph)
    for precision in (Precision.FP16, Precision.BF16):
        lower_graphs(folder, [f"{name}.onnx" for name in ENGINES], precision, folder / precision)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", Precision)
def test_every_kind_of_engine_is_built(folder: Path, engine: str, precision: Precision) -> None:
    place = folder if precision is Precision.FP32 else folder / precision
    request = BuildRequest(
        target="tensorrt-rtx",
        graph=f"{engine}.onnx",
        engine=f"{engine}.engine",
        timing="timing.cache",
        sizes=SIZES,
        rows={CONTEXT: (TOKENS, CONTEXT_WIDTH)},
        effort=Effort(),
    )
    outcome = build_engine(request, place, time_limit_s=600, on_advance=lambda done: None)
    assert outcome.tries == 1
    assert outcome.engine.stat().st_size > 0
    shapes = outcome.built.shapes
    added = {name.rpartition(".")[0] + "." for name in shapes if "." in name}
    assert added == {"holds": {HELD}, "repeats the step": {HELD}, "forecasts": {HELD, EARLIER, EXTRAPOLATION}}.get(
        engine, set()
    )
    assert all(corners[2][0] == 8 for corners in shapes.values())
