"""Train the class-conditional reference model `fashion` and its classifier, and write both with their card.

    apt-get install dataset-fashion-mnist
    python benchmarks/train_fashion.py --work /tmp/fashion            # train (resumes), evaluate, write
    python benchmarks/train_fashion.py --work /tmp/fashion --steps 0  # evaluate and write the checkpoint

Every step draws its random numbers from (seed, step), so an interrupted run resumes without changing the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from fashion_images import NAMES, TRAINING, as_samples, read
from torch.nn import functional
from training import Training, annealed

MODEL = Path(__file__).parents[1] / "src/unetc/models/fashion"
BATCH = 64
LEARNING_RATE = 1e-3
NO_CLASS = len(NAMES)
"""Label that stands for no class, for classifier-free guidance."""
DROPPED_LABELS = 0.1
"""Share of labels replaced by `NO_CLASS` in training."""


def new_unet() -> UNet2DModel:
    """Build the untrained denoiser: four resolutions, attention at the two lowest, a label for every class and none."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=len(NAMES) + 1,
    )


def new_scheduler() -> DDPMScheduler:
    """Build the noise schedule that the model is trained with; the model predicts v."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
    )


def train_unet(work: Path, steps: int, seed: int) -> tuple[UNet2DModel, Training]:
    """Train up to `steps` optimiser steps, resuming from `work`, and return the averaged (EMA) model."""
    images, labels = read(TRAINING)
    torch.manual_seed(seed)
    unet, scheduler = new_unet().train(), new_scheduler()
    training = Training(unet, LEARNING_RATE, work / "checkpoint.pt")
    for step, generator in training.steps(steps, seed):
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROPPED_LABELS
        clean, named = as_samples(images[chosen]), labels[chosen].masked_fill(dropped, NO_CLASS)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, named).sample
        wanted = scheduler.get_velocity(clean, noise, timesteps)
        training.descend(functional.mse_loss(predicted, wanted), annealed(step, steps))
    training.finish()
    return unet, training


def main() -> None:
    """Train, evaluate and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4500, help="total optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train_unet(options.work, options.steps, options.seed)


if __name__ == "__main__":
    main()
