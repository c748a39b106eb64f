"""Gated graphs can be stored, damaged ones are refused, and the means of branches can be observed."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from tests.models import ARCHITECTURES, Block, Tiny, daily, tiny_of, toy_denoiser
from unetc.artifacts.profile import STEP, Component
from unetc.backend import Array
from unetc.compiler.graph import gated as gated_module
from unetc.compiler.graph import weights as weights_module
from unetc.compiler.graph.capture import Capture, capture
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.gated import GatedGraph, open_or_build
from unetc.compiler.graph.specialise import specialise
from unetc.errors import ArtifactError, CompileError, SchemaVersionError
from unetc.tensors import load_tensors, tensor_ranges
from unetc.treatments import Treatment

FILES = ("gated.json", "gated.onnx", "weights.safetensors")


@pytest.fixture(scope="session", params=daily(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


@functools.cache
def toy_capture() -> Capture:
    """Capture a denoiser that exports in a second."""

    def compute(block: Any, sample: Tensor, timestep: Tensor) -> Any:
        return sample + block.conv(sample) * timestep[:, None, None, None]

    torch.manual_seed(0)
    return capture(toy_denoiser(Block(compute, conv=nn.Conv2d(4, 4, 3, padding=1))))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GatedGraph.build(toy_capture(), tmp_path_factory.mktemp("toy") / "graph").folder


@pytest.fixture
def folder(toy_folder: Path, tmp_path: Path) -> Path:
    """Copy the toy's graph into a separate folder."""
    return shutil.copytree(toy_folder, tmp_path / "cache" / "graph")


class CapturedAgain(Exception):
    """Raised if a graph is captured instead of loaded from its folder."""


def capture_again() -> Capture:
    raise CapturedAgain


def test_build_and_load_give_the_same_graph(tmp_path: Path) -> None:
    captured, folder = toy_capture(), tmp_path / "cache" / "graph"
    built = GatedGraph.build(captured, folder)
    loaded = GatedGraph.load(folder)
    for graph in (built, loaded):
        assert graph.components == captured.components
        assert (graph.inputs, graph.sizes) == (captured.inputs, captured.sizes)
        assert (graph.folder, graph.weights) == (folder, folder / "weights.safetensors")
        assert graph.channels == 8  # four in the residual, four in the step
    assert loaded.runnable() == built.runnable()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert list(folder.parent.iterdir()) == [folder]


