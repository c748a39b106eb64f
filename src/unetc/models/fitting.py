"""Check that the weights of a part fit its configuration, by the headers of their files alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from unetc.errors import ModelError, brief

from .folder import CONFIG, DIFFUSERS, Part
from .quiet import quiet


def check_part(name: str, part: Part) -> None:
    """Check the configuration and the headers of a part.

    Args:
        name: Name of the model, for messages.
        part: A part of a class of diffusers, or a text encoder of transformers.

    Raises:
        ModelError: If the configuration has an unknown key, no model can be made of it, or the weights are others.
    """
    with torch.device("meta"):
        model: Any = _diffusers_model(name, part) if part.stem == DIFFUSERS else _text_encoder(name, part)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = dict(part.weights.shapes)
    if part.stem == DIFFUSERS:
        if not part.weights.sharded:  # diffusers renames old attention layers in single files alone
            model._fix_state_dict_keys_on_load(shapes)
        strangers = expected.keys() ^ shapes.keys()
    else:
        # Releases of transformers differ in this level of CLIP, and files may hold the vision half and constants too.
        expected, shapes = (
            {key.removeprefix("text_model."): shape for key, shape in own.items()} for own in (expected, shapes)
        )
        strangers = expected.keys() - shapes.keys() - {"embeddings.position_ids"}
    what = f"cannot load the {part.name} of {name}: its weights do not fit its configuration"
    if strangers:
        raise ModelError(
            f"{what}. {min(strangers)!r} is in only one of them. "
            f"Check that {part.name}/{CONFIG} belongs to the weights."
        )
    if other := [key for key in expected if key in shapes and shapes[key] != expected[key]]:
        raise ModelError(
            f"{what} (size mismatch). {other[0]!r} has the shape {list(shapes[other[0]])}, and the configuration asks "
            f"for {list(expected[other[0]])}. Check that {part.name}/{CONFIG} belongs to the weights."
        )


def _diffusers_model(name: str, part: Part) -> Any:
    kind = getattr(diffusers, part.kind)
    known = inspect.signature(kind.__init__).parameters.keys() | {"block_out_channels"}
    if unknown := sorted(key for key in part.config if not key.startswith("_") and key not in known):
        raise ModelError(
            f"the {part.name} of {name} has the setting {unknown[0]!r}, which a {part.kind} of diffusers "
            f"{diffusers.__version__} does not know. Update diffusers, or remove it from {part.name}/{CONFIG} if it "
            "changes nothing."
        )
    return _made(name, part, lambda: kind.from_config(dict(part.config)))


def _text_encoder(name: str, part: Part) -> Any:
    import transformers

    for key in ("quantization_config", "transformers_weights"):
        if part.config.get(key) is not None:
            raise ModelError(
                f"the {part.name} of {name} has the setting {key!r}, which unetc does not support. Save the pipeline "
                "without it."
            )
    kind: Any = getattr(transformers, part.kind)

    def make() -> Any:
        config = kind.config_class.from_dict(_text_config(part.config))
        return kind(config)

    return _made(name, part, make)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text half of the configuration, which may hold a vision half too."""
    own = config.get("text_config")
    return dict(own if isinstance(own, dict) else config)


def _made(name: str, part: Part, make: Any) -> Any:
    try:
        with quiet(diffusers):
            return make()
    except Exception as error:  # diffusers and transformers raise many unrelated classes
        raise ModelError(
            f"cannot load the {part.name} of {name}: {brief(error)}. Check {part.name}/{CONFIG}."
        ) from error
