"""LoRA files: the layers that they change, read from headers alone.

Everything about names and shapes is checked here, when a model is opened. No tensor is read.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

from unetc.errors import ModelError

from .folder import refuse_pointer
from .lora import SUFFIX, Lora
from .lora_names import PARTS, TEXT_ENCODERS, Role, TensorName, foreign_method, is_embedding, spellings, take_apart

Shape = tuple[int, ...]

_HEADER = "lora_adapter_metadata"
"""Header field of diffusers with peft's configuration: JSON whose keys begin with the part of the pipeline."""

_KNOWN_STARTS = ("gaussian", "eva", "orthogonal")
"""Initial values in peft that leave the weights of the model unchanged."""

_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of peft that change more than the product of two factors."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in old models, which diffusers renames when it loads them."""

_INSTEAD = "Merge it into the model with the tool that trained it, and pass the merged model."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """The change of one layer, as tensor names of a LoRA file."""

    layer: str
    """Path of the layer within its part."""
    down: str
    up: str
    rank: int
    mid: str | None = None
    alpha: str | float | None = None
    """Name of a tensor with one number, or the number itself; None means the rank."""
    root: bool = False
    """Whether alpha is divided by the square root of the rank in place of the rank (rsLoRA)."""
    bias: str | None = None
    magnitude: str | None = None
    """Norms of the changed weight, for a DoRA."""
    magnitude_axis: int = 0
    """Axis of the weight along which there is one norm each: 0 for outputs, 1 for inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Configuration:
    """Settings of peft for one part."""

    alpha: float
    patterns: Mapping[str, float]
    root: bool
    dora: bool

    def alpha_of(self, path: str) -> float:
        """Look up the alpha of a layer; the first matching pattern counts, as in peft."""
        names = path, f"text_model.{path}"  # a level that depends on the release of transformers
        for pattern, alpha in self.patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return alpha
        return self.alpha


class LoraFile:
    """A LoRA file whose tensor names are known."""

    def __init__(self, lora: Lora) -> None:
        """Read the header of the file.

        Raises:
            ModelError: If the file cannot be read, or holds anything but a LoRA.
        """
        self.lora = lora
        with opened(lora, "numpy") as file:
            self.shapes: dict[str, Shape] = {}
            kinds = {}
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                self.shapes[name], kinds[name] = tuple(view.get_shape()), str(view.get_dtype())
            self._metadata = dict(file.metadata() or {})
        self.embeddings = [name for name in self.shapes if is_embedding(name)]
        names = [name for name in self.shapes if name not in set(self.embeddings)]
        self._check_method(names)
        self.names = [own for name in names if (own := take_apart(name))]
        for own in self.names:
            if own.role is not Role.ALPHA and not kinds[own.full].startswith(("F", "BF")):
                raise ModelError(
                    f"LoRA {lora.path} holds {own.full!r} as {kinds[own.full]}. Expected floating-point numbers. "
                    "Get the file in float16 or float32."
                )
        self._configurations = self._read_configurations()

    def _check_method(self, names: Sequence[str]) -> None:
        path = self.lora.path
        methods = defaultdict(list)
        for name in names:
            if method := foreign_method(name):
                methods[method].append(name)
        if methods:
            found = "; ".join(f"{method} ({some(own)})" for method, own in methods.items())
            raise ModelError(f"{path} holds another method than LoRA or DoRA: {found}. {_INSTEAD}")
        if not names and self.embeddings:
            raise ModelError(
                f"{path} is not a LoRA: it holds an embedding (textual inversion), {some(self.embeddings)}. "
                "An embedding belongs to a tokenizer; save it into the pipeline folder with diffusers."
            )
        if not names:
            raise ModelError(f"{path} is not a LoRA: it holds no tensors. Expected the factors of at least one layer.")
        if strangers := [name for name in names if take_apart(name) is None]:
            if len(strangers) < len(names):
                raise ModelError(
                    f"LoRA {path} also holds {some(strangers)}, which is no factor of a layer. Only plain LoRAs, "
                    f"rsLoRAs and DoRAs are supported. {_INSTEAD}"
                )
            raise ModelError(
                f"{path} is not a LoRA: it holds {some(strangers)}. Expected pairs like lora_down and lora_up, or "
                "lora_A and lora_B. Check the file."
            )

    def check(self, parts: Mapping[str, Mapping[str, Shape] | None]) -> None:
        """Check that the file fits a pipeline, and warn of bundled embeddings.

        Args:
            parts: Shapes of the stored tensors of each part of the pipeline, by name; None where they are not known.

        Raises:
            ModelError: If the file has tensors for a part that is not given, or a part has no place for them.
        """
        path = self.lora.path
        if strangers := [own.full for own in self.names if own.part not in parts]:
            raise ModelError(
                f"LoRA {path} does not fit: this pipeline has no place for {some(strangers)}. It has the parts "
                f"{', '.join(parts)}. Check that the LoRA was made for this model."
            )
        if all(part in parts for part in TEXT_ENCODERS) and (
            unclear := [own.full for own in self.names if own.bare and own.part in TEXT_ENCODERS]
        ):
            raise ModelError(
                f"LoRA {path} does not say which of two text encoders {some(unclear)} belong to. Expected names that "
                "begin with text_encoder. or text_encoder_2.; rename them."
            )
        for part, shapes in parts.items():
            if shapes is not None:
                self.changes(part, shapes)
        if self.embeddings:
            logger.warning(
                "%s bundles embeddings, which are left out: %s. The LoRA itself is used. The embeddings act only where "
                "a prompt has their trigger words.",
                path,
                some(self.embeddings),
            )

    def changes(self, part: str, shapes: Mapping[str, Shape]) -> list[LayerChange]:
        """List the changes of one part.

        Args:
            part: One of `PARTS`.
            shapes: Shapes of the part's tensors by name, [output, input, ...] for the weights of its layers.

        Raises:
            ModelError: If tensors belong to no layer, are incomplete, or do not fit the shape of their layer.
        """
        weights = dict(_weights(shapes))
        places = spellings(part, weights)
        found: dict[str, dict[Role, TensorName]] = defaultdict(dict)
        strangers = []
        for own in self.names:
            if own.part != part:
                continue
            if (path := places.get(own.layer)) is None:
                strangers.append(own.full)
            elif other := found[path].get(own.role):
                raise ModelError(
                    f"LoRA {self.lora.path} names the same tensor of {part}.{path} twice: {other.full!r} and "
                    f"{own.full!r}. Remove one of them."
                )
            else:
                found[path][own.role] = own
        if strangers:
            raise ModelError(
                f"LoRA {self.lora.path} does not fit: the {part} of this model has no place for {some(strangers)}. "
                "Check that the LoRA was made for this model."
            )
        return [
            self._change(part, path, {role: own.full for role, own in roles.items()}, weights[path], shapes)
            for path, roles in found.items()
        ]

    def _change(
        self, part: str, path: str, tensors: Mapping[Role, str], weight: Shape, shapes: Mapping[str, Shape]
    ) -> LayerChange:
        """Describe the change of a layer, after checking all its shapes."""
        where = f"{part}.{path}"
        if missing := [role for role in (Role.DOWN, Role.UP) if role not in tensors]:
            raise ModelError(
                f"LoRA {self.lora.path} has {some(list(tensors.values()))} but no {' and no '.join(missing)} factor "
                f"for {where}. The file is incomplete; get it again."
            )
        down, up = tensors[Role.DOWN], tensors[Role.UP]
        rank = self.shapes[down][0] if self.shapes[down] else 0
        expected = _expected(rank, weight, Role.MID in tensors)
        got = {role: self.shapes[tensors[role]] for role in expected}
        if rank < 1 or any(_core(got[role]) != _core(expected[role]) for role in expected):
            raise ModelError(
                f"LoRA {self.lora.path} was made for another model: its factors for {where} have the shapes "
                f"{' and '.join(str([*shape]) for shape in got.values())}, but the layer has {[*weight]}."
            )
        alpha = tensors.get(Role.ALPHA)
        if alpha and math.prod(self.shapes[alpha]) != 1:
            self._refuse_shape(alpha, "one number")
        bias = tensors.get(Role.BIAS)
        if bias and f"{path}.bias" not in shapes:
            raise ModelError(
                f"LoRA {self.lora.path} does not fit: {bias!r} changes a bias, but {where} has none. "
                "Check that the LoRA was made for this model."
            )
        if bias and self.shapes[bias] != weight[:1]:
            self._refuse_shape(bias, f"[{weight[0]}]")
        magnitude, axis = self._magnitude(tensors, weight)
        if magnitude and bias:
            raise ModelError(
                f"LoRA {self.lora.path} has norms and a bias for {where}: {magnitude!r} and {bias!r}. A DoRA with a "
                f"bias is not supported. {_INSTEAD}"
            )
        settings = self._configurations.get(part)
        if settings and settings.dora and not magnitude:
            raise ModelError(
                f"LoRA {self.lora.path} is a DoRA according to its header, but has no "
                f"lora_magnitude_vector for {where}. The file is incomplete; get it again."
            )
        if settings and alpha:
            raise ModelError(
                f"LoRA {self.lora.path} has two alphas for {where}: {alpha!r} and one in its header. "
                "Remove one of them."
            )
        return LayerChange(
            layer=path,
            down=down,
            up=up,
            mid=tensors.get(Role.MID),
            rank=rank,
            alpha=settings.alpha_of(path) if settings else alpha,
            root=bool(settings and settings.root),
            bias=bias,
            magnitude=magnitude,
            magnitude_axis=axis,
        )

    def _magnitude(self, tensors: Mapping[Role, str], weight: Shape) -> tuple[str | None, int]:
        """Find the norms of a DoRA, and the axis that they belong to."""
        outputs, inputs = weight[:2]
        if Role.MAGNITUDE in tensors and Role.DORA_SCALE in tensors:
            raise ModelError(
                f"LoRA {self.lora.path} has the norms of one layer twice: {tensors[Role.MAGNITUDE]!r} and "
                f"{tensors[Role.DORA_SCALE]!r}. Remove one of them."
            )
        if name := tensors.get(Role.MAGNITUDE):
            if max(self.shapes[name], default=0) != outputs or math.prod(self.shapes[name]) != outputs:
                self._refuse_shape(name, f"[{outputs}], a norm for each output")
            return name, 0
        if name := tensors.get(Role.DORA_SCALE):
            core = _core(self.shapes[name])
            if core == (outputs, 1):
                return name, 0
            if core == (1, inputs):
                return name, 1
            self._refuse_shape(name, f"[{outputs}, 1] or [1, {inputs}], a norm for each output or each input")
        return None, 0

    def _refuse_shape(self, name: str, expected: str) -> None:
        raise ModelError(
            f"LoRA {self.lora.path} has {name!r} of shape {[*self.shapes[name]]}. Expected {expected}. "
            "Check that the LoRA was made for this model."
        )

    def _read_configurations(self) -> dict[str, _Configuration]:
        """Read peft's configuration of each part: from the header, or from the file that peft saves separately."""
        where, text = "its header", self._metadata.get(_HEADER)
        if text is None and self.lora.configuration is not None:
            where = str(self.lora.configuration)
            try:
                text = self.lora.configuration.read_text()
            except (OSError, ValueError) as error:
                raise ModelError(f"cannot read {where}: {error}. Expected the configuration of peft.") from error
        if text is None:
            return {}
        try:
            settings = json.loads(text)
            if not isinstance(settings, dict):
                raise TypeError("not a JSON object")  # noqa: TRY301
            if where != "its header":  # it has no prefixes and is for the only part
                parts = {own.part for own in self.names if own.part}
                return {part: _configuration(settings) for part in parts}
            found = {}
            for part in PARTS:
                prefix = f"{part}."
                if own := {key.removeprefix(prefix): v for key, v in settings.items() if key.startswith(prefix)}:
                    found[part] = _configuration(own)
        except (ValueError, TypeError, KeyError, RecursionError, re.error) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
            raise ModelError(
                f"cannot read the strengths of LoRA {self.lora.path} in {where}: {reason}. Expected the configuration "
                "of peft, with lora_alpha. Get the file again."
            ) from error
        except _OtherKindError as error:
            raise ModelError(
                f"LoRA {self.lora.path} is of another kind: {where} sets {error}. Only plain LoRAs, rsLoRAs and DoRAs "
                f"are supported. {_INSTEAD}"
            ) from error
        return found


