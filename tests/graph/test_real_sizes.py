"""The configurations of Stable Diffusion 1.5, 2.1 and XL: their components, and the equivalence law at 1/40 width."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from torch import nn

from tests.models import condition_well, relative_error
from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.profile import STEP
from unetc.backend import Array
from unetc.call import CONTEXT, POOLED, TIME_IDS, TIMESTEP
from unetc.compiler.graph.capture import Capture, capture
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.runtime.backends.registry import open_backend
from unetc.treatments import Treatment

pytestmark = pytest.mark.nightly

diffusers: Any = untyped_diffusers

CONFIGS = Path(__file__).parents[1] / "configs"
CONTEXT_WIDTH, POOLED_WIDTH = 12, 20

REAL = [
    pytest.param(name, marks=pytest.mark.architecture(f"UNet2DConditionModel as in Stable Diffusion {version}"))
    for name, version in (("sd15", "1.5"), ("sd21", "2.1"), ("sdxl", "XL"))
]


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def narrow(name: str) -> dict[str, Any]:
    """Keep the blocks and layers of a configuration, at most two transformers deep, but make them narrow."""
    config = config_of(name)
    layers = config.get("transformer_layers_per_block", 1)
    changes: dict[str, Any] = {
        "sample_size": 16,
        "norm_num_groups": 4,
        "cross_attention_dim": CONTEXT_WIDTH,
        "block_out_channels": [width // 40 for width in config["block_out_channels"]],
        "attention_head_dim": 2,
        "transformer_layers_per_block": [min(2, count) for count in layers] if isinstance(layers, list) else layers,
    }
    if "addition_embed_type" in config:
        changes |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + POOLED_WIDTH}
    return config | changes


@functools.cache
def captured(name: str) -> Capture:
    model: nn.Module = diffusers.UNet2DConditionModel(**narrow(name))
    condition_well(model, seed=0)
    return capture(model)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_configurations_are_those_of_the_public_models(name: str) -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config_of(name))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # 860 M, 865 M and 2.6 B in their model cards and papers
    assert parameters == {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_stable_diffusion_has_a_component_for_every_branch(name: str) -> None:
    components = captured(name).components
    names = [component.name for component in components]
    assert Counter(component.kind for component in components)["step"] == 1
    # two residual blocks on the way down at each of 4 levels, two in the middle, three on the way up
    assert (
        sum(re.search(r"\bresnets\.\d+$", name) is not None and ":" not in name for name in names) == 4 * 2 + 2 + 4 * 3
    )
    # 3 levels with 2 + 3 transformers, and one in the middle; each branch contains three more: attn1, attn2, ff
    transformers = [name for name in names if re.search(r"\battentions\.\d+$", name) and ":" not in name]
    assert len(transformers) == 3 * 5 + 1
    for part in ("attn1", "attn2", "ff"):
        assert {f"{outer}.transformer_blocks.0.{part}" for outer in transformers} <= {*names}
    # every residual block on the way up reads a skip; the middle and the three lower levels join it as trunks
    assert sum(name.startswith("skip:") for name in names) == 12
    assert sum(name.startswith("level:") for name in names) == 4
    assert len(names) == 22 + 16 * 4 + 12 + 4 + 1


@pytest.mark.slow
@pytest.mark.shows("capture", "export", "law")
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_the_law_holds_for_real_structures(name: str, tmp_path: Path) -> None:
    capture, reference = captured(name), captured(name).reference()
    gated = GatedGraph.build(capture, tmp_path / name)
    loader = open_backend("onnxruntime:cpu", threads=1).open_weights(gated.weights.read_bytes())
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {
        SAMPLE: rng.standard_normal((2, 4, 16, 24), dtype=np.float32),
        TIMESTEP: np.array([20.0, 700.0], np.float32),
        CONTEXT: rng.standard_normal((2, 7, CONTEXT_WIDTH), dtype=np.float32),
    }
    if name == "sdxl":
        inputs[POOLED] = rng.standard_normal((2, POOLED_WIDTH), dtype=np.float32)
        inputs[TIME_IDS] = rng.uniform(0, 512, (2, 6)).astype(np.float32)
    assert {*gated.inputs} == {*inputs}
    means = rng.standard_normal(gated.channels, dtype=np.float32)
    removable = [component.name for component in gated.components if component.name != STEP]
    for count in (0, 5, 25):
        chosen = rng.choice(removable, count, replace=False).tolist()
        treatments = {own: (Treatment.DROP, Treatment.MEAN)[i % 2] for i, own in enumerate(chosen)}
        gates = np.stack([gate_values(gated.components, treatments)] * 2)
        given = {**inputs, GATES: gates, MEANS: means}
        expected = reference(*(torch.from_numpy(given[key]) for key in (*gated.inputs, GATES, MEANS))).numpy()
        actual = np.full_like(inputs[SAMPLE], np.nan)
        loader.load(specialise(gated, treatments, means))(inputs, actual)
        assert relative_error(actual, expected) < 1e-4, treatments  # kernels sum in different orders
