"""Everything that can be done to a UNet of diffusers besides calling it, and why a bundle refuses most of it."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from unetc.errors import SessionError

logger = logging.getLogger(__name__)

_KINDS = UNet2DConditionModel, UNet2DModel, ModelMixin

HARMLESS = frozenset(
    {
        "compile_repeated_blocks",
        "disable_freeu",
        "disable_gradient_checkpointing",
        "disable_lora",
        "disable_npu_flash_attention",
        "disable_xformers_memory_efficient_attention",
        "disable_xla_flash_attention",
        "enable_npu_flash_attention",
        "enable_xformers_memory_efficient_attention",
        "enable_xla_flash_attention",
        "fuse_qkv_projections",
        "reset_attention_backend",
        "set_attention_backend",
        "set_attention_slice",
        "set_default_attn_processor",
        "set_use_memory_efficient_attention_xformers",
        "set_use_npu_flash_attention",
        "set_use_xla_flash_attention",
        "unfuse_qkv_projections",
        "unload_lora",
    }
)
"""Methods that choose how the same numbers are computed, or undo a thing that a bundle never does; they do nothing."""

SAME_PROCESSORS = frozenset(
    {
        "AttnAddedKVProcessor",
        "AttnAddedKVProcessor2_0",
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnAddedKVProcessor",
        "SlicedAttnProcessor",
        "XFormersAttnAddedKVProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)
"""Attention processors that compute the same attention in another way."""

CHANGE_LAYERS = frozenset(
    {"add_module", "apply", "load_state_dict", "register_module", "register_parameter", "state_dict"}
)
"""Methods of torch that would change or show layers without an effect."""

LISTS_OF_LAYERS = frozenset(
    {"children", "modules", "named_children", "named_modules", "named_parameters", "parameters"}
)
"""Methods of torch that list layers and weights; libraries call them for every module."""

_LIBRARIES = frozenset({"accelerate", "diffusers", "peft", "torch", "transformers"})

_OFFLOADS = "accelerate.big_modeling"
"""Module that reads the weights of layers, to keep them elsewhere until their layer runs."""

_BUILD_LORA = "build the bundle with --lora FILE"
_ORIGINAL = "use the pipeline's original UNet"

_ADVICE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "add_adapter",
            "enable_adapters",
            "enable_lora",
            "enable_lora_hotswap",
            "fuse_lora",
            "load_attn_procs",
            "load_lora_adapter",
            "set_adapter",
            "set_adapters",
            "_load_ip_adapter_loras",
        ),
        _BUILD_LORA,
    ),
    "enable_freeu": f"{_ORIGINAL} for FreeU",
    "attn_processors": f"{_ORIGINAL} for perturbed attention (PAG) and other attention processors",
    "_load_ip_adapter_weights": f"{_ORIGINAL} for an IP-Adapter",
    "encoder_hid_proj": f"{_ORIGINAL} for an IP-Adapter",
    "dequantize": "choose a target that ends with :fp16 when you build the bundle",
    "enable_layerwise_casting": "choose a target that ends with :fp16 when you build the bundle",
    "enable_group_offload": 'load the bundle with memory="low"',
    "push_to_hub": "upload the folder of the bundle",
    "from_single_file": "use unetc.diffusers.load(folder)",
    "from_config": "use unetc.diffusers.load(folder)",
    "save_attn_procs": _BUILD_LORA,
    "save_lora_adapter": _BUILD_LORA,
    **dict.fromkeys(
        ("add_module", "apply", "register_module", "register_parameter"),
        "change the layers of the original UNet before you build the bundle",
    ),
    "load_state_dict": "build a bundle from the other weights",
    "state_dict": "read the weights file of the bundle",
}


class RefusedByBundle(SessionError, AttributeError):
    """A bundle cannot do this, though a UNet can; an `AttributeError`, so that `hasattr` is false."""


def refusal(name: str) -> RefusedByBundle:
    """Make the error for a method or attribute of a UNet that a bundle cannot have."""
    return RefusedByBundle(
        f"a bundle has no {name}: its layers are compiled into engines, so they cannot be read, changed or extended. "
        f"Instead, {_ADVICE.get(name, _ORIGINAL)}."
    )


def refusal_of_lookup(name: str) -> RefusedByBundle:
    """Make the error that `__getattr__` raises; a library that takes layers apart to save memory has its own."""
    if _caller(2) != _OFFLOADS:  # the caller of `__getattr__`
        return refusal(name)
    return RefusedByBundle(
        "a bundle cannot be offloaded layer by layer (enable_sequential_cpu_offload): its layers are compiled into "
        'engines. Instead, load it with unetc.diffusers.load(folder, memory="low"), and call '
        "pipe.enable_model_cpu_offload() for the other models."
    )


def _caller(calls: int) -> str:
    """Name the module that is a number of calls above the function that asks."""
    name: str = sys._getframe(calls + 1).f_globals.get("__name__", "")
    return name


def refused_names(kept: frozenset[str]) -> frozenset[str]:
    """List the public methods and properties of UNets in diffusers that a bundle has no use for.

    Args:
        kept: Names that work.
    """
    names = {name for kind in _KINDS for name in dir(kind)} - set(dir(nn.Module)) - kept - HARMLESS
    return frozenset(name for name in names if not name.startswith("_") and _acts(name))


def _acts(name: str) -> bool:
    """Check whether a name of a UNet is a method or a property, not a constant of the class."""
    values = [getattr(kind, name, None) for kind in _KINDS]
    return any(callable(value) or isinstance(value, property) for value in values)


class Refused:
    """A method or property that raises its refusal when it is looked up."""

    def __init__(self, name: str) -> None:
        """Refuse a name."""
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Refuse."""
        if instance is None:
            return self
        raise refusal(self._name)

    def __call__(self, *values: object, **options: object) -> Any:
        """Refuse, for methods of the class."""
        raise refusal(self._name)


def does_nothing(name: str) -> Callable[..., None]:
    """Make a method that accepts anything and does nothing."""

    def harmless(self: object, *values: object, **options: object) -> None:
        pass

    harmless.__name__ = name
    harmless.__doc__ = "Do nothing: engines choose by themselves how they compute."
    return harmless


def warns_of_no_layers(name: str) -> Callable[..., Any]:
    """Make a method that lists no layers and no weights, and warns once per drop-in if a user's code asks.

    `parameters` lists an empty parameter, which has the type and the device.

    Loops over layers, such as those that make a model's padding circular, would end without an effect and without an
    error.
    """
    original = getattr(ModelMixin, name)

    @functools.wraps(original)
    def listing(self: Any, *values: object, **options: object) -> Any:
        if _caller(1).partition(".")[0] not in _LIBRARIES and not self.__dict__.get("_warned_of_no_layers"):
            self.__dict__["_warned_of_no_layers"] = True
            logger.warning(
                "%s() of a bundle lists no layers and no weights: they are compiled into engines. Code that changes "
                "layers, such as their padding, or adds hooks to them has no effect. Change the original UNet before "
                "you build the bundle. Hooks on the drop-in itself work.",
                name,
            )
        return original(self, *values, **options)

    return listing
