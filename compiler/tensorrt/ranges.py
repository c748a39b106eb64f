"""Check and describe the heights and widths that the engines of a bundle are to take."""

from __future__ import annotations

from unetc.artifacts.manifest import Manifest
from unetc.errors import EngineBuildError
from unetc.nvidia.sizes import Range, Sizes


def check_sides(manifest: Manifest, sizes: Sizes) -> None:
    """Refuse sides that the denoiser cannot take.

    Raises:
        EngineBuildError: If a smallest, usual or largest size is impossible; the message names the nearest possible
            ones.
    """
    for height, width in zip(sizes.height.corners(), sizes.width.corners(), strict=True):
        if problem := manifest.sample_sizes.problem(height, width):
            raise EngineBuildError(problem)


def describe_sides(manifest: Manifest, sizes: Sizes) -> str:
    """Format height and width, and also the image's height and width where samples are latents."""
    sides = f"{sizes.height} x {sizes.width}"
    if manifest.decoder is None:
        return sides
    height, width = (_scaled(side, manifest.decoder.scale) for side in (sizes.height, sizes.width))
    return f"{sides} latents ({height} x {width} pixels)"


def _scaled(side: Range, scale: int) -> str:
    return ",".join(str(int(size) * scale) for size in str(side).split(","))
