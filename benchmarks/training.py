"""Train a model so that an interrupted run resumes without changing the result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

CHECKPOINT_EVERY = 100
EMA_DECAY = 0.999
WARMUP_STEPS = 200


class Training:
    """A model with its optimizer, averaged parameters and elapsed time, saved atomically to a checkpoint."""

    def __init__(self, model: nn.Module, rate: float, path: Path) -> None:
        """Resume from the checkpoint, if there is one.

        Args:
            model: Model to train, in place.
            rate: The highest learning rate.
            path: Path of the checkpoint.
        """
        self._model, self._rate, self._path = model, rate, path
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4, fused=True)
        self._ema = EMAModel(model.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75, foreach=True)
        self._losses: list[float] = []
        self.done = 0
        """Optimiser steps taken."""
        self.seconds = 0.0
        """Seconds that these steps took."""
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._ema.load_state_dict(state["ema"])
            self.done, self.seconds = state["step"], state["seconds"]

    def steps(self, total: int, seed: int) -> Iterator[tuple[int, torch.Generator]]:
        """Yield each remaining step with its random generator, and save a checkpoint every few steps."""
        print(f"{self._path.stem}: step {self.done}/{total}", flush=True)
        started = time.monotonic() - self.seconds
        for step in range(self.done, total):
            yield step, torch.Generator().manual_seed(seed * 1_000_003 + step)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
                self.done, self.seconds = step + 1, time.monotonic() - started
                self._save()
                recent, minutes = float(np.mean(self._losses[-CHECKPOINT_EVERY:])), self.seconds / 60
                print(f"{self._path.stem}: step {self.done}/{total}  loss {recent:.5f}  {minutes:.1f} min", flush=True)

    def descend(self, loss: Tensor, factor: float) -> None:
        """Take one optimiser step, at a share of the highest learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * factor
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._ema.step(self._model.parameters())
        self._losses.append(loss.item())

    def finish(self) -> None:
        """Replace the parameters by their averages and switch to evaluation mode."""
        self._ema.copy_to(self._model.parameters())
        self._model.eval().requires_grad_(False)

    def _save(self) -> None:
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self._ema.state_dict(),
            "step": self.done,
            "seconds": self.seconds,
        }
        torch.save(state, self._path.with_suffix(".new"))
        os.replace(self._path.with_suffix(".new"), self._path)


def warmed_up(step: int) -> float:
    """Compute the share of the highest learning rate at a step: rising, then one."""
    return min(1.0, (step + 1) / WARMUP_STEPS)


def annealed(step: int, total: int, share: float = 0.3) -> float:
    """Compute the same share, with a cosine decay to zero over the last `share` of the steps."""
    left = (total - step) / (share * total)
    return warmed_up(step) * (0.5 - 0.5 * float(np.cos(np.pi * min(1.0, left))))
