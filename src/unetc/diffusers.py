"""A bundle as the denoiser of a diffusers pipeline.

    import unetc.diffusers

    pipe.unet = unetc.diffusers.load("bundle/")

The pipeline still applies guidance, scaling and the scheduler; each engine call gets the pipeline's batch. A pipeline
tells its denoiser only the timestep, so the timestep's noise level decides which engine runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.runtime.backends.registry import Memory
from unetc.runtime.bundle import Bundle
from unetc.runtime.rollout import Rollout
from unetc.runtime.session import Session, backend_for

from .conditions import Conditions
from .errors import MissingDependency, SessionError

try:
    import diffusers
    import torch
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from torch import Tensor, nn
except ImportError as error:
    raise MissingDependency("unetc.diffusers needs torch and diffusers: pip install 'unetc[compile]'") from error

_TAKEN = ("encoder_hidden_states", "class_labels", "text_embeds", "time_ids")
"""Conditions for which engines have inputs, under the names of diffusers."""


class BundleUNet(nn.Module):
    """A bundle with the interface of a UNet; it computes in float32 on the device of the bundle's target.

    It follows one trajectory at a time, so pipelines that sample concurrently need one instance each. A trajectory ends
    when the timestep does not fall or the shape of the samples changes. The next trajectory shares nothing with it. So
    if a second-order scheduler calls twice at one timestep, the second call begins a new trajectory. A run that begins
    below the last timestep of the previous run cannot be detected: call `reset` before it.
    """

    def __init__(self, session: Session, config: Mapping[str, Any], *, full_model: bool) -> None:
        """Wrap a session in a module.

        Args:
            session: Session that runs the engines.
            config: Configuration of the original denoiser.
            full_model: Whether to run the full model at every step.
        """
        super().__init__()
        self.config: Any = FrozenDict(config)
        self._session = session
        self._full_model = full_model
        self._timesteps, self._log_snr = session.scheduler.noise_levels()
        if config.get("addition_embed_type") == "text_time":  # SDXL pipelines compare this width with their own
            width = config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self.reset()

    @property
    def dtype(self) -> torch.dtype:
        """Element type for the latents of pipelines."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device for the latents of pipelines; tensors of other devices are copied."""
        return torch.device("cpu")

    def reset(self) -> None:
        """Begin a new trajectory at the next call, regardless of its timestep."""
        self._last = -math.inf
        self._shape: tuple[int, ...] = ()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        **others: object,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict as the denoiser would, up to the treatments of the plan.

        Args:
            sample: Input samples of the denoiser, [batch, channel, height, width].
            timestep: The scheduler's value, one for all samples.
            encoder_hidden_states: [batch, token, channel].
            class_labels: [batch] or [batch, channel].
            added_cond_kwargs: `text_embeds` and `time_ids`, [batch, channel].
            down_block_additional_residuals: ControlNet inputs of the skip connections.
            mid_block_additional_residual: ControlNet input of the middle block.
            return_dict: Whether to return an object with the prediction as `sample`, instead of a tuple.
            others: Further arguments of a diffusers UNet; each must be None or empty.

        Returns:
            The prediction, [batch, channel, height, width], on the device and in the type of `sample`.

        Raises:
            SessionError: If the pipeline passes an argument that engines cannot take, or omits one that they need.
            NonFiniteError: If the full model, which repeats every non-finite step, produces NaN or infinity itself.
        """
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            **(added_cond_kwargs or {}),
        }
        _refuse(others)
        _refuse({name: value for name, value in given.items() if name not in _TAKEN})
        given |= self._controlnet_inputs(down_block_additional_residuals, mid_block_additional_residual)
        own = {name: _to_array(value) for name, value in given.items() if value is not None}
        device = self._session.device
        conditions = Conditions(own=own, controlnet=self._session.conditions.controlnet).on(device)
        value = _one_of(timestep)
        level = float(np.interp(value, self._timesteps, self._log_snr))
        rollout = self._rollout_at(value, tuple(sample.shape))
        predicted = rollout.predict(device.put(_to_array(sample)), value, level, conditions)
        prediction = torch.from_numpy(device.to_array(predicted)).to(sample)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _controlnet_inputs(self, down: Sequence[Tensor] | None, middle: Tensor | None) -> dict[str, Tensor]:
        """Map the outputs of a ControlNet to the inputs of the engines."""
        if down is None and middle is None:
            return {}
        names = [one.name for one in self._session.conditions.controlnet]
        if not names:
            raise SessionError(
                "this bundle's engines cannot take down_block_additional_residuals. Build the bundle with --controlnet."
            )
        if down is None or middle is None or len(down) + 1 != len(names):
            raise SessionError(
                f"engines take {len(names) - 1} down_block_additional_residuals and a mid_block_additional_residual, "
                f"got {len(down or ())} and {int(middle is not None)}. Check that the ControlNet fits the model."
            )
        return dict(zip(names, (*down, middle), strict=True))

    def _rollout_at(self, timestep: float, shape: tuple[int, ...]) -> Rollout:
        """Continue the trajectory, or begin the next one."""
        if timestep >= self._last or shape != self._shape:
            self._rollout = self._session.rollout(full_model=self._full_model)
        self._last, self._shape = timestep, shape
        return self._rollout


def load(
    path: str | Path,
    *,
    target: str | None = None,
    threads: int | None = None,
    memory: Memory | str = Memory.FAST,
    full_model: bool = False,
) -> BundleUNet:
    """Open a bundle as the denoiser of a pipeline.

    Args:
        path: The bundle's folder.
        target: Target to run on; by default the target of the build.
        threads: Number of CPU threads; by default the number used for the measurements. 0 lets the backend choose.
        memory: "fast" or "low", see `unetc.runtime.backends.registry.Memory`.
        full_model: Whether to run the full model at every step.

    Raises:
        ArtifactError: If the bundle cannot be read or is damaged.
        SessionError: If the target or the memory mode is unknown.
        MissingDependency: If the backend's library is not installed.
    """
    bundle = Bundle.open(Path(path))
    manifest = bundle.manifest
    session = Session.of(bundle, backend_for(manifest, target=target, threads=threads, memory=memory))
    denoiser = inspect.signature(getattr(diffusers, manifest.model.denoiser).__init__)
    defaults = {name: item.default for name, item in denoiser.parameters.items() if item.default is not item.empty}
    return BundleUNet(session, defaults | manifest.denoiser_config, full_model=full_model)


def _refuse(arguments: Mapping[str, object]) -> None:
    """Refuse arguments that would not affect the prediction."""
    for name, value in arguments.items():
        if value is not None and value != {}:
            raise SessionError(f"engines cannot take {name}. Omit it, or use the pipeline's original UNet.")


def _one_of(timestep: Tensor | float) -> float:
    values = {float(value) for value in torch.as_tensor(timestep).flatten()}
    if len(values) != 1:
        raise SessionError(f"one call has the timesteps {sorted(values)}. Expected one timestep for all samples.")
    return values.pop()


def _to_array(tensor: Tensor) -> NDArray[Any]:
    """Convert to a C-contiguous float32 or integer array; copies only if needed."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
    return array
