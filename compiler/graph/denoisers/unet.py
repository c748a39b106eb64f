"""Inputs and calls of the UNets of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unetc.artifacts.call_input import SAMPLE
from unetc.call import EXTRA_CHANNELS, POOLED, TIME_IDS, CallSignature
from unetc.controlnet import PREFIX

from .inputs import BATCH, Input, Signature, text, timestep, vector


def _multiples(model: Any) -> tuple[int, ...]:
    return tuple(2**halvings for halvings in range(len(model.config.block_out_channels)))


def _unet(model: Any, generator: torch.Generator, multiple: int, *, calls: CallSignature | None = None) -> list[Input]:
    """List the inputs of a UNet: the sample, the timestep, and the conditions of its calls, in this order."""
    calls = calls or CallSignature.of(type(model).__name__, _settings(model.config))
    both, time = _image(model, generator, multiple)
    sample, *extra = _split(both, calls)
    inputs = [sample, time]
    for item in calls.conditions:
        match item.axes:
            case (_, _, _):
                inputs += extra
            case (str(), width):
                inputs.append(text(item.name, int(width), generator))
            case (count,) if item.name == TIME_IDS:
                inputs.append(Input(name=item.name, example=torch.full((BATCH, int(count)), 64.0)))
            case (width,):
                inputs.append(vector(item.name, int(width), generator))
            case _ if item.classes is None:
                inputs.append(Input(name=item.name, example=torch.tensor([1.0, 2.0])))
            case _:
                inputs.append(Input(name=item.name, example=torch.tensor([0, item.classes.count - 1])))
    return inputs


def _settings(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else vars(config)


def _split(both: Input, calls: CallSignature) -> list[Input]:
    """Split an example with all channels into the sample and its extra channels, if there are any."""
    native = both.native
    assert native is not None
    parts = [(SAMPLE, slice(0, calls.channels))]
    if EXTRA_CHANNELS in calls.names:
        parts.append((EXTRA_CHANNELS, slice(calls.channels, None)))
    return [
        replace(both, name=name, example=both.example[:, part].contiguous(), native=native[:, part].contiguous())
        for name, part in parts
    ]


def _image(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    """Make a noisy sample whose height and width differ, and one timestep per sample.

    Each side is an odd multiple of the number at every level that is halved. A UNet of diffusers enlarges to the sizes
    of its skips if a side is odd, and to twice the size otherwise. Only the first is right at every size.
    """
    config = model.config
    size = config.sample_size or 32
    native_height, native_width = (size, size) if isinstance(size, int) else size
    stride = _multiples(model)[-1]
    height = -(-native_height // stride) * stride + (multiple if multiple < stride else 0)
    sample = torch.randn(BATCH, config.in_channels, height, height + stride, generator=generator)
    native = torch.randn(BATCH, config.in_channels, native_height, native_width, generator=generator)
    return [Input(name=SAMPLE, example=sample, dynamic=(2, 3), native=native), timestep()]


def _call_unet(model: Any, named: dict[str, Any]) -> Tensor:
    if (extra := named.pop(EXTRA_CHANNELS, None)) is not None:
        named[SAMPLE] = torch.cat([named[SAMPLE], extra], dim=1)
    added = {name: named.pop(name) for name in (POOLED, TIME_IDS) if name in named}
    if added:
        named["added_cond_kwargs"] = added
    if residuals := [named.pop(name) for name in tuple(named) if name.startswith(PREFIX)]:
        *named["down_block_additional_residuals"], named["mid_block_additional_residual"] = residuals
    output: Tensor = model(**named, return_dict=False)[0]
    return output


UNETS: Mapping[str, Signature] = {
    "UNet2DModel": Signature(multiples=_multiples, inputs=_unet, call=_call_unet),
    "UNet2DConditionModel": Signature(multiples=_multiples, inputs=_unet, call=_call_unet),
}
"""Supported classes of UNets by name."""
