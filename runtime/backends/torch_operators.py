"""The ONNX operators of engines, in terms of torch.

Each is a function of the builder, the inputs and the attributes. An unsupported attribute or form is refused, never
ignored.

Source:
    https://onnx.ai/onnx/operators/, opset 23.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from onnx import TensorProto
from torch import Tensor, fx

from unetc.backend import GROUP_NORM

from .torch_values import Builder, Numbers, Unsupported, Value, are_numbers, each, size, tensor_of

Attributes = Mapping[str, Any]
Inputs = Sequence[Value | None]
Operator = Callable[[Builder, Inputs, Attributes], Any]

_TYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MEANS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _text(attributes: Attributes, name: str, default: str) -> str:
    value: bytes = attributes.get(name, default.encode())
    return value.decode()


def _require(attributes: Attributes, **allowed: object) -> None:
    """Refuse attributes with other values than the supported one, which is also the default."""
    for name, value in allowed.items():
        got = attributes.get(name, value)
        if (got.decode() if isinstance(got, bytes) else got) != value:
            raise Unsupported(f"{name} {got!r}")


def _unary(function: Callable[..., Any]) -> Operator:
    """Apply a function to a tensor."""
    return lambda build, inputs, attributes: build.emit(function, build.tensor(inputs[0]))


def _arithmetic(function: Callable[..., Any], of_numbers: Callable[..., Any] | None = None) -> Operator:
    """Apply a function to broadcast operands, or to the numbers of shapes one by one."""

    def apply(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
        if are_numbers(*inputs):
            return each(build, of_numbers or function, *inputs)
        if all(isinstance(value, Tensor) for value in inputs):
            return build.emit(function, *inputs)
        return build.emit(function, *(build.operand(value) for value in inputs))

    return apply


def _tensors(function: Callable[..., Any]) -> Operator:
    """Apply a function to two or more tensors, from the left."""

    def apply(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
        result, *others = (build.tensor(value) for value in inputs)
        for other in others:
            result = build.emit(function, result, other)
        return result

    return apply


def _quotient(dividend: Any, divisor: Any) -> Any:
    """Divide; quotients of integers are truncated."""
    is_whole = not any(
        isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
        for value in (dividend, divisor)
    )
    if not is_whole:
        return dividend / divisor
    if isinstance(dividend, Tensor) or isinstance(divisor, Tensor):
        return torch.div(dividend, divisor, rounding_mode="trunc")
    quotient = abs(dividend) // abs(divisor)
    return quotient if dividend * divisor >= 0 else -quotient


def _multiply(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    """Multiply; x * sigmoid(x) becomes one operator of torch."""
    for gate, value in (inputs, tuple(reversed(inputs))):
        if (
            isinstance(gate, fx.Node)
            and isinstance(value, fx.Node)
            and gate.target is torch.sigmoid
            and gate.args == (value,)
        ):
            return build.emit(F.silu, value)
    return _arithmetic(operator.mul)(build, inputs, attributes)


def _choose(condition: bool, one: float, other: float) -> float:
    return one if condition else other


def _where(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if are_numbers(*inputs):
        return each(build, _choose, *inputs)
    condition, one, other = inputs
    return build.emit(torch.where, build.tensor(condition), build.tensor(one), build.tensor(other))


def _cast(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if attributes["to"] not in _TYPES:
        raise Unsupported(f"type {attributes['to']}")
    dtype = _TYPES[attributes["to"]]
    (value,) = inputs
    if isinstance(value, Numbers) and dtype in (torch.int64, torch.int32, torch.float32):
        return each(build, float if dtype.is_floating_point else int, value)
    return build.emit("to", build.tensor(value), dtype)


def _clip(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    bounds = [None if value is None else build.operand(value) for value in (*inputs[1:], None, None)[:2]]
    return build.emit(torch.clamp, build.tensor(inputs[0]), *bounds)


def _constant(build: Builder, inputs: Inputs, attributes: Attributes) -> Tensor:
    ((name, value),) = attributes.items()
    if name == "value":
        return tensor_of(value).to(build.device)
    if name not in ("value_float", "value_floats", "value_int", "value_ints"):
        raise Unsupported(name)
    dtype = torch.float32 if "float" in name else torch.int64
    return torch.tensor(value, dtype=dtype, device=build.device)


def _shape(build: Builder, inputs: Inputs, attributes: Attributes) -> Numbers:
    """Return the shape as numbers, by default up to the last axis."""
    tensor = build.tensor(inputs[0])
    start, end = attributes.get("start", 0), attributes.get("end")
    if start < 0 or end is None or end < 0:
        start, end, _ = slice(start, end).indices(build.rank(tensor))
    return Numbers(tuple(build.emit(size, tensor, axis) for axis in range(start, end)))


def _reshape(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value, shape = inputs[0], build.numbers(inputs[1])
    if isinstance(value, Numbers):
        if len(shape) > 1:
            value = build.tensor(value)
        else:
            return Numbers(value.elements, scalar=not shape)
    tensor = build.tensor(value)
    if not attributes.get("allowzero", 0):
        shape = tuple(
            build.emit(size, tensor, axis) if isinstance(extent, int) and extent == 0 else extent
            for axis, extent in enumerate(shape)
        )
    return build.emit("reshape", tensor, shape)


def _flatten(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor, axis = build.tensor(inputs[0]), attributes.get("axis", 1)
    if axis == 0:
        return build.emit("reshape", tensor, (1, -1))
    if axis < 0:
        raise Unsupported(f"axis {axis}")
    first = build.emit(math.prod, [build.emit(size, tensor, i) for i in range(axis)])
    return build.emit("reshape", tensor, (first, -1))


def _expand(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return build.emit(_broadcast, build.tensor(inputs[0]), build.numbers(inputs[1]))


def _broadcast(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Expand where a size is 1 on either side."""
    rank = max(tensor.dim(), len(shape))
    own = (1,) * (rank - tensor.dim()) + tuple(tensor.shape)
    asked = (1,) * (rank - len(shape)) + tuple(shape)
    return tensor.expand(tuple(have if want == 1 else want for have, want in zip(own, asked, strict=True)))


