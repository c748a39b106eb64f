"""Tiny denoisers with random weights, one per kind of block, captured once per process, and matching inputs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.artifacts.call_input import SAMPLE
from unetc.backend import Array, Backend, Loader, Program, SerialisedGraph
from unetc.call import TIMESTEP
from unetc.compiler.graph.capture import Capture, capture
from unetc.compiler.graph.denoisers.denoiser import denoiser_of
from unetc.compiler.graph.denoisers.inputs import Input
from unetc.compiler.graph.gate import GATES, MEANS
from unetc.compiler.graph.gated import GatedGraph, open_or_build
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.treatments import Treatment

CONTEXT_WIDTH = 12

_UNCONDITIONAL: Mapping[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "block_out_channels": (8, 16),
}
_CONDITIONAL: Mapping[str, Any] = {**_UNCONDITIONAL, "cross_attention_dim": CONTEXT_WIDTH}
_TRANSFORMER: Mapping[str, Any] = {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 8}

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "attention": (
        "UNet2DModel",
        {
            **_UNCONDITIONAL,
            "in_channels": 2,
            "out_channels": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    # Its first downsampler and its first upsampler are residual blocks, the others are convolutions.
    "resampling": (
        "UNet2DModel",
        {
            **_UNCONDITIONAL,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 8, 16),
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        },
    ),
    "cross-attention": (
        "UNet2DConditionModel",
        {
            **_CONDITIONAL,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    # As in GLIDE and DeepFloyd IF: text joins keys and values of self-attention, and the variance is also predicted.
    "added-kv": (
        "UNet2DConditionModel",
        {
            **_CONDITIONAL,
            "in_channels": 3,
            "out_channels": 6,
            "resnet_time_scale_shift": "scale_shift",
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
    ),
}
"""Class and configuration of each denoiser, by name."""

TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {**_TRANSFORMER, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_embeds_ada_norm": 10},
    ),
    # As in PixArt-alpha: the time embedding includes the size of the image, and the variance is also predicted.
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_TRANSFORMER,
            "num_attention_heads": 3,
            "attention_head_dim": 4,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 12,
            "caption_channels": CONTEXT_WIDTH,
            "use_additional_conditions": True,
        },
    ),
    # As in SD 3.5: the first block has a second attention besides the joint one. The last block drops the text.
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_TRANSFORMER,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": CONTEXT_WIDTH,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 6,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    # As in FLUX.1-dev: guidance is an input.
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": CONTEXT_WIDTH,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    # Has long skips, as in U-ViT; with four blocks there is one, from the first to the last.
    "hunyuan": (
        "HunyuanDiT2DModel",
        {
            **_TRANSFORMER,
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "cross_attention_dim": CONTEXT_WIDTH,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 10,
            "text_len": 5,
            "text_len_t5": 7,
        },
    ),
}
"""The same for transformers, with 8x8 pixels in patches of 2; see test_transformers."""

LARGER: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # The levels of Stable Diffusion; see test_odd_sizes.
    "four-levels": (
        "UNet2DConditionModel",
        {
            **_CONDITIONAL,
            "block_out_channels": (8, 8, 8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
}
"""The same for a denoiser that few tests need."""


def new_denoiser(architecture: str) -> nn.Module:
    """Build a denoiser, with the same weights every time."""
    import diffusers

    name, config = {**ARCHITECTURES, **TRANSFORMERS, **LARGER}[architecture]
    denoiser: nn.Module = getattr(diffusers, name)(**config)
    condition_well(denoiser, seed=0)
    return denoiser.eval()


def condition_well(model: nn.Module, seed: int, *, own_eps: bool = False) -> None:
    """Initialise a model so that every part matters and no part amplifies rounding errors.

    With `own_eps`, norms keep their epsilon: then no group of channels may become constant.

    Fresh models have layers whose output is zero. Removals may also leave a group of channels nearly constant; a norm
    with a small epsilon amplifies its rounding errors then.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and not own_eps:
            module.eps = 0.1


class Block(nn.Module):
    """Named layers and a function that applies them."""

    def __init__(self, compute: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *values: Tensor) -> Any:
        """Apply the function to the block and the values."""
        return self.compute(self, *values)


def toy_denoiser(body: nn.Module) -> nn.Module:
    """Make a denoiser from one block of sample and timestep; it looks like a `UNet2DModel` with two levels."""

    class UNet2DModel(nn.Module):
        config = SimpleNamespace(sample_size=8, in_channels=4, block_out_channels=(4, 4))

        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (self.body(sample, timestep),)

    return UNet2DModel()


