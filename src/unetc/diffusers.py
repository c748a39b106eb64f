"""A bundle in the place of a denoiser in pipelines of diffusers.

    import unetc.diffusers

    pipe.unet = unetc.diffusers.load("bundle/")

Pipelines guide, scale and step as they always do; engines are called with the batch they are given. A pipeline tells a
denoiser the timestep and nothing else about where it is, so engines are chosen by the timestep's noise level.
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
"""Conditions that engines have inputs for, under the names of diffusers."""


class BundleUNet(nn.Module):
    """A bundle that answers what pipelines ask of a UNet; it computes in float32 on the device of the bundle's target.

    It follows one trajectory at a time: pipelines that sample at the same time need one each. A trajectory ends where
    the timestep does not fall or the shape of the samples changes; the next one shares nothing with it. A scheduler of
    second order that asks twice at a timestep gets the second answer of engine 0. What cannot be seen is a run that
    begins at a lower timestep than the last one ended at: `reset` before it.
    """

    def __init__(self, session: Session, config: Mapping[str, Any], *, full_model: bool) -> None:
        """Put a session into a module.

        Args:
            session: The engines.
            config: Configuration of the denoiser they were made from.
            full_model: Run the full model at every step.
        """
        super().__init__()
        self.config: Any = FrozenDict(config)
        self._session = session
        self._full_model = full_model
        self._timesteps, self._log_snr = session.scheduler.noise_levels()
        if config.get("addition_embed_type") == "text_time":  # SDXL compares it with the width of its own embeddings
            width = config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self.reset()

    @property
    def dtype(self) -> torch.dtype:
        """The type that pipelines make their latents of."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where pipelines keep their latents; tensors of other devices are copied."""
        return torch.device("cpu")

    def reset(self) -> None:
        """Begin a new trajectory at the next call, whatever its timestep."""
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
            sample: What the denoiser sees, [batch, channel, height, width].
            timestep: The scheduler's value, one for all samples.
            encoder_hidden_states: [batch, token, channel].
            class_labels: [batch] or [batch, channel].
            added_cond_kwargs: `text_embeds` and `time_ids`, [batch, channel].
            down_block_additional_residuals: What a ControlNet adds to every skip.
            mid_block_additional_residual: What it adds to the middle.
            return_dict: Whether to give back an object with the prediction as `sample`, or a tuple.
            others: What else a UNet of diffusers takes; refused unless it is None or empty.

        Raises:
            SessionError: If a pipeline asks for what engines cannot do, or leaves out what they need.
            NonFiniteError: If the full model produces NaN or infinity; it takes the turn of an engine that does.
        """
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            **(added_cond_kwargs or {}),
        }
        _refuse(others)
        _refuse({name: value for name, value in given.items() if name not in _TAKEN})
        given |= self._residuals(down_block_additional_residuals, mid_block_additional_residual)
        own = {name: _to_array(value) for name, value in given.items() if value is not None}
        device = self._session.device
        conditions = Conditions(own=own, controlnet=self._session.conditions.controlnet).on(device)
        value = _one_of(timestep)
        level = float(np.interp(value, self._timesteps, self._log_snr))
        rollout = self._rollout_at(value, tuple(sample.shape))
        predicted = rollout.predict(device.put(_to_array(sample)), value, level, conditions)
        prediction = torch.from_numpy(device.to_array(predicted)).to(sample)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _residuals(self, down: Sequence[Tensor] | None, middle: Tensor | None) -> dict[str, Tensor]:
        """Give the residuals of a ControlNet the names of the engines' inputs."""
        if down is None and middle is None:
            return {}
        names = [one.name for one in self._session.conditions.controlnet]
        if not names:
            raise SessionError(
                "engines cannot take down_block_additional_residuals. `unetc build --controlnet` makes some that can."
            )
        if down is None or middle is None or len(down) + 1 != len(names):
            raise SessionError(
                f"engines take {len(names) - 1} down_block_additional_residuals and a mid_block_additional_residual, "
                f"got {len(down or ())} and {int(middle is not None)}. Check that the ControlNet belongs to the model."
            )
        return dict(zip(names, (*down, middle), strict=True))

    def _rollout_at(self, timestep: float, shape: tuple[int, ...]) -> Rollout:
        """Go on with the trajectory, or begin the next one."""
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
        target: Where to run; the target it was built for when not given.
        threads: Number of CPU threads; the number it was measured with when not given, 0 lets the backend choose.
        memory: "fast" or "low", see `unetc.runtime.backends.registry.Memory`.
        full_model: Run the full model at every step.

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
    """Refuse what would be left out of the prediction."""
    for name, value in arguments.items():
        if value is not None and value != {}:
            raise SessionError(f"engines cannot take {name}. Leave it out, or use the pipeline's own UNet.")


def _one_of(timestep: Tensor | float) -> float:
    values = {float(value) for value in torch.as_tensor(timestep).flatten()}
    if len(values) != 1:
        raise SessionError(f"one call has the timesteps {sorted(values)}; expected one for all samples.")
    return values.pop()


def _to_array(tensor: Tensor) -> NDArray[Any]:
    """Copy what is not a C-contiguous float32 (or integer) tensor on the CPU."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
    return array
