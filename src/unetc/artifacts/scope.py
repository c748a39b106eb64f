"""The use of a model that a measured damage holds for, in words."""

from __future__ import annotations

from .profile import ControlMeasured, Damage, ModelReference


def control_scope(model: ModelReference, control: ControlMeasured | None) -> str | None:
    """Describe the control images that damage was measured with; None if the denoiser has no ControlNet inputs."""
    if not model.controlnet:
        return None
    if control is None:
        return (
            "damage was measured without a control image: all ControlNet inputs were zero. With one it may be many "
            "times larger. To measure it, analyse with --controlnet-model and --control-images"
        )
    images = "1 control image" if control.images == 1 else f"{control.images} control images"
    return (
        f"damage was measured with {images} (sha256 {control.images_sha256[:12]}) through the ControlNet "
        f"{control.model} ({control.model_sha256[:12]})"
    )


def damage_scope(
    model: ModelReference, control: ControlMeasured | None, steps: int, plain: Damage | None = None
) -> str:
    """Describe the samples that a measured damage holds for.

    Args:
        model: The model.
        control: Control images that the damage was measured with.
        steps: Number of steps that it was measured at.
        plain: Damage with the scheduler's plain rows, if others are tuned to the plan.
    """
    start = (
        f"damage holds for samples from pure noise over {steps} steps; image to image and other starts from less noise "
        "were not measured, and their damage may be many times larger"
    )
    tuned = plain and (
        f"it holds for rows of the scheduler tuned to the plan. A diffusers pipeline has plain rows: their relative "
        f"L2 is {plain.relative_l2.mean:.4f}"
    )
    return "; ".join(part for part in (start, tuned, control_scope(model, control)) if part)
