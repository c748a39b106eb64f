"""Check and describe the heights and widths that the engines of a bundle are to take."""

from __future__ import annotations

from unetc.artifacts.manifest import Manifest
from unetc.errors import EngineBuildError
from unetc.nvidia.sizes import Range, Sizes


def check_sides(manifest: Manifest, sizes: Sizes) -> None:
    """Refuse sides that a UNet cannot halve at every level and double again.

    Raises:
        EngineBuildError: If the UNet cannot take a side; the message names the nearest possible ones.
    """
    levels = manifest.denoiser_config.get("block_out_channels")
    if levels is None:
        return  # not a UNet
    multiple = 2 ** (len(levels) - 1)
    if any(side % multiple for side in manifest.sample_shape[1:]):
        return  # this UNet's graph takes other sides too
    for name, side in (("height", sizes.height), ("width", sizes.width)):
        if wrong := [size for size in side.corners() if size % multiple]:
            below = wrong[0] // multiple * multiple
            near = " or ".join(str(size) for size in (below, below + multiple) if size)
            raise EngineBuildError(
                f"no engine can take a {name} of {wrong[0]}: a UNet of {len(levels)} levels takes multiples of "
                f"{multiple}. Nearest: {near}."
            )


def describe_sides(manifest: Manifest, sizes: Sizes) -> str:
    """Format height and width, and also the image's height and width where samples are latents."""
    sides = f"{sizes.height} x {sizes.width}"
    if manifest.decoder is None:
        return sides
    height, width = (_scaled(side, manifest.decoder.scale) for side in (sizes.height, sizes.width))
    return f"{sides} latents ({height} x {width} pixels)"


def _scaled(side: Range, scale: int) -> str:
    return ",".join(str(int(size) * scale) for size in str(side).split(","))
