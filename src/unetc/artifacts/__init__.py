"""Artifacts of unetc: frozen, typed records saved as JSON. No module here imports torch, onnx or a backend."""

from unetc.treatments import Treatment

from .manifest import BundleEngine, BundleTable, Control, FileRecord, Level, Manifest, Measurement
from .plan import Assignment, Phase, Plan, Prediction
from .profile import Bin, Component, Cost, Damage, Effect, Estimate, ModelReference, Profile
from .verification import ControlResult, Converged, EngineUse, Verification

__all__ = [
    "Assignment",
    "Bin",
    "BundleEngine",
    "BundleTable",
    "Component",
    "Control",
    "ControlResult",
    "Converged",
    "Cost",
    "Damage",
    "Effect",
    "EngineUse",
    "Estimate",
    "FileRecord",
    "Level",
    "Manifest",
    "Measurement",
    "ModelReference",
    "Phase",
    "Plan",
    "Prediction",
    "Profile",
    "Treatment",
    "Verification",
]