class _OtherKindError(Exception):
    """A configuration of peft describes more than a LoRA or DoRA."""


def _configuration(settings: Mapping[str, Any]) -> _Configuration:
    kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights", True)
    if kind != "LORA":
        raise _OtherKindError(f"peft_type {kind!r}")
    if isinstance(start, str) and start not in _KNOWN_STARTS:
        raise _OtherKindError(f"init_lora_weights {start!r}, which changes the model itself")
    if other := next((key for key in _OTHER_KINDS if settings.get(key)), None):
        raise _OtherKindError(f"{other} {str(settings[other])[:60]!r}")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TypeError("alpha_pattern is not a JSON object")
    for pattern in patterns:
        re.compile(rf"(.*\.)?({pattern})$")
    return _Configuration(
        alpha=_number(settings["lora_alpha"]),
        patterns={pattern: _number(alpha) for pattern, alpha in patterns.items()},
        root=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"an alpha is {value!r}, not a finite number")
    return float(value)


def _weights(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Yield path and weight shape of all linear and convolution layers."""
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        embedding = path.endswith(("token_embedding", "position_embedding", "class_embedding"))
        if path != name and len(shape) in (2, 4) and not embedding:
            yield path, shape


def _expected(rank: int, weight: Shape, mid: bool) -> dict[Role, Shape]:
    outputs, inputs, *kernel = weight
    if mid:
        return {Role.DOWN: (rank, inputs), Role.MID: (rank, rank, *kernel), Role.UP: (outputs, rank)}
    return {Role.DOWN: (rank, inputs, *kernel), Role.UP: (outputs, rank)}


def _core(shape: Shape) -> Shape:
    """Drop the kernel of 1x1 convolutions, which are linear layers; trainers save either form."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@contextmanager
def opened(lora: Lora, framework: str) -> Iterator[Any]:
    """Open the file of a LoRA.

    Args:
        lora: The LoRA.
        framework: Library of its tensors, for safetensors.

    Raises:
        ModelError: If the file cannot be read.
    """
    refuse_pointer(lora.path)
    try:
        with safe_open(lora.path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read LoRA {lora.path}: {error}. Expected a complete {SUFFIX} file.") from error


def check_loras(loras: Sequence[Lora], parts: Mapping[str, Mapping[str, Shape]]) -> None:
    """Check from headers that LoRAs fit a pipeline.

    Args:
        loras: LoRAs to fuse.
        parts: Shapes of the stored tensors of each part of the pipeline, by name.

    Raises:
        ModelError: If a LoRA cannot be read, holds another method, or does not fit.
    """
    named = {part: {_new_name(name): shape for name, shape in shapes.items()} for part, shapes in parts.items()}
    for lora in loras:
        LoraFile(lora).check(named)


def _new_name(name: str) -> str:
    """Return the name of a tensor in releases of diffusers that renamed the layers of attention."""
    return ".".join(_OLD_ATTENTION.get(level, level) for level in name.split("."))


def some(names: Sequence[str]) -> str:
    """Quote the first few names and count the rest."""
    rest = len(names) - 3
    return ", ".join(map(repr, names[:3])) + (f" and {rest} more" if rest > 0 else "")
