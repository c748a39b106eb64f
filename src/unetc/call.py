"""The calls that a denoiser allows: its inputs, their shapes, and the mapping from a call of a diffusers UNet.

`CallSignature` is the one place that knows them. Capture draws its examples from it, a bundle stores it, and sessions
and `unetc.diffusers` check their calls with it before an engine runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .artifacts.call_input import SAMPLE, CallInput
from .artifacts.classes import Classes
from .artifacts.sizes import SampleSizes
from .controlnet import PREFIX, ControlNetInput, controlnet_inputs, spread
from .errors import ModelError, SessionError, ShapeMismatch

TIMESTEP, CONTEXT = "timestep", "encoder_hidden_states"
POOLED, TIME_IDS, CLASS_LABELS = "text_embeds", "time_ids", "class_labels"
TIMESTEP_COND, EXTRA_CHANNELS = "timestep_cond", "extra_channels"
HEIGHT, WIDTH, TOKENS = "height", "width", "tokens"
"""Names of the sizes that a call may choose."""

SIZE_NUMBERS = 6
"""Columns of SDXL's `time_ids`: original size, crop, target size."""
AESTHETIC_NUMBERS = 5
"""Columns in SDXL's refiner: original size, crop, aesthetic score."""

_ADVICE: Mapping[str, str] = {
    CONTEXT: "Encode the prompts with this model's own text encoders.",
    POOLED: "Encode the prompts with this model's own text encoders.",
    TIME_IDS: "Give original size, crop and target size, or, for SDXL's refiner, original size, crop and score.",
    CLASS_LABELS: "Give one label per sample.",
    TIMESTEP_COND: "Embed the guidance scale with the pipeline's get_guidance_scale_embedding.",
    EXTRA_CHANNELS: "Give the image latents, for inpainting after the mask, at the size of the sample.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSignature:
    """Everything that a call of one denoiser may be, apart from the timestep: one number per sample."""

    inputs: tuple[CallInput, ...]
    """The sample first, then its conditions."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """Inputs that a call may omit; they are zero then."""
    sizes: SampleSizes | None = None
    """Heights and widths that the graph takes; None if they are not known, or not limited."""

    @classmethod
    def of(
        cls,
        denoiser: str,
        config: Mapping[str, Any],
        *,
        channels: int | None = None,
        size_numbers: int = SIZE_NUMBERS,
        controlnet: bool = False,
    ) -> CallSignature:
        """Derive the signature of a UNet from its configuration.

        Args:
            denoiser: Class of the UNet in diffusers.
            config: Its configuration; keys that are absent have the defaults of diffusers.
            channels: Channels of a sample. The UNet's other input channels are `extra_channels`, which a call
                concatenates after the sample. By default, all channels belong to the sample.
            size_numbers: Columns of SDXL's `time_ids`.
            controlnet: Whether there are ControlNet inputs.

        Raises:
            ModelError: If a part of the configuration is not supported. The message names the part.
        """
        conditional = denoiser == "UNet2DConditionModel"
        every = int(config.get("in_channels", 4 if conditional else 3))
        own = every if channels is None else channels
        if not 0 < own <= every:
            raise ModelError(f"a {denoiser} with {every} input channels cannot denoise samples of {own} channels.")
        if config.get("time_embedding_type") == "learned":
            raise ModelError(
                f"cannot capture a {denoiser} with time_embedding_type 'learned': it looks up whole timesteps in a "
                "table, and unetc computes with timesteps of any value. Expected 'positional' or 'fourier'."
            )
        inputs = [CallInput(name=SAMPLE, axes=(own, HEIGHT, WIDTH))]
        if conditional:
            inputs.append(CallInput(name=CONTEXT, axes=(TOKENS, _context_width(config))))
        inputs += _class_labels(denoiser, config)
        if conditional:
            inputs += _added(config, size_numbers)
            if (width := config.get("time_cond_proj_dim")) is not None:
                inputs.append(CallInput(name=TIMESTEP_COND, axes=(int(width),), optional=True))
        if own < every:
            inputs.append(CallInput(name=EXTRA_CHANNELS, axes=(every - own, HEIGHT, WIDTH)))
        return cls(inputs=tuple(inputs), controlnet=controlnet_inputs(config) if controlnet else ())

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        size = self.inputs[0].axes[0]
        assert isinstance(size, int)
        return size

    @property
    def conditions(self) -> tuple[CallInput, ...]:
        """Inputs after the sample, without ControlNet inputs."""
        return self.inputs[1:]

    @property
    def classes(self) -> Classes | None:
        """The classes; None for a model without class labels, or whose labels are not numbers of classes."""
        return next((item.classes for item in self.conditions if item.name == CLASS_LABELS), None)

    def with_classes(self, classes: Classes) -> CallSignature:
        """Return the signature with names for its classes."""
        named = (
            item if item.classes is None else msgspec.structs.replace(item, classes=classes) for item in self.inputs
        )
        return replace(self, inputs=tuple(named))

    @property
    def names(self) -> frozenset[str]:
        """Names of all conditions that a call must have."""
        return frozenset(item.name for item in self.conditions)

    def check(self, sample: Any, conditions: Mapping[str, Any]) -> None:
        """Refuse a call that the denoiser does not allow, before any engine runs.

        Call it with the values of one engine call, or with noise and the conditions of one row per sample.

        Args:
            sample: The sample, [batch, channel, height, width]; anything with a `shape`.
            conditions: Values by input name, [batch, ...], without sample and timestep. ControlNet inputs may be
                absent, every other input must be there.

        Raises:
            ShapeMismatch: If a value is missing, unknown, or has a shape other than expected. The message names the
                input, the shape that was found and the shape that was expected.
        """
        known: dict[str, int] = {}
        _check_shape(self.inputs[0], tuple(sample.shape), None, known)
        batch, _, height, width = sample.shape
        if self.sizes is not None and (problem := self.sizes.problem(height, width)):
            raise ShapeMismatch(problem)
        controlnet = {one.name: one for one in self.controlnet}
        missing = [f"{item.name} {item.describe()}" for item in self.conditions if item.name not in conditions]
        if missing:
            raise ShapeMismatch(
                f"the model needs {' and '.join(missing)}, but the call has "
                f"{', '.join(sorted(conditions)) or 'no conditions'}. Give all conditions that the model takes."
            )
        for item in self.conditions:
            _check_shape(item, tuple(conditions[item.name].shape), batch, known)
            if item.classes is not None and isinstance(conditions[item.name], np.ndarray):
                item.read(conditions[item.name])
        for name, value in conditions.items():
            if name in self.names:
                continue
            if name not in controlnet:
                raise ShapeMismatch(self._unknown(name))
            expected = controlnet[name].shape(batch, height, width)
            if tuple(value.shape) != expected:
                raise ShapeMismatch(
                    f"{name} has shape {list(value.shape)}; expected {list(expected)} for a sample of "
                    f"{list(sample.shape)}. Check that the ControlNet fits the model and the size of the image."
                )

    def read(self, conditions: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Return conditions in the element types that a graph reads; unknown names stay for `check`.

        Raises:
            ShapeMismatch: If a value is not a number, or a label is not a known class.
        """
        by_name = {item.name: item for item in self.conditions}
        plain = CallInput(name="", axes=())
        return {name: by_name.get(name, plain).read(value) for name, value in conditions.items()}

    def of_unet_call(self, sample: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Translate a call of the original diffusers UNet into the inputs of the graph.

        Channels after the sample's become `extra_channels`. `added_cond_kwargs` and ControlNet residuals get the names
        of the graph. Values are passed on, not copied, except that pooled residuals are repeated. Arguments that
        diffusers ignores for this UNet are ignored. `check` still has to check the shapes; it needs the result with
        absent optional inputs added: `fill`.

        Args:
            sample: First argument of the UNet, with all its channels, [batch, channel, height, width].
            arguments: The other arguments by name, without timestep and `return_dict`. None, empty mappings and empty
                sequences count as absent.

        Returns:
            The sample without extra channels, and the conditions by input name.

        Raises:
            SessionError: If an argument would change the prediction and the graph has no input for it, or if conditions
                that belong together are in a value of another kind than a mapping or a sequence.
            ShapeMismatch: If the sample has another number of channels.
        """
        given = {name: value for name, value in arguments.items() if not _is_absent(value)}
        found: dict[str, Any] = {}
        added = given.pop("added_cond_kwargs", {})
        if not isinstance(added, Mapping):
            raise SessionError(
                f"added_cond_kwargs is of class {type(added).__name__}. Expected a mapping of tensors by name."
            )
        for name, value in added.items():
            if _is_absent(value):
                continue
            if name in self.names:
                found[name] = value
            elif name not in (POOLED, TIME_IDS):  # only UNets of SDXL read these two
                raise SessionError(_cannot_take(f"added_cond_kwargs[{name!r}]"))
        found |= self._of_controlnet(
            given.pop("down_block_additional_residuals", None), given.pop("mid_block_additional_residual", None), sample
        )
        for name in (CONTEXT, CLASS_LABELS, TIMESTEP_COND):
            if name in given:
                if name not in self.names:
                    raise SessionError(_cannot_take(name))
                found[name] = given.pop(name)
        if given:
            raise SessionError(_cannot_take(sorted(given)[0]))
        extra = next((item for item in self.conditions if item.name == EXTRA_CHANNELS), None)
        shape = tuple(sample.shape)
        wanted = self.channels + (int(extra.axes[0]) if extra else 0)
        if len(shape) != 4 or shape[1] != wanted:
            raise ShapeMismatch(
                f"the UNet is called with a sample of {list(shape)}; expected [batch, {wanted}, height, width]"
                + (f", {self.channels} of the noisy sample first." if extra else ".")
                + " Check that the pipeline's class fits the model."
            )
        if extra:
            found[EXTRA_CHANNELS] = sample[:, self.channels :]
            sample = sample[:, : self.channels]
        return sample, found

    def fill(self, conditions: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """Add zeros for optional inputs that are absent; a UNet treats absent ones like zeros."""
        filled = dict(conditions)
        for item in self.conditions:
            if item.optional and item.name not in filled:
                filled[item.name] = np.zeros((batch, *map(int, item.axes)), np.float32)
        return filled

    def _of_controlnet(self, down: Any, middle: Any, sample: Any) -> dict[str, Any]:
        """Map the outputs of a ControlNet to the inputs of the engines."""
        if down is None and middle is None:
            return {}
        names = [one.name for one in self.controlnet]
        if not names:
            raise SessionError(
                "this bundle's engines cannot take down_block_additional_residuals. Build the bundle with --controlnet."
            )
        if down is not None and not isinstance(down, Sequence):
            raise SessionError(
                f"down_block_additional_residuals is of class {type(down).__name__}. Expected a sequence of tensors, "
                "as the ControlNet returns them."
            )
        if down is None or middle is None or len(down) + 1 != len(names):
            raise SessionError(
                f"engines take {len(names) - 1} down_block_additional_residuals and a mid_block_additional_residual, "
                f"got {len(down or ())} and {int(middle is not None)}. Check that the ControlNet fits the model."
            )
        batch, _, height, width = (*sample.shape, *(1, 1, 1, 1))[:4]  # another number of axes is refused by `check`
        return {
            one.name: spread(value, one.shape(batch, height, width))
            for one, value in zip(self.controlnet, (*down, middle), strict=True)
        }

    def _unknown(self, name: str) -> str:
        takes = ", ".join(item.name for item in self.conditions) or "no conditions"
        if name.startswith(PREFIX):
            return f"the model has no input {name}. Build the bundle with --controlnet, for this ControlNet."
        return f"the model has no input {name}; it takes {takes}. Omit {name}, or use the model that it belongs to."


def _check_shape(item: CallInput, shape: tuple[int, ...], batch: int | None, known: dict[str, int]) -> None:
    """Compare a shape with the axes of an input; sizes with names must be equal in all inputs."""
    fits = len(shape) == len(item.axes) + 1 and (shape[0] >= 1 if batch is None else shape[0] == batch)
    if fits:
        for axis, size in zip(item.axes, shape[1:], strict=True):
            fits = fits and size >= 1 and size == (known.setdefault(axis, size) if isinstance(axis, str) else axis)
    if fits:
        return
    sizes = ["batch" if batch is None else batch, *(known.get(str(axis), axis) for axis in item.axes)]
    if item.name == SAMPLE:
        sizes = ["batch", *item.axes]
    expected = f"[{', '.join(map(str, sizes))}]"
    advice = _ADVICE.get(item.name, "Check that it belongs to this model.")
    raise ShapeMismatch(f"{item.name} has shape {list(shape)}; expected {expected}. {advice}")


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, (Mapping, tuple, list)) and not value)


def _cannot_take(name: str) -> str:
    return f"engines cannot take {name}. Omit it, or use the pipeline's original UNet."


def _context_width(config: Mapping[str, Any]) -> int:
    """Return the width of a token, before a projection inside the UNet.

    Raises:
        ModelError: If the tokens are of another kind than text.
    """
    hidden = config.get("encoder_hid_dim_type")
    if hidden is None and config.get("encoder_hid_dim") is not None:
        hidden = "text_proj"  # as diffusers does
    if hidden not in (None, "text_proj"):
        raise ModelError(
            f"cannot capture UNet2DConditionModel with {hidden} conditions (such as IP-Adapter). "
            "Expected encoder_hid_dim_type None or 'text_proj'."
        )
    widths = config["encoder_hid_dim"] if hidden else config.get("cross_attention_dim", 1280)
    return int(widths if isinstance(widths, int) else widths[0])


def _class_labels(denoiser: str, config: Mapping[str, Any]) -> list[CallInput]:
    """List the class labels, if the UNet takes some.

    Raises:
        ModelError: If it takes labels of an unknown kind.
    """
    kind = config.get("class_embed_type")
    if kind is None:
        count = config.get("num_class_embeds")
        return [] if count is None else [CallInput(name=CLASS_LABELS, axes=(), classes=Classes(count=int(count)))]
    if kind == "timestep":
        return [CallInput(name=CLASS_LABELS, axes=())]
    if kind == "identity":
        width = time_width(config)
    elif kind in ("projection", "simple_projection"):
        width = int(config["projection_class_embeddings_input_dim"])
    else:
        raise ModelError(
            f"cannot capture {denoiser} with class_embed_type {kind!r}. "
            "Expected None, 'timestep', 'identity', 'projection' or 'simple_projection'."
        )
    return [CallInput(name=CLASS_LABELS, axes=(width,))]


def time_width(config: Mapping[str, Any]) -> int:
    """Return the width of a UNet's time embedding."""
    factor = 2 if config.get("time_embedding_type") == "fourier" and "cross_attention_dim" in config else 4
    return int(config.get("time_embedding_dim") or factor * (config.get("block_out_channels") or (320,))[0])


def _added(config: Mapping[str, Any], size_numbers: int) -> list[CallInput]:
    """List SDXL's inputs, if the UNet takes them.

    Raises:
        ModelError: If it takes other additional inputs.
    """
    added = config.get("addition_embed_type")
    if added not in (None, "text", "text_time"):
        raise ModelError(
            f"cannot capture UNet2DConditionModel with addition_embed_type {added!r}. "
            "Expected None, 'text' or 'text_time'."
        )
    if added != "text_time":
        return []
    pooled = config["projection_class_embeddings_input_dim"] - size_numbers * config["addition_time_embed_dim"]
    if pooled < 1:
        raise ModelError(
            f"a UNet2DConditionModel with projection_class_embeddings_input_dim "
            f"{config['projection_class_embeddings_input_dim']} has no room for {size_numbers} size numbers of "
            f"{config['addition_time_embed_dim']} channels each. Check its configuration."
        )
    return [CallInput(name=POOLED, axes=(pooled,)), CallInput(name=TIME_IDS, axes=(size_numbers,))]