def test_graph_that_is_there_is_not_captured_again(folder: Path) -> None:
    assert open_or_build(folder, capture_again).runnable() == GatedGraph.load(folder).runnable()


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [remove, empty, cut_in_half, flip_a_bit])
def test_damaged_folder_is_refused(folder: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(folder / file)
    with pytest.raises(ArtifactError):
        GatedGraph.load(folder)
    with pytest.raises(CapturedAgain):
        open_or_build(folder, capture_again)


def test_damaged_folder_is_built_again(folder: Path) -> None:
    whole = GatedGraph.load(folder).runnable()
    flip_a_bit(folder / "weights.safetensors")
    assert open_or_build(folder, toy_capture).runnable() == whole
    assert GatedGraph.load(folder).runnable() == whole


def test_folder_of_another_version_is_refused(folder: Path) -> None:
    record = json.loads((folder / "gated.json").read_bytes())
    (folder / "gated.json").write_text(json.dumps(record | {"schema": 99}))
    with pytest.raises(SchemaVersionError):
        GatedGraph.load(folder)
    with pytest.raises(CapturedAgain):
        open_or_build(folder, capture_again)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        GatedGraph.load(tmp_path / "missing")


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for module, function in ((weights_module, "write_tensors"), (gated_module, "write_atomically")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, interrupt)
            with pytest.raises(KeyboardInterrupt):
                GatedGraph.build(toy_capture(), tmp_path / "graph")
        assert not list(tmp_path.iterdir())


def test_interrupted_build_keeps_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    whole = GatedGraph.load(folder).runnable()
    monkeypatch.setattr(weights_module, "write_tensors", fill_the_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        GatedGraph.build(toy_capture(), folder)
    assert GatedGraph.load(folder).runnable() == whole
    assert list(folder.parent.iterdir()) == [folder]


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot write"):
        GatedGraph.build(toy_capture(), tmp_path / "file" / "graph")


def test_weights_file_holds_every_parameter_and_nothing_else(tiny: Tiny) -> None:
    assert tiny.gated.runnable().weights == tiny.weights.keys()
    large = [name for name, parameter in tiny.denoiser.named_parameters() if parameter.nbytes >= 64]
    assert sorted(tiny.parameters.values()) == sorted(large)


def test_external_data_lies_where_the_graph_says(tiny: Tiny) -> None:
    model = onnx.load(tiny.gated.folder / "gated.onnx", load_external_data=False)
    content = tiny.gated.weights.read_bytes()
    ranges = tensor_ranges(tiny.gated.weights)
    for tensor in model.graph.initializer:
        if tensor.external_data:
            place = {entry.key: entry.value for entry in tensor.external_data}
            begin, length = int(place["offset"]), int(place["length"])
            assert place["location"] == tiny.gated.weights.name
            assert ranges[tensor.name] == (begin, begin + length)
            assert content[begin : begin + length] == tiny.weights[tensor.name].tobytes()
            assert tuple(tensor.dims) == tiny.weights[tensor.name].shape


def branch_of(component: Component, inputs: dict[str, Tensor], outputs: dict[str, Tensor], model: nn.Module) -> Tensor:
    """Compute the branch of a component from the inputs and outputs of the original model's modules."""
    if component.kind == "step":
        return outputs[component.owner]
    if component.kind == "skip":
        return outputs[component.name.removeprefix("skip:").partition("→")[0]]
    if component.kind == "level":
        return outputs[component.name.removeprefix("level:").removesuffix(".upsample")]
    if component.owner != component.name:  # attn1, attn2 and ff do not contain the trunk
        return outputs[component.name]
    module: Any = model.get_submodule(component.name)
    trunk = inputs[component.name]
    for name in ("upsample", "downsample", "conv_shortcut"):
        if (layer := getattr(module, name, None)) is not None:
            trunk = layer(trunk)
    return outputs[component.name] - trunk


@torch.no_grad()
def expected_branch_means(tiny: Tiny, values: dict[str, Array]) -> Array:
    """Measure the branch means with hooks on the original model."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args:
                inputs[name] = args[0]
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in tiny.denoiser.named_modules()]
    try:
        tiny.run_denoiser(values)
    finally:
        for handle in handles:
            handle.remove()
    means = []
    for component in tiny.gated.components:
        branch = branch_of(component, inputs, outputs, tiny.denoiser)
        means.append(branch.mean([axis for axis in range(branch.ndim) if axis != component.axis]))
    return torch.cat(means).numpy()


def test_observing_gives_the_means_of_the_original_branches(tiny: Tiny) -> None:
    values = tiny.inputs(batch=3, height=16, width=8)
    expected = expected_branch_means(tiny, values)
    assert expected.shape == (tiny.gated.channels,)
    gates = np.stack([gate_values(tiny.gated.components, {})] * 3)
    output = np.full(tiny.gated.channels, np.nan, dtype=np.float32)
    tiny.load(tiny.gated.observing())({**values, GATES: gates, MEANS: np.ones_like(output)}, output)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)  # mean of about a hundred float32 numbers near 1


def test_observing_leaves_the_graph_unchanged(tiny: Tiny) -> None:
    before = tiny.gated.runnable()
    observing = tiny.gated.observing()
    assert observing == tiny.gated.observing()
    assert observing.weights == before.weights  # the mean of the step needs them all
    assert tiny.gated.runnable() == before


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4, 2, 5), 1), ((3, 2, 4), 2)], ids=["channels of images", "channels of tokens"]
)
def test_gate_scales_the_branch_and_adds_the_mean_per_sample(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    branch, gates, means = rng.standard_normal(shape), rng.standard_normal((3, 6, 2)), rng.standard_normal(9)
    actual = torch.ops.unetc.gate(*map(torch.from_numpy, (branch, gates, means)), 5, 3, axis).numpy()
    own = means[3:7].reshape([4 if i == axis else 1 for i in range(len(shape))])
    for sample in range(3):
        keep, mean = gates[sample, 5]
        np.testing.assert_allclose(actual[sample], (keep * branch[sample : sample + 1] + mean * own)[0], rtol=1e-12)


def test_gate_values_encode_treatments() -> None:
    components = toy_capture().components
    assert [component.name for component in components] == ["body", STEP]
    rows = {
        Treatment.KEEP: [1, 0],
        Treatment.DROP: [0, 0],
        Treatment.MEAN: [0, 1],
        Treatment.HOLD: [1, 0],
        Treatment.FORECAST: [1, 0],
        Treatment.HOLD_X0: [1, 0],
        Treatment.FORECAST_X0: [1, 0],
    }
    assert rows.keys() == set(Treatment)
    for treatment, row in rows.items():
        np.testing.assert_array_equal(gate_values(components, {"body": treatment}), [row, [1, 0]])
        np.testing.assert_array_equal(gate_values(components, {STEP: treatment}), [[1, 0], row])
    np.testing.assert_array_equal(gate_values(components, {}), [[1, 0], [1, 0]])
    assert gate_values([], {}).shape == (0, 2)


def test_unknown_component_cannot_be_specialised(folder: Path) -> None:
    with pytest.raises(CompileError, match="no component 'attention'"):
        specialise(GatedGraph.load(folder), {"attention": Treatment.DROP}, np.zeros(8, dtype=np.float32))


def test_export_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("unetc.compiler.graph.export.TRANSLATIONS", {})
    with pytest.raises(CompileError):
        GatedGraph.build(toy_capture(), tmp_path / "graph")
    assert not os.listdir(tmp_path)


def test_weights_of_the_toy_are_read_back(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    block = toy_capture().program.state_dict
    np.testing.assert_array_equal(weights["model.body.conv.weight"], block["model.body.conv.weight"].numpy())


def test_a_packed_graph_is_the_same_graph_without_its_folder(folder: Path) -> None:
    graph = GatedGraph.load(folder)
    packed = graph.pack()
    unpacked = packed.unpack()
    for form in (GatedGraph.runnable, GatedGraph.observing, GatedGraph.remembering):
        assert form(unpacked) == form(graph)
    means = np.zeros(graph.channels, dtype=np.float32)
    dropped = {graph.components[0].name: Treatment.DROP}
    assert specialise(unpacked, dropped, means) == specialise(graph, dropped, means)
    assert unpacked.read_weights() == graph.weights.read_bytes()
    assert unpacked.pack() == packed
    assert (unpacked.components, unpacked.inputs, unpacked.sizes) == (graph.components, graph.inputs, graph.sizes)
    ranges = tensor_ranges(graph.weights)
    sizes = {name: array.nbytes for name, array in load_tensors(packed.weights).items()}
    assert sizes == {name: end - begin for name, (begin, end) in ranges.items()}
