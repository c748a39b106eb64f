"""The scheduler classes of diffusers: the keys that each supported class may have, and why the others are refused.

A key in the list of its class is used: the tables are read from the very object that diffusers makes of it, and are
checked against it. `LIMITS` names the values that a table cannot express. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class Family(StrEnum):
    """How the models of a scheduler were trained; a scheduler of another family would sample noise."""

    BETAS = "diffusion with betas"
    EDM = "EDM"
    FLOW = "flow matching"


def once(steps: int, config: Mapping[str, Any]) -> int:
    """Count one call per step."""
    return steps


def twice(steps: int, config: Mapping[str, Any]) -> int:
    """Count two calls per step, except for the last one."""
    return 2 * steps - 1


def pseudo(steps: int, config: Mapping[str, Any]) -> int:
    """Count the calls of PNDM: its second step is made twice, and Runge-Kutta steps take four calls."""
    if steps < 2:
        return steps
    return steps + 1 if config["skip_prk_steps"] else steps + 9


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerClass:
    """A supported class."""

    family: Family
    keys: frozenset[str]
    """Keys of its configuration."""
    calls: Callable[[int, Mapping[str, Any]], int] = once
    """Number of denoiser calls in a number of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The values of a key that a table can express."""

    values: tuple[object, ...]
    reason: str
    """Why the others cannot be used."""
    advice: str
    classes: tuple[str, ...] = ()
    """The classes it holds for; empty for all that know the key."""


_BETAS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas"
_CLIP = "clip_sample clip_sample_range"
_THRESHOLD = "thresholding dynamic_thresholding_ratio sample_max_value"
_SPACING = "prediction_type timestep_spacing steps_offset"
_SIGMAS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas"
_FLOW_SIGMAS = "use_flow_sigmas flow_shift use_dynamic_shifting time_shift_type"
_DDIM = f"{_BETAS} {_CLIP} {_THRESHOLD} {_SPACING} set_alpha_to_one rescale_betas_zero_snr"
_DDPM = f"{_BETAS} {_CLIP} {_THRESHOLD} {_SPACING} variance_type rescale_betas_zero_snr"
_LCM = f"{_DDIM} original_inference_steps timestep_scaling"
_K = f"{_BETAS} {_SPACING} {_SIGMAS}"
_DPM = f"{_K} {_THRESHOLD} {_FLOW_SIGMAS} solver_order algorithm_type solver_type lower_order_final"
_EDM = "sigma_min sigma_max sigma_data sigma_schedule num_train_timesteps prediction_type rho final_sigmas_type"
_FLOW = "num_train_timesteps shift"
_FLOW_EULER = (
    f"{_FLOW} {_SIGMAS} use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len invert_sigmas "
    "shift_terminal time_shift_type"
)


def _class(keys: str, family: Family = Family.BETAS, calls: Any = once) -> SchedulerClass:
    return SchedulerClass(family=family, keys=frozenset(keys.split()), calls=calls)


CLASSES: Mapping[str, SchedulerClass] = MappingProxyType(
    {
        "DDIMScheduler": _class(_DDIM),
        "DDIMParallelScheduler": _class(_DDIM),
        "DDPMScheduler": _class(_DDPM),
        "DDPMParallelScheduler": _class(_DDPM),
        "EulerDiscreteScheduler": _class(
            f"{_K} interpolation_type sigma_min sigma_max timestep_type rescale_betas_zero_snr final_sigmas_type"
        ),
        "EulerAncestralDiscreteScheduler": _class(f"{_BETAS} {_SPACING} rescale_betas_zero_snr"),
        "DPMSolverMultistepScheduler": _class(
            f"{_DPM} steps_offset euler_at_final use_lu_lambdas final_sigmas_type lambda_min_clipped variance_type "
            "rescale_betas_zero_snr"
        ),
        "DPMSolverSinglestepScheduler": _class(
            f"{_BETAS} {_SIGMAS} {_THRESHOLD} {_FLOW_SIGMAS} prediction_type solver_order algorithm_type solver_type "
            "lower_order_final final_sigmas_type lambda_min_clipped variance_type"
        ),
        "DEISMultistepScheduler": _class(_DPM),
        "UniPCMultistepScheduler": _class(
            f"{_K} {_THRESHOLD} {_FLOW_SIGMAS} solver_order solver_type lower_order_final predict_x0 disable_corrector "
            "solver_p final_sigmas_type rescale_betas_zero_snr sigma_min sigma_max shift_terminal"
        ),
        "PNDMScheduler": _class(f"{_BETAS} {_SPACING} skip_prk_steps set_alpha_to_one", calls=pseudo),
        "LMSDiscreteScheduler": _class(_K),
        "HeunDiscreteScheduler": _class(f"{_K} {_CLIP}", calls=twice),
        "KDPM2DiscreteScheduler": _class(_K, calls=twice),
        "KDPM2AncestralDiscreteScheduler": _class(_K, calls=twice),
        "LCMScheduler": _class(_LCM),
        "TCDScheduler": _class(_LCM),
        "EDMEulerScheduler": _class(_EDM, Family.EDM),
        "EDMDPMSolverMultistepScheduler": _class(
            f"{_EDM} {_THRESHOLD} solver_order algorithm_type solver_type lower_order_final euler_at_final", Family.EDM
        ),
        "FlowMatchEulerDiscreteScheduler": _class(f"{_FLOW_EULER} stochastic_sampling", Family.FLOW),
        "FlowMatchHeunDiscreteScheduler": _class(_FLOW, Family.FLOW, twice),
        "FlowMatchLCMScheduler": _class(f"{_FLOW_EULER} scale_factors upscale_mode", Family.FLOW),
    }
)
"""The supported classes by name."""

OFF = (False, None)
_FLOWING = tuple(name for name, row in CLASSES.items() if {"use_flow_sigmas", "use_dynamic_shifting"} <= row.keys)

LIMITS: Mapping[str, tuple[Limit, ...]] = MappingProxyType(
    {
        "thresholding": (
            Limit(values=OFF, reason="depends on the whole image", advice="Set it to False or choose euler."),
        ),
        "clip_sample": (
            Limit(
                values=OFF,
                reason="clips a prediction that later calls use again",
                advice="Set it to False or choose ddim.",
                classes=("HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
            ),
        ),
        "variance_type": (
            Limit(
                values=(None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
                reason="gives a variance without bounds, or NaN in diffusers",
                advice="Supported are fixed_small, fixed_small_log, fixed_large and learned_range; or choose ddim.",
                classes=("DDPMScheduler", "DDPMParallelScheduler"),
            ),
        ),
        "use_flow_sigmas": (
            Limit(
                values=OFF,
                reason="is a flow along the noise levels of another scheduler",
                advice="Set it to False, or give the flow's own configuration and choose flow-euler.",
            ),
        ),
        "use_dynamic_shifting": (
            Limit(
                values=OFF,
                reason="makes the noise levels depend on the size of the image",
                advice="Set it to False, or choose flow-euler.",
                classes=_FLOWING,
            ),
        ),
        "solver_p": (
            Limit(values=(None,), reason="is a second scheduler inside", advice="Remove it, or choose dpmsolver++."),
        ),
        "invert_sigmas": (
            Limit(values=OFF, reason="samples from image to noise", advice="Set it to False; other flows work."),
        ),
        "scale_factors": (
            Limit(
                values=(None, []),
                reason="changes the size of the samples between steps",
                advice="Remove it, or choose flow-euler.",
            ),
        ),
    }
)
"""Values that tables can express, by key."""

TRAINING: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "rescale_betas_zero_snr": OFF,
        "timestep_type": ("discrete",),
        "use_flow_sigmas": OFF,
        "use_dynamic_shifting": OFF,
        "shift_terminal": (None,),
        "invert_sigmas": OFF,
        "snr_shift_scale": (1.0,),
        "predict_epsilon": (True, None),
    }
)
"""Keys that describe how the model was trained, with the values at which a class that does not know them is right."""

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
"""Keys that describe how the model was trained and that every class of the family knows, with defaults that differ."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""Values of prediction_type that the family of betas and EDM know."""