def _tile(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return build.emit("repeat", build.tensor(inputs[0]), build.numbers(inputs[1]))


def _transpose(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor = build.tensor(inputs[0])
    order = attributes["perm"] if "perm" in attributes else range(build.rank(tensor))[::-1]
    return build.emit("permute", tensor, tuple(order))


def _unsqueeze(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value, axes = inputs[0], build.known(inputs[1])
    if isinstance(value, Numbers) and value.scalar and len(axes) == 1:
        return Numbers(value.elements)
    result = build.tensor(value)
    if len({axis < 0 for axis in axes}) > 1:
        last = build.rank(result) + len(axes)
        axes = [axis % last for axis in axes]
    for axis in sorted(axes, key=lambda axis: axis if axis >= 0 else -axis):
        result = build.emit(torch.unsqueeze, result, axis)
    return result


def _squeeze(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value = inputs[0]
    if isinstance(value, Numbers):
        return Numbers(value.elements, scalar=len(value.elements) == 1)
    axes = () if len(inputs) < 2 or inputs[1] is None else (tuple(build.known(inputs[1])),)
    return build.emit(torch.squeeze, build.tensor(value), *axes)


def _concat(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if are_numbers(*inputs):
        return Numbers(tuple(element for value in inputs for element in build.numbers(value)))
    return build.emit(torch.cat, [build.tensor(value) for value in inputs], attributes["axis"])


def _split(build: Builder, inputs: Inputs, attributes: Attributes) -> tuple[Any, ...]:
    tensor, axis = build.tensor(inputs[0]), attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        sizes = build.numbers(inputs[1])
        parts, count = build.emit(torch.split, tensor, list(sizes), axis), len(sizes)
    else:
        count = attributes["num_outputs"]
        parts = build.emit(torch.chunk, tensor, count, axis)
    return tuple(build.emit(operator.getitem, parts, i) for i in range(count))


def _slice(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value, starts, ends, axes, steps = (*inputs, None, None)[:5]
    first, last = build.numbers(starts), build.numbers(ends)
    along = range(len(first)) if axes is None else build.known(axes)
    strides = [1] * len(first) if steps is None else build.known(steps)
    if any(stride < 1 for stride in strides):
        raise Unsupported(f"steps {strides}")
    if isinstance(value, Numbers):
        (begin,), (end,), (stride,) = build.known(starts), build.known(ends), strides
        return Numbers(value.elements[begin:end:stride])
    result = build.tensor(value)
    for bounds in zip(along, first, last, strides, strict=True):
        result = build.emit(torch.ops.aten.slice.Tensor, result, *bounds)
    return result


def _gather(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value, index = inputs
    axis = attributes.get("axis", 0)
    if isinstance(value, Numbers):
        scalar = isinstance(index, Tensor) and index.dim() == 0
        return Numbers(tuple(value.elements[i] for i in build.known(index)), scalar=scalar)
    tensor = build.tensor(value)
    if (isinstance(index, Tensor) and index.dim() == 0) or (isinstance(index, Numbers) and index.scalar):
        return build.emit(torch.select, tensor, axis, build.numbers(index)[0])
    return build.emit(_pick, tensor, axis, build.tensor(index))


def _gather_nd(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    _require(attributes, batch_dims=0)
    return build.emit(_pick_nd, build.tensor(inputs[0]), build.tensor(inputs[1]))


def _pick_nd(tensor: Tensor, index: Tensor) -> Tensor:
    """Select by an index of the first axes, which is in the last axis of `index`."""
    return tensor[index.unbind(-1)]


def _arg_max(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    _require(attributes, select_last_index=0)
    keepdim = bool(attributes.get("keepdims", 1))
    return build.emit(_first_largest, build.tensor(inputs[0]), attributes.get("axis", 0), keepdim)


def _first_largest(tensor: Tensor, axis: int, keepdim: bool) -> Tensor:
    """Find the first of the largest elements along an axis; torch does not say which one it finds."""
    largest = tensor == tensor.amax(axis, keepdim=True)
    size = tensor.shape[axis]
    shape = [-1 if own == axis % tensor.dim() else 1 for own in range(tensor.dim())]
    places = torch.arange(size, device=tensor.device).view(shape)
    return torch.where(largest, places, size).amin(axis, keepdim=keepdim)


def _pick(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Select along an axis; a negative index counts from the end."""
    axis %= tensor.dim()
    index = torch.where(index < 0, index + tensor.shape[axis], index)
    picked = tensor.index_select(axis, index.flatten())
    return picked.reshape(*tensor.shape[:axis], *index.shape, *tensor.shape[axis + 1 :])


def _range(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return build.emit(torch.arange, *(build.numbers(value)[0] for value in inputs), device=build.device)


def _constant_of_shape(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value = tensor_of(attributes["value"]) if attributes else torch.zeros(1)
    shape = build.numbers(inputs[0])
    return build.emit(torch.full, shape, value.item(), dtype=value.dtype, device=build.device)


def _pad(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor, pads, fill, axes = (*inputs, None, None)[:4]
    mode = _text(attributes, "mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise Unsupported(f"mode {mode!r}")
    extents = build.numbers(pads)
    half = len(extents) // 2
    along = tuple(range(half)) if axes is None else tuple(build.known(axes))
    value = 0.0 if fill is None else build.numbers(fill)[0]
    return build.emit(_padded, build.tensor(tensor), along, extents[:half], extents[half:], mode, value)


def _padded(
    tensor: Tensor, axes: Sequence[int], begins: Sequence[int], ends: Sequence[int], mode: str, value: float
) -> Tensor:
    both = {axis % tensor.dim(): pair for axis, pair in zip(axes, zip(begins, ends, strict=True), strict=True)}
    first = min([tensor.dim() - 1, *[axis for axis, pair in both.items() if pair != (0, 0)]])
    pads = [extent for axis in reversed(range(first, tensor.dim())) for extent in both.get(axis, (0, 0))]
    if mode == "constant":
        return F.pad(tensor, pads, value=value)
    return F.pad(tensor, pads, mode="replicate" if mode == "edge" else mode)


def _reduce(function: Callable[..., Any]) -> Operator:
    def apply(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
        keepdims = bool(attributes.get("keepdims", 1))
        tensor = build.tensor(inputs[0])
        axes = () if len(inputs) < 2 or inputs[1] is None else tuple(build.known(inputs[1]))
        if not axes:
            if attributes.get("noop_with_empty_axes", 0):
                return tensor
            axes = tuple(range(build.rank(tensor)))
        return build.emit(function, tensor, axes, keepdim=keepdims)

    return apply


def _softmax(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return build.emit(torch.softmax, build.tensor(inputs[0]), attributes.get("axis", -1))


def _gelu(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return build.emit(F.gelu, build.tensor(inputs[0]), approximate=_text(attributes, "approximate", "none"))


def _gemm(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    _require(attributes, alpha=1.0, beta=1.0)
    left, right = (build.tensor(value) for value in inputs[:2])
    if attributes.get("transA", 0):
        left = build.emit(torch.t, left)
    if not attributes.get("transB", 0):
        right = build.emit(torch.t, right)
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is None or (isinstance(bias, Tensor) and bias.dim() == 1):
        return build.emit(F.linear, left, right, bias)
    return build.emit(operator.add, build.emit(F.linear, left, right), build.tensor(bias))


def _conv(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    _require(attributes, auto_pad="NOTSET")
    image, weight, bias = (None if value is None else build.tensor(value) for value in (*inputs, None)[:3])
    axes = len(attributes["kernel_shape"]) if "kernel_shape" in attributes else build.rank(inputs[1]) - 2  # type: ignore[arg-type]
    pads = list(attributes.get("pads", [0] * 2 * axes))
    begins, ends = pads[:axes], pads[axes:]
    if begins != ends:
        around = [extent for pair in zip(reversed(begins), reversed(ends), strict=True) for extent in pair]
        image, begins = build.emit(F.pad, image, around), [0] * axes
    return build.emit(
        _CONVOLUTIONS[axes],
        image,
        weight,
        bias,
        stride=tuple(attributes.get("strides", [1] * axes)),
        padding=tuple(begins),
        dilation=tuple(attributes.get("dilations", [1] * axes)),
        groups=attributes.get("group", 1),
    )


def _average_pool(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    _require(attributes, auto_pad="NOTSET", ceil_mode=0)
    axes = len(attributes["kernel_shape"])
    pads = list(attributes.get("pads", [0] * 2 * axes))
    if pads[:axes] != pads[axes:] or any(extent != 1 for extent in attributes.get("dilations", ())):
        raise Unsupported("uneven pads or dilations")
    return build.emit(
        _MEANS[axes],
        build.tensor(inputs[0]),
        tuple(attributes["kernel_shape"]),
        stride=tuple(attributes.get("strides", [1] * axes)),
        padding=tuple(pads[:axes]),
        count_include_pad=bool(attributes.get("count_include_pad", 0)),
    )


def _group_normalization(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor, scale, bias = (build.tensor(value) for value in inputs)
    return build.emit(F.group_norm, tensor, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _layer_normalization(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor, scale = (build.tensor(value) for value in inputs[:2])
    bias = build.tensor(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else None
    shape = _normalised(build, inputs, attributes)
    if isinstance(bias, Tensor) and tuple(bias.shape) != shape:
        raise Unsupported(f"a bias of shape {list(bias.shape)} beside a scale of shape {list(shape)}")
    return build.emit(F.layer_norm, tensor, shape, scale, bias, attributes.get("epsilon", 1e-5))


def _rms_normalization(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor, scale = (build.tensor(value) for value in inputs)
    shape = _normalised(build, inputs, attributes)
    return build.emit(F.rms_norm, tensor, shape, scale, attributes.get("epsilon", 1e-5))


def _normalised(build: Builder, inputs: Inputs, attributes: Attributes) -> tuple[int, ...]:
    """Read the normalised shape from the scale, which has the same shape unless it is broadcast."""
    _require(attributes, stash_type=1)
    tensor, scale = inputs[:2]
    if tensor is None or not isinstance(scale, Tensor):
        raise Unsupported("a scale that is not known")
    axis = attributes.get("axis", -1)
    axes = -axis if axis < 0 else build.rank(tensor) - axis
    if scale.dim() != axes or 1 in scale.shape:
        raise Unsupported(f"axis {axis} and a scale of shape {list(scale.shape)}")
    return tuple(scale.shape)


def _attention(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    _require(attributes, softcap=0.0, qk_matmul_output_mode=0)
    if "q_num_heads" in attributes or any(value is not None for value in inputs[4:]):
        raise Unsupported("three axes, or keys of the past")
    query, key, value = (build.tensor(value) for value in inputs[:3])
    mask = build.tensor(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else None
    return build.emit(_attended, query, key, value, mask, bool(attributes.get("is_causal", 0)), attributes.get("scale"))


def _attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Attend; where there are fewer heads of keys, each serves several heads of queries that follow each other."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _resize(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    """Enlarge by repetition, the only mode that torch and ONNX define alike at all sizes."""
    mode = [
        _text(attributes, *own)
        for own in (
            ("mode", "nearest"),
            ("coordinate_transformation_mode", "half_pixel"),
            ("nearest_mode", "round_prefer_floor"),
        )
    ]
    if mode != ["nearest", "asymmetric", "floor"]:
        raise Unsupported(f"mode {', '.join(mode)}")
    _require(attributes, antialias=0, keep_aspect_ratio_policy="stretch")
    tensor, _, scales, sizes = (*inputs, None, None)[:4]
    if "axes" in attributes:
        raise Unsupported("axes")
    if sizes is not None:
        return build.emit(F.interpolate, build.tensor(tensor), size=list(build.numbers(sizes)[2:]), mode="nearest")
    factors = build.known(scales)
    if factors[:2] != [1.0, 1.0]:
        raise Unsupported(f"scales {factors}")
    return build.emit(F.interpolate, build.tensor(tensor), scale_factor=factors[2:], mode="nearest")


def _einsum(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return build.emit(torch.einsum, _text(attributes, "equation", ""), *(build.tensor(value) for value in inputs))


def _identity(build: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return inputs[0]


OPERATORS: Mapping[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _arithmetic(operator.add),
    "And": _tensors(torch.logical_and),
    "ArgMax": _arg_max,
    "Attention": _attention,
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Cos": _unary(torch.cos),
    "Div": _arithmetic(_quotient),
    "Einsum": _einsum,
    "Equal": _arithmetic(operator.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _arithmetic(operator.gt),
    GROUP_NORM: _group_normalization,
    "GroupNormalization": _group_normalization,
    "Identity": _identity,
    "LayerNormalization": _layer_normalization,
    "Less": _arithmetic(operator.lt),
    "Log": _unary(torch.log),
    "MatMul": _tensors(torch.matmul),
    "Max": _tensors(torch.maximum),
    "Min": _tensors(torch.minimum),
    "Mish": _unary(F.mish),
    "Mul": _multiply,
    "Neg": _arithmetic(operator.neg),
    "Not": _unary(torch.logical_not),
    "Pad": _pad,
    "Pow": _arithmetic(operator.pow),
    "RMSNormalization": _rms_normalization,
    "Range": _range,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _unary(F.softplus),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _arithmetic(operator.sub),
    "Tanh": _unary(torch.tanh),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""Translations of all supported operators; any other operator is refused."""
