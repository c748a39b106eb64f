"""The denoiser of any supported class, with its inputs and its call.

Components are found without code for any class, but inputs and calls differ from class to class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unetc.artifacts.sizes import SampleSizes
from unetc.call import CallSignature
from unetc.controlnet import ControlNetInput, controlnet_inputs
from unetc.errors import ModelError, brief

from .inputs import Input, Signature, forms
from .transformers import TRANSFORMERS
from .unet import UNETS

_SIGNATURES: Mapping[str, Signature] = {**UNETS, **TRANSFORMERS}
"""Supported classes by name."""

_REFUSED: Mapping[str, str] = {
    "UVit2DModel": "it predicts tokens, which its sampler draws, and unetc denoises images of real numbers",
    "UNet1DModel": "its samples are sounds, and unetc denoises images",
    "UNet3DConditionModel": "its samples are videos, and unetc denoises images",
}
"""Classes that a user may expect to work, each with the reason why it does not."""


class Denoiser(nn.Module):
    """A denoiser with positional inputs and one tensor out, [batch, channel, height, width]."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Input, ...],
        call: Callable[[Any, dict[str, Any]], Tensor],
        sizes: SampleSizes,
    ) -> None:
        """Wrap a model that is called with inputs by name and takes samples of these sizes."""
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.sizes = sizes
        self._call = call

    def forward(self, *values: Tensor) -> Tensor:
        """Call the model; values after its own inputs (the gates, which are added later) are ignored."""
        named: dict[str, Any] = {item.name: value for item, value in zip(self.inputs, values, strict=False)}
        return self._call(self.model, named)


def denoiser_of(model: nn.Module, *, controlnet: bool = False, calls: CallSignature | None = None) -> Denoiser:
    """Wrap a model as a denoiser with positional inputs.

    Args:
        model: A denoiser from diffusers, on the CPU.
        controlnet: Whether to add the ControlNet inputs.
        calls: The calls of a UNet; by default they follow from its configuration.

    Raises:
        ModelError: If its class or a part of its configuration is not supported, if it takes no ControlNet inputs, or
            if diffusers cannot run it. The message names the class or the part.
    """
    name = type(model).__name__
    if name in _REFUSED:
        raise ModelError(f"cannot capture a denoiser of class {name}: {_REFUSED[name]}.")
    if name not in _SIGNATURES:
        raise ModelError(f"cannot capture a denoiser of class {name}. Supported: {', '.join(_SIGNATURES)}.")
    _refuse_patches(model, name)
    if controlnet and name != "UNet2DConditionModel":
        raise ModelError(f"a {name} takes no ControlNet inputs. Expected a UNet2DConditionModel.")
    signature = _SIGNATURES[name]
    if calls is not None:
        if name not in UNETS:
            raise ModelError(f"the calls of a {name} follow from its class. Expected one of: {', '.join(UNETS)}.")
        signature = replace(signature, inputs=partial(signature.inputs, calls=calls))
    *finer, coarsest = signature.multiples(model)
    multiple = next((one for one in finer if _SizeTrial(model, signature, one).takes_examples()), coarsest)
    trial = _SizeTrial(model, signature, multiple)
    smallest = next((side for side in range(multiple, 2 * coarsest + 1, multiple) if trial.takes(side)), None)
    if smallest is None and (problem := trial.problem()) is not None:
        raise ModelError(
            f"diffusers itself cannot run this {name}: {brief(problem)}. Check its configuration: some settings may "
            "not fit together. If diffusers makes images with the model, report a bug of unetc."
        ) from problem
    sizes = SampleSizes(
        multiple=multiple,
        smallest=multiple if smallest is None else smallest,
        largest=None if signature.largest is None else signature.largest(model),
    )
    inputs = signature.inputs(model, generator := torch.Generator().manual_seed(0), multiple)
    if controlnet:
        inputs += _controlnet_examples(model, inputs[0], generator)
    return Denoiser(model, tuple(inputs), signature.call, sizes)


class _SizeTrial:
    """Tries sizes of samples.

    UNets differ in their sizes by their blocks: some enlarge to the size of a skip, others to twice the size, and a
    block that halves without padding takes no side of one pixel.
    """

    def __init__(self, model: nn.Module, signature: Signature, multiple: int) -> None:
        self._inputs = tuple(signature.inputs(model, torch.Generator().manual_seed(0), multiple))
        self._denoiser = Denoiser(model, self._inputs, signature.call, SampleSizes(multiple=1))

    def takes_examples(self) -> bool:
        """Check on shapes alone whether a denoiser takes its examples."""
        tensors = {**dict(self._denoiser.named_parameters()), **dict(self._denoiser.named_buffers())}
        values = tuple(item.example.to("meta") for item in self._inputs)
        return self._predicts({name: tensor.to("meta") for name, tensor in tensors.items()}, values)

    def takes(self, side: int) -> bool:
        """Check whether a denoiser takes square samples with a small side; paddings do not check their shapes alone."""
        own = self._inputs[0].example.shape[2:]

        def resize(example: Tensor) -> Tensor:
            return example[..., :1, :1].repeat(1, 1, side, side) if example.shape[2:] == own else example

        return self._predicts({}, tuple(resize(item.example) for item in self._inputs))

    def problem(self) -> Exception | None:
        """Return the error of a denoiser that runs neither its examples nor those of its trained size."""
        problem = None
        for inputs in forms(self._inputs):
            try:
                self._predict({}, tuple(item.example for item in inputs))
            except Exception as error:  # any model may fail in any way
                problem = error
            else:
                return None
        return problem

    def _predicts(self, tensors: Mapping[str, Tensor], values: tuple[Tensor, ...]) -> bool:
        """Check whether a prediction has the height and width of its sample."""
        try:
            prediction = self._predict(tensors, values)
        except Exception:  # any model may refuse a size in any way
            return False
        return prediction.shape[2:] == values[0].shape[2:]

    def _predict(self, tensors: Mapping[str, Tensor], values: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            prediction: Tensor = torch.func.functional_call(self._denoiser, dict(tensors), values)
        return prediction


def _controlnet_examples(model: Any, sample: Input, generator: torch.Generator) -> list[Input]:
    """Make the ControlNet inputs, in sizes that match the sample."""

    def draw(like: Tensor, one: ControlNetInput) -> Tensor:
        batch, _, height, width = like.shape
        return torch.randn(one.shape(batch, height, width), generator=generator)

    return [
        Input(
            name=one.name,
            example=draw(sample.example, one),
            dynamic=(2, 3),
            native=None if sample.native is None else draw(sample.native, one),
        )
        for one in controlnet_inputs(model.config)
    ]


def _refuse_patches(model: nn.Module, name: str) -> None:
    """Refuse patches that change a model from outside: a capture would lose some or all of them."""
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"{name} has hooks on {path or 'itself'}: remove them (offloading, caches) before capture."
            )
        if hasattr(module, "base_layer"):
            raise ModelError(f"{name} has an adapter (LoRA) on {path}: fuse and unload it before capture.")
        if any(getattr(module, key, None) is not None for key in ("s1", "s2", "b1", "b2")):
            raise ModelError(f"{name} has FreeU switched on ({path}): call disable_freeu() before capture.")
