"""The schedulers of unetc by name: a class of diffusers each, with overrides of the pipeline's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SPACINGS: Mapping[str, Mapping[str, bool]] = {
    kind: {f"use_{other}_sigmas": other == kind for other in ("karras", "exponential", "beta")}
    for kind in ("karras", "exponential", "beta")
}
_EULER, _MULTISTEP, _FLOW = (
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
_PLUS: Mapping[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {}),
        "ddpm": ("DDPMScheduler", {}),
        "euler": (_EULER, {}),
        "euler-karras": (_EULER, _SPACINGS["karras"]),
        "euler-exponential": (_EULER, _SPACINGS["exponential"]),
        "euler-beta": (_EULER, _SPACINGS["beta"]),
        "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
        "dpmsolver++": (_MULTISTEP, _PLUS),
        "dpmsolver++-karras": (_MULTISTEP, {**_PLUS, **_SPACINGS["karras"]}),
        "dpmsolver++-singlestep": ("DPMSolverSinglestepScheduler", _PLUS),
        "sde-dpmsolver++": (_MULTISTEP, _SDE),
        "sde-dpmsolver++-karras": (_MULTISTEP, {**_SDE, **_SPACINGS["karras"]}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "deis": ("DEISMultistepScheduler", {}),
        "pndm": ("PNDMScheduler", {}),
        "lms": ("LMSDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm2": ("KDPM2DiscreteScheduler", {}),
        "dpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
        "lcm": ("LCMScheduler", {}),
        "tcd": ("TCDScheduler", {}),
        "edm-euler": ("EDMEulerScheduler", {}),
        "edm-dpmsolver++": ("EDMDPMSolverMultistepScheduler", _PLUS),
        "flow-euler": (_FLOW, {"stochastic_sampling": False}),
        "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "flow-lcm": ("FlowMatchLCMScheduler", {}),
    }
)
"""The schedulers by name: class in diffusers, and overrides of the pipeline's configuration."""

_SAME: Mapping[str, str] = {"DDIMParallelScheduler": "ddim", "DDPMParallelScheduler": "ddpm"}
"""Classes that sample as another one does."""


def name_of(class_name: str) -> str | None:
    """Find the name that samples as a class of diffusers does; None if there is none."""
    if class_name in _SAME:
        return _SAME[class_name]
    return next((name for name, (own, _) in SCHEDULERS.items() if own == class_name), None)