class Tiny:
    """One architecture: its denoiser, capture, gated graph and weights, each created on first use."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture = architecture
        self._folder = folder

    def __repr__(self) -> str:
        return self.architecture

    @functools.cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser."""
        return new_denoiser(self.architecture)

    @functools.cached_property
    def _inputs(self) -> tuple[Input, ...]:
        return denoiser_of(self.denoiser).inputs

    @functools.cached_property
    def capture(self) -> Capture:
        """The capture; it takes seconds."""
        return capture(self.denoiser)

    @functools.cached_property
    def reference(self) -> nn.Module:
        """The gated graph in torch."""
        return self.capture.reference()

    @functools.cached_property
    def gated(self) -> GatedGraph:
        """The gated graph in ONNX, from the folder if another test or process has built it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / f"{self.architecture}.lock"):
            return open_or_build(self._folder / self.architecture, lambda: self.capture)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all components."""
        return tuple(component.name for component in self.gated.components)

    @functools.cached_property
    def weights(self) -> Mapping[str, NDArray[np.generic]]:
        """Contents of the weights file."""
        return load_file(self.gated.weights)

    @functools.cached_property
    def parameters(self) -> Mapping[str, str]:
        """Parameter name of each tensor in the weights file; the exporter transposes and renames some."""
        parameters = {name: parameter.detach().numpy() for name, parameter in self.denoiser.named_parameters()}
        transposed = {(array.T.shape, array.T.tobytes()): name for name, array in parameters.items()}
        found = {}
        for name, array in self.weights.items():
            own_name = name.removeprefix("model.")
            if own_name in parameters:
                np.testing.assert_array_equal(array, parameters[own_name])
                found[name] = own_name
            else:
                found[name] = transposed[array.shape, array.tobytes()]
        return found

    @functools.cached_property
    def program(self) -> Program:
        """The gated graph in onnxruntime."""
        return self.load(self.gated.runnable())

    @property
    def stride(self) -> int:
        """Divisor of every valid height and width."""
        return self.gated.sizes.multiple

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph in onnxruntime."""
        return self._loader.load(graph)

    @functools.cached_property
    def _backend(self) -> Backend:
        return open_backend("onnxruntime:cpu", threads=1)

    @functools.cached_property
    def _loader(self) -> Loader:
        return self._backend.open_weights(self.gated.weights.read_bytes())

    def inputs(self, *, batch: int, height: int, width: int, tokens: int = 5, seed: int = 0) -> dict[str, Array]:
        """Draw inputs of the denoiser, with a different timestep per sample; integers repeat the example's values."""
        rng = np.random.default_rng(seed)

        def draw(item: Input) -> Array:
            shape = [batch, *item.example.shape[1:]]
            if item.name == SAMPLE:
                shape[2:] = height, width
            elif item.dynamic:
                shape[1] = tokens
            if item.name == TIMESTEP:
                return rng.uniform(0, 999, batch).astype(np.float32)
            if not item.example.is_floating_point():
                return np.resize(item.example.numpy(), shape)
            return rng.standard_normal(shape, dtype=np.float32)

        return {item.name: draw(item) for item in self._inputs}

    def run(self, program: Program, inputs: Mapping[str, Array]) -> Array:
        """Run a loaded graph; unwritten output stays NaN."""
        return self.run_on_device(program, inputs)[0]

    def run_emitting(self, program: Program, inputs: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Run a loaded graph and copy its emitted tensors."""
        output, emitted = self.run_on_device(program, inputs)
        return output, {name: self._backend.device.to_array(value) for name, value in emitted.items()}

    def run_on_device(self, program: Program, inputs: Mapping[str, object]) -> tuple[Array, Mapping[str, object]]:
        """Run a loaded graph and leave its emitted tensors on the device."""
        sample = inputs[SAMPLE]
        assert isinstance(sample, np.ndarray)
        batch, _, height, width = sample.shape
        output = np.full((batch, self.gated.predicted_channels, height, width), np.nan, dtype=np.float32)
        return output, program(inputs, output)

    @torch.no_grad()
    def run_reference(self, inputs: Mapping[str, Array]) -> Array:
        """Run the gated graph in torch."""
        values = [torch.from_numpy(inputs[name]) for name in (*self.capture.inputs, GATES, MEANS)]
        output: Array = self.reference(*values).numpy()
        return output

    @torch.no_grad()
    def run_denoiser(self, inputs: Mapping[str, Array]) -> Array:
        """Run the denoiser as diffusers does."""
        output: Array = self.denoiser(
            **{name: torch.from_numpy(array) for name, array in inputs.items()}
        ).sample.numpy()
        return output


class Reuse:
    """Engines of a model that emit, hold and forecast, and sessions that alternate between them."""

    SHAPE = (2, 8, 8)
    """Shape of a sample of the architecture "attention"."""

    def __init__(self, tiny: Tiny, *assignments: Mapping[str, Treatment]) -> None:
        """Specialise an emitting engine and one engine per assignment."""
        self.tiny = tiny
        means = np.zeros(tiny.gated.channels, dtype=np.float32)
        self.engines = with_emissions([{}, *assignments], tiny.gated.components)
        self.full = specialise(tiny.gated, {}, means)
        self.graphs = [specialise(tiny.gated, one.treatments, means, one.emits) for one in self.engines]
        config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": True}
        self.scheduler = extract_all(make_scheduler("ddim", config), "ddim", [7])

    def session(
        self,
        backend: Backend,
        full: Program,
        programs: Sequence[Program],
        cycle: tuple[int, ...],
        *,
        exact: Program | None = None,
    ) -> Session:
        """Create a session of 7 steps that cycles through loaded engines."""
        plan = plan_of(self.engines, [Phase(low=-20.0, high=20.0, cycle=cycle)])
        return Session(
            plan=plan,
            full=full,
            programs=programs,
            exact=exact,
            scheduler=self.scheduler,
            sample_shape=self.SHAPE,
            steps=7,
            device=backend.device,
        )


def daily(architectures: Iterable[str]) -> list[ParameterSet]:
    """Mark all architectures except two as nightly."""
    every_day = ("attention", "cross-attention")
    return [pytest.param(name, marks=() if name in every_day else pytest.mark.nightly) for name in architectures]


def shared_folder() -> Path:
    """Return the folder shared by all processes of a test run, for callers that are not fixtures."""
    return Path(os.environ["UNETC_TESTS_SHARED"])


@functools.cache
def tiny_of(architecture: str, folder: Path) -> Tiny:
    """Share an architecture between the tests of a process, and its gated graph between processes.

    Args:
        architecture: A key of `ARCHITECTURES`.
        folder: Folder shared by all processes of a test run.
    """
    return Tiny(architecture, folder / "architectures")


def relative_error(actual: Array, expected: Array) -> float:
    """Measure the largest difference, relative to the largest expected value unless that is zero."""
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1))
