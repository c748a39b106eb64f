"""Find the components of a denoiser from the structure of its graph.

A component is an edge where a branch joins the trunk. Diffusion denoisers have four kinds:

- residual: `add(trunk, branch)`. Either the branch was computed from the trunk, possibly before other branches joined
  it. Or both were computed from one tensor, and the trunk only by linear operations (a 1x1 shortcut, a resampling). The
  trunk of a text stream does not depend on the sample before the first branch joins;
- skip: `cat([trunk, skip])` of channels, where the trunk was computed from the skip;
- level: the trunk of such a `cat` if it has just come up from a lower resolution, or if no other `cat` came before. A
  sequence of tokens has no resolutions, so there the trunk of every `cat` is a level. Removing a level
  removes everything below it;
- step: the edge into the graph's output. Removing it removes the whole denoiser call.

Components are named after the modules that own the nodes, so no architecture needs special code here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import torch
from torch import fx

from unetc.artifacts.profile import STEP, Component

ATEN = torch.ops.aten
_UPSAMPLINGS = {
    ATEN.upsample_nearest2d.vec,
    ATEN.upsample_nearest2d.default,
    ATEN.upsample_bilinear2d.vec,
    ATEN.conv_transpose2d.input,
}
_LINEAR = {
    "conv2d",
    "convolution",
    "linear",
    "addmm",
    "avg_pool2d",
    "upsample_nearest2d",
    "conv_transpose2d",
    "view",
    "reshape",
    "permute",
    "transpose",
    "unsqueeze",
    "contiguous",
    "clone",
    "to",
    "pad",
    "dropout",
    "div",
    "mul",
    "gate",
    "neg",
    "unbind",
    "getitem",
    "stack",
    "flatten",
}
"""Operations that a trunk may pass through between the common ancestor and the join."""

_NAME_DEPTHS = (1, 2)
"""Module levels below its owner that name a join: `attn`, or `attn.to_out` if another join is also called `attn`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A component and the edge its gate belongs on."""

    component: Component
    join: fx.Node
    branch: fx.Node


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edge:
    kind: Literal["residual", "skip", "level", "step"]
    join: fx.Node
    branch: fx.Node
    name: str
    axis: int


def discover(graph: fx.Graph, sample: fx.Node, root: str) -> tuple[Site, ...]:
    """Find every component of a graph, in the order it is computed.

    Args:
        graph: A graph from `torch.export`, with shapes in `meta["val"]`.
        sample: The placeholder of the noisy sample; only values that depend on it can be components.
        root: Path of the denoiser in `nn_module_stack`; left out of the names.
    """
    flow = _Dataflow(graph, sample, root)
    edges = [edge for node in graph.nodes for edge in flow.edges_into(node)]
    names = [edge.name for edge in edges]
    for depth in _NAME_DEPTHS:
        shared = Counter(names)
        names = [
            flow.name_by_branch(edge, depth) if shared[name] > 1 else name
            for edge, name in zip(edges, names, strict=True)
        ]
    taken = Counter({STEP: 1})  # a module with this name needs another one
    sites: list[Site] = []
    offset = 0
    for edge, name in zip(edges, names, strict=True):
        if edge.kind != "step":
            taken[name] += 1
        channels = int(edge.branch.meta["val"].shape[edge.axis])
        component = Component(
            name=name if taken[name] == 1 else f"{name}#{taken[name]}",
            kind=edge.kind,
            owner=flow.owner(edge.join),
            index=len(sites),
            channels=channels,
            axis=edge.axis,
            offset=offset,
            nested=(),
        )
        offset += channels
        sites.append(Site(component=component, join=edge.join, branch=edge.branch))
    return tuple(flow.with_nested(site, sites) for site in sites)


class _Dataflow:
    """Ancestor sets of a graph as bit masks over node positions, with queries on them."""

    def __init__(self, graph: fx.Graph, sample: fx.Node, root: str) -> None:
        self._nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._prefix = f"{root}."
        self._ancestors: dict[fx.Node, int] = {}
        self._trunks: dict[fx.Node, fx.Node] = {}
        self._sampled = 0
        for i, node in enumerate(self._nodes):
            mask = parents = 0
            for parent in node.all_input_nodes:
                parents |= 1 << self._position[parent]
                mask |= self._ancestors[parent]
            self._ancestors[node] = mask | parents
            is_size = isinstance(node.meta.get("val"), (int, torch.SymInt))
            if node is sample or (parents & self._sampled and not is_size):
                self._sampled |= 1 << i

    def owner(self, node: fx.Node) -> str:
        """Name the innermost module that computes a node, relative to the denoiser."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]).removeprefix(self._prefix) if stack else ""

    def edges_into(self, node: fx.Node) -> Iterator[_Edge]:
        """Yield the gated edges of one join; a node that is not a join has none."""
        if node.target is ATEN.add.Tensor and len(node.args) == 2:
            branch = self._residual_branch(node, *node.args)  # type: ignore[arg-type]
            if branch is not None:
                (self._trunks[node],) = (side for side in node.all_input_nodes if side is not branch)
                axis = _channel_axis(branch)
                yield _Edge(kind="residual", join=node, branch=branch, name=self.owner(node), axis=axis)
        elif node.op == "output":
            prediction = node.all_input_nodes[0]
            if self._depends_on_sample(prediction):
                yield _Edge(kind="step", join=node, branch=prediction, name=STEP, axis=1)
        elif parts := self._skip_join(node):
            trunk, skip, axis = parts
            if below := self._end_of_level(_computed(trunk)):
                yield _Edge(kind="level", join=node, branch=trunk, name=f"level:{self.owner(below)}", axis=axis)
            source = self.owner(_computed(self._without_additions(skip)))
            consumer = next((owner for user in node.users if (owner := self.owner(user))), self.owner(node))
            target = consumer.rpartition(".")[0] or consumer
            yield _Edge(kind="skip", join=node, branch=skip, name=f"skip:{source}→{target}", axis=axis)

    def with_nested(self, site: Site, sites: list[Site]) -> Site:
        """Record which components are computed only for this component's branch."""
        live = self._live_without(site)
        nested = tuple(other.component.name for other in sites if other is not site and other.join not in live)
        return replace(site, component=msgspec.structs.replace(site.component, nested=nested))

    def _live_without(self, site: Site) -> set[fx.Node]:
        """Collect the nodes that the output still needs when the edge branch → join is cut."""
        pending = [node for node in self._nodes if node.op == "output"]
        live: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in live:
                live.add(node)
                cut = site.branch if node is site.join else None
                pending.extend(parent for parent in node.all_input_nodes if parent is not cut)
        return live

    def name_by_branch(self, edge: _Edge, depth: int) -> str:
        """Name one of a module's joins after the submodule, `depth` levels below, that computes its branch."""
        owner, node = self.owner(edge.join), edge.branch
        while True:
            inner = self.owner(node)
            if inner.startswith(f"{owner}."):
                below = inner.removeprefix(f"{owner}.").split(".")
                return ".".join((owner, *below[:depth]))
            parents = [parent for parent in node.all_input_nodes if self._depends_on_sample(parent)]
            if inner != owner or not parents:
                return edge.name
            node = parents[0]

    def _depends_on_sample(self, node: object) -> bool:
        return isinstance(node, fx.Node) and bool(self._sampled >> self._position[node] & 1)

    def _before(self, earlier: fx.Node, later: fx.Node) -> bool:
        return bool(self._ancestors[later] >> self._position[earlier] & 1)

    def _residual_branch(self, join: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node | None:
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        shape = join.meta["val"].shape
        if len(shape) < 3 or left.meta["val"].shape != shape or right.meta["val"].shape != shape:
            return None
        for leads_to in (self._before, self._led_to):
            branches = [
                branch
                for trunk, branch in ((left, right), (right, left))
                if self._depends_on_sample(branch) and leads_to(trunk, branch)
            ]
            if len(branches) == 1:
                return branches[0]
        if not (self._depends_on_sample(left) and self._depends_on_sample(right)):
            return None
        linear = [side for side in (left, right) if self._linear_since_fork(side, left, right)]
        if len(linear) != 1:
            return None
        return right if linear[0] is left else left

    def _led_to(self, trunk: fx.Node, branch: fx.Node) -> bool:
        """Check whether a branch was computed from the trunk before other branches joined it."""
        earlier: fx.Node | None = trunk
        while earlier is not None and not self._before(earlier, branch):
            earlier = self._trunks.get(_computed(earlier))
        return earlier is not None

    def _linear_since_fork(self, side: fx.Node, left: fx.Node, right: fx.Node) -> bool:
        common = self._ancestors[left] & self._ancestors[right] & self._sampled
        between = (self._ancestors[side] | 1 << self._position[side]) & self._sampled & ~common
        return all(_operation(self._nodes[i]) in _LINEAR for i in _bits(between))

    def _skip_join(self, node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
        """Read a join `cat([trunk, skip])` as (trunk, skip, axis), with its parts in either order."""
        if node.target is not ATEN.cat.default or len(node.args) < 2:
            return None
        parts, axis = node.args[0], node.args[1]
        if not isinstance(parts, (list, tuple)) or not isinstance(axis, int) or len(parts) != 2:
            return None
        first, second = parts
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        if not self._depends_on_sample(first) or not self._depends_on_sample(second) or node.meta["val"].ndim < 3:
            return None
        axis %= node.meta["val"].ndim
        if axis != _channel_axis(node):
            return None
        if self._before(self._without_additions(second), first):
            return first, second, axis
        return (second, first, axis) if self._before(self._without_additions(first), second) else None

    def _without_additions(self, node: fx.Node) -> fx.Node:
        """Trace back past additions that do not depend on the sample, such as ControlNet inputs."""
        while node.target is ATEN.add.Tensor:
            sampled = [part for part in node.args if self._depends_on_sample(part)]
            if len(sampled) != 1 or not isinstance(sampled[0], fx.Node):
                break
            node = sampled[0]
        return node

    def _end_of_level(self, trunk: fx.Node) -> fx.Node | None:
        """Find the node that brought the trunk up since the last join, or that computed it if there was no join."""
        if trunk.meta["val"].ndim == 3:
            return trunk
        reach = self._ancestors[trunk] | 1 << self._position[trunk]
        for i in reversed(list(_bits(reach & self._sampled))):
            node: fx.Node = self._nodes[i]
            if node.target in _UPSAMPLINGS:
                return node
            if self._skip_join(node):
                return None
        return self._without_additions(trunk)


def _channel_axis(node: fx.Node) -> int:
    """Return the channel axis of an image [batch, channel, height, width] or a sequence [batch, token, channel]."""
    return 1 if node.meta["val"].ndim == 4 else 2


def _computed(node: fx.Node) -> fx.Node:
    """Find the node that computed a value, before any casts: a cast is recorded as part of the next module."""
    while _operation(node) == "to":
        node = node.all_input_nodes[0]
    return node


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _operation(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
