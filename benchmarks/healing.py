"""Heal a pruned engine: train its weights for a few minutes to predict as the full model does on its trajectories."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lever_models import BATCH, CALIBRATED_SEED, Regime
from torch import Tensor, fx, nn
from torch.nn import functional
from training import Training, annealed

from unetc.artifacts.plan import Plan
from unetc.backend import Array, Program, SerialisedGraph
from unetc.compiler.search.tune import record
from unetc.runtime.backends.torch import on_host
from unetc.runtime.backends.torch_graph import translate
from unetc.runtime.session import Session

RATE = 3e-4
TRAINED_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Calls of the full model."""

    samples: Tensor
    """[call, channel, height, width]."""
    timesteps: Tensor
    """[call]."""
    predictions: Tensor
    """[call, channel, height, width]."""


def record_calls(regime: Regime, session: Session, full: Program, steps: Sequence[int], samples: int) -> Pairs:
    """Record what the full model predicts at some steps of its own trajectories."""
    table, seen, timesteps, predictions = regime.table, [], [], []
    for first in range(0, samples, BATCH):
        indices = range(first, min(samples, first + BATCH))
        recording = record(session, indices, seed=CALIBRATED_SEED, steps=regime.steps)
        entering = [recording.start, *recording.samples]
        for step in steps:
            sample: Array = entering[step] * np.float32(table.input_scale[step])
            timestep = np.full(len(sample), table.timesteps[step], dtype=np.float32)
            output = np.empty_like(sample)
            full({"sample": sample, "timestep": timestep}, output)
            seen.append(sample)
            timesteps.append(timestep)
            predictions.append(output)
    joined = (torch.from_numpy(np.concatenate(parts)) for parts in (seen, timesteps, predictions))
    return Pairs(**dict(zip(("samples", "timesteps", "predictions"), joined, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """A pruned engine with its own weights."""

    program: Program
    changed: int
    """Numbers that the training has changed."""
    relative_change: float
    """Norm of the changes / norm of the weights."""
    loss_before: float
    loss_after: float
    """Mean squared error of the prediction on the recorded calls."""
    seconds: float


def heal(graph: SerialisedGraph, weights: bytes, pairs: Pairs, updates: int, work: Path) -> Healed:
    """Train the weights of a pruned engine.

    Args:
        graph: The engine.
        weights: Content of the weights file.
        pairs: Calls of the full model at the noise levels of the engine.
        updates: Updates of the weights.
        work: Folder of the checkpoint.
    """
    translation = translate(graph.graph, on_host(weights), torch.device("cpu"))
    assert set(translation.inputs) == {"sample", "timestep"}
    module = _trainable(translation.module)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def loss(chosen: Tensor | slice) -> Tensor:
        own = {"sample": pairs.samples[chosen], "timestep": pairs.timesteps[chosen]}
        predicted = module(*(own[name] for name in translation.inputs))[0]
        return functional.mse_loss(predicted, pairs.predictions[chosen])

    def whole() -> float:
        with torch.no_grad():
            return float(np.mean([loss(slice(i, i + 256)).item() for i in range(0, len(pairs.samples), 256)]))

    first = whole()
    work.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(graph.graph + pairs.predictions.numpy().tobytes() + str(updates).encode()).hexdigest()[:16]
    training = Training(module, RATE, work / f"healed-{key}.pt")
    for step, generator in training.steps(updates, CALIBRATED_SEED):
        chosen = torch.randint(0, len(pairs.samples), (TRAINED_BATCH,), generator=generator)
        training.descend(loss(chosen), annealed(step, updates))
    training.finish()
    changes = {name: parameter.detach() - before[name] for name, parameter in module.named_parameters()}
    norms = [torch.stack([own.norm() for own in group.values()]).norm() for group in (changes, before)]
    return Healed(
        program=_HostProgram(module, translation.inputs),
        changed=sum(int((own != 0).sum()) for own in changes.values()),
        relative_change=float(norms[0] / norms[1]),
        loss_before=first,
        loss_after=whole(),
        seconds=training.seconds,
    )


class _HostProgram:
    """A module of torch that takes arrays, as the engines of onnxruntime beside it do."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[str]) -> None:
        self._module, self._inputs = module, inputs

    def __call__(self, inputs: Mapping[str, Array], output: Array) -> Mapping[str, Array]:
        """Run; nothing is emitted."""
        with torch.no_grad():
            (prediction,) = self._module(*(torch.from_numpy(inputs[name]) for name in self._inputs))
        output[:] = prediction.numpy()
        return {}


def _trainable(module: fx.GraphModule) -> fx.GraphModule:
    """Turn the weights of a module, which are constants, into parameters."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_floating_point() and buffer.numel() > 1:
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(buffer.clone()))
    return module.train()


def steps_of(plan: Plan, engine: int, levels: Sequence[float]) -> list[int]:
    """List the steps at which an engine of a plan runs."""
    return [step for step, own in enumerate(plan.schedule(levels)) if own == engine]
