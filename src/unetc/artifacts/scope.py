"""The use of a model that a measured damage holds for, in words."""

from __future__ import annotations

from .profile import ControlMeasured, ModelReference


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


def damage_scope(model: ModelReference, control: ControlMeasured | None, steps: int) -> str:
    """Describe the samples that a measured damage holds for."""
    start = (
        f"damage holds for samples from pure noise over {steps} steps; image to image and other starts from less noise "
        "were not measured, and their damage may be many times larger"
    )
    return "; ".join(part for part in (start, control_scope(model, control)) if part)
