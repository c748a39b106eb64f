"""unetc: an optimization compiler for diffusion models.

    import unetc

    profile = unetc.analyze("digits")
    unetc.build("digits", "bundle/", unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.27)), profile=profile)
    images = unetc.load("bundle/").sample(batch=4, seed=0)  # [batch, channel, height, width]

Names are loaded on first use, so importing the package is cheap and needs no torch. Sampling needs none either.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analyzer.analysis import AnalysisOptions
    from .analyzer.verify import VerifyOptions
    from .api import analyze, build, compile, export_triton, pareto, plan, verify, write_report
    from .artifacts import Manifest, Plan, Profile, Verification
    from .artifacts.pareto import Pareto
    from .compiler.build import BuildOptions
    from .compiler.planner.planner import PlanOptions
    from .compiler.search.pareto import ParetoOptions
    from .compiler.search.quality_gate import QualityGate
    from .compiler.search.repair import RepairOptions
    from .compiler.tensorrt.options import CompileOptions
    from .compiler.tensorrt.wanted import CompiledEngine
    from .errors import UnetcError
    from .jobs import Cluster
    from .models.find import ModelSource
    from .models.lora import Lora
    from .progress import Progress
    from .runtime.bundle import Bundle
    from .runtime.session import Session, Step, load
    from .triton.options import ExportOptions
    from .triton.repository import Export

__version__ = "0.1.0"

# onnxruntime reads it when it is imported, and no later switch works: findings/onnxruntime-marks-the-machine.sh
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "AnalysisOptions": "unetc.analyzer.analysis",
    "BuildOptions": "unetc.compiler.build",
    "Bundle": "unetc.runtime.bundle",
    "Cluster": "unetc.jobs",
    "CompileOptions": "unetc.compiler.tensorrt.options",
    "CompiledEngine": "unetc.compiler.tensorrt.wanted",
    "Export": "unetc.triton.repository",
    "ExportOptions": "unetc.triton.options",
    "Lora": "unetc.models.lora",
    "Manifest": "unetc.artifacts",
    "ModelSource": "unetc.models.find",
    "Pareto": "unetc.artifacts.pareto",
    "ParetoOptions": "unetc.compiler.search.pareto",
    "Plan": "unetc.artifacts",
    "PlanOptions": "unetc.compiler.planner.planner",
    "Profile": "unetc.artifacts",
    "Progress": "unetc.progress",
    "QualityGate": "unetc.compiler.search.quality_gate",
    "RepairOptions": "unetc.compiler.search.repair",
    "Session": "unetc.runtime.session",
    "Step": "unetc.runtime.session",
    "UnetcError": "unetc.errors",
    "Verification": "unetc.artifacts",
    "VerifyOptions": "unetc.analyzer.verify",
    "analyze": "unetc.api",
    "build": "unetc.api",
    "compile": "unetc.api",
    "export_triton": "unetc.api",
    "load": "unetc.runtime.session",
    "pareto": "unetc.api",
    "plan": "unetc.api",
    "verify": "unetc.api",
    "write_report": "unetc.api",
}

__all__ = [
    "AnalysisOptions",
    "BuildOptions",
    "Bundle",
    "Cluster",
    "CompileOptions",
    "CompiledEngine",
    "Export",
    "ExportOptions",
    "Lora",
    "Manifest",
    "ModelSource",
    "Pareto",
    "ParetoOptions",
    "Plan",
    "PlanOptions",
    "Profile",
    "Progress",
    "QualityGate",
    "RepairOptions",
    "Session",
    "Step",
    "UnetcError",
    "Verification",
    "VerifyOptions",
    "__version__",
    "analyze",
    "build",
    "compile",
    "export_triton",
    "load",
    "pareto",
    "plan",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unetc' has no attribute {name!r}")
    from .extras import needed

    with needed():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