LEGACY = frozenset({"tensor_format"})
"""Keys of old configurations that never changed a number."""

INSIDE = frozenset({"_class_name", "_diffusers_version", "_use_default_values", "_name_or_path", "_commit_hash"})
"""Keys that diffusers adds to every configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A class that unetc does not read."""

    reason: str
    nearest: str
    """Name of the scheduler that is nearest, or the advice instead."""


_TOKENS = Refused(reason="samples tokens, not images with noise", nearest="no scheduler of unetc")
_VIDEO = Refused(
    reason="shifts the noise levels of its betas (snr_shift_scale) for a model of videos", nearest="ddim or dpmsolver++"
)
_STAGES = Refused(reason="samples a flow in stages of different sizes", nearest="flow-euler")
_BROWNIAN = Refused(
    reason="draws correlated noise from a Brownian tree, which a row of the table cannot express",
    nearest="sde-dpmsolver++",
)
_INVERSE = Refused(reason="walks from image to noise", nearest="ddim or dpmsolver++, which walk from noise to image")
_CORRECTS = Refused(reason="makes Langevin steps of a length that depends on the sample", nearest="euler-ancestral")

REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "AmusedScheduler": _TOKENS,
        "BlockRefinementScheduler": _TOKENS,
        "DiscreteDDIMScheduler": _TOKENS,
        "EntropyBoundScheduler": _TOKENS,
        "VQDiffusionScheduler": _TOKENS,
        "CogVideoXDDIMScheduler": _VIDEO,
        "CogVideoXDPMScheduler": _VIDEO,
        "HeliosScheduler": _STAGES,
        "HeliosDMDScheduler": _STAGES,
        "DPMSolverSDEScheduler": _BROWNIAN,
        "CosineDPMSolverMultistepScheduler": _BROWNIAN,
        "DDIMInverseScheduler": _INVERSE,
        "DPMSolverMultistepInverseScheduler": _INVERSE,
        "ScoreSdeVeScheduler": _CORRECTS,
        "ScoreSdeVpScheduler": _CORRECTS,
        "CMStochasticIterativeScheduler": Refused(
            reason="samples a consistency model, whose output is scaled by its own boundary conditions",
            nearest="lcm, for a latent consistency model",
        ),
        "ConsistencyDecoderScheduler": Refused(
            reason="samples a decoder of consistency", nearest="the VAE that the pipeline came with"
        ),
        "SCMScheduler": Refused(reason="samples along angles (TrigFlow)", nearest="flow-euler, for a model of flow"),
        "DDPMWuerstchenScheduler": Refused(
            reason="takes timesteps between 1 and 0 along a cosine", nearest="ddpm with squaredcos_cap_v2"
        ),
        "UnCLIPScheduler": Refused(reason="has other bounds of the variance, for a prior of images", nearest="ddpm"),
        "RePaintScheduler": Refused(
            reason="goes back in time and mixes the original image in", nearest="ddpm, with a pipeline of inpainting"
        ),
        "IPNDMScheduler": Refused(reason="ignores the betas, for a model of sounds", nearest="pndm"),
        "KarrasVeScheduler": Refused(reason="adds noise before it calls the model", nearest="edm-euler"),
        "SASolverScheduler": Refused(
            reason="uses the noise of a step again in the next one, which a row of the table cannot express",
            nearest="sde-dpmsolver++",
        ),
        "FlowMapEulerDiscreteScheduler": Refused(
            reason="samples a flow map, which takes two timesteps", nearest="flow-euler, for a model of flow"
        ),
        "LTXEulerAncestralRFScheduler": Refused(
            reason="takes its noise levels from a pipeline of videos", nearest="flow-lcm or flow-euler"
        ),
        "MiniMaxH3Scheduler": Refused(reason="takes its noise levels from a pipeline of videos", nearest="flow-euler"),
        "PiflowScheduler": Refused(reason="follows a policy that the model predicts", nearest="flow-euler"),
        "RFD4ProteinaScheduler": Refused(reason="samples proteins", nearest="no scheduler of unetc"),
    }
)
"""The other classes that diffusers 0.42 exports, by name."""
