"""A bundle as the denoiser of a diffusers pipeline.

    import unetc.diffusers

    pipe.unet = unetc.diffusers.load("bundle/")

The pipeline still applies guidance, scaling and the scheduler; each engine call gets the pipeline's batch. A pipeline
tells its denoiser only the timestep, so the timestep's noise level decides which engine runs, and `trajectories` finds
out which earlier calls belong to the same trajectory.
"""

from unetc.errors import MissingDependency

try:
    import diffusers
    import torch
except ImportError as error:
    raise MissingDependency("unetc.diffusers needs torch and diffusers: pip install 'unetc[compile]'") from error

from .bundle_unet import BundleUNet, load

__all__ = ["BundleUNet", "load"]

del diffusers, torch
