"""Train the reference model `digits` and its classifier, and write both with their card.

    python benchmarks/train_digits.py --work /tmp/digits            # train (resumes), evaluate, write the card
    python benchmarks/train_digits.py --work /tmp/digits --steps 0  # evaluate and write what the checkpoint holds

The data are the 1,797 handwritten digits inside scikit-learn (8x8 scans, UCI "Optical Recognition of Handwritten
Digits", E. Alpaydin and C. Kaynak, CC BY 4.0), enlarged to 32x32. Nothing is downloaded. Every step draws its random
numbers from (seed, step), so an interrupted run continues as if it had not been interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from unetc.analyzer.metrics.classifier import DigitClassifier, frechet_distance

MODEL = Path(__file__).parents[1] / "src/unetc/models/digits"
BATCH = 64
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
EMA_DECAY = 0.999
CHECKPOINT_EVERY = 100
SAMPLES = 1000
CONFIDENT = 0.9
"""A sample counts as a clear digit when the classifier gives one class at least this probability."""


def real_digits() -> tuple[Tensor, Tensor]:
    """Load the digits as images [1797, 1, 32, 32] in [-1, 1] and labels [1797]."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    large = functional.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False)
    return large.clamp(-1, 1), torch.tensor(digits.target)


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Shift each image [batch, 1, 32, 32] by up to `pixels` in both directions, repeating the border."""
    padded = functional.pad(images, (pixels,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * pixels + 1, (len(images), 2), generator=generator)
    return torch.stack([p[:, y : y + 32, x : x + 32] for p, (y, x) in zip(padded, corners.tolist(), strict=True)])


def new_unet() -> UNet2DModel:
    """Build the untrained denoiser: four resolutions, attention at the two lowest."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 24, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def new_scheduler() -> DDPMScheduler:
    """Build the noise schedule the model is trained with."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)


def train_unet(work: Path, steps: int, seed: int) -> tuple[UNet2DModel, dict[str, float]]:
    """Train up to `steps` optimiser steps, resuming from `work`, and return the averaged (EMA) model."""
    images, _ = real_digits()
    torch.manual_seed(seed)
    unet, scheduler, checkpoint = new_unet(), new_scheduler(), work / "checkpoint.pt"
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    done, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        done, seconds = state["step"], state["seconds"]
        print(f"resumed at step {done}", flush=True)
    unet.train()
    started, losses = time.monotonic() - seconds, []
    for step in range(done, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        clean = shifted(images[torch.randint(0, len(images), (BATCH,), generator=generator)], generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = functional.mse_loss(predicted, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        losses.append(loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            done, seconds = step + 1, time.monotonic() - started
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            torch.save({**state, "step": done, "seconds": seconds}, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            recent = float(np.mean(losses[-CHECKPOINT_EVERY:]))
            print(f"step {done}/{steps}  loss {recent:.4f}  {seconds / 60:.1f} min", flush=True)
    ema.copy_to(unet.parameters())
    return unet.eval(), {"steps": done, "minutes": round(seconds / 60, 1)}


def train_classifier(seed: int, epochs: int = 25) -> tuple[DigitClassifier, float]:
    """Train the classifier on 4/5 of the real digits and return it with its accuracy on the remaining fifth."""
    images, labels = real_digits()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(64):
            _, logits = classifier(shifted(images[batch], generator))
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
    classifier.eval()
    _, probabilities = classifier.describe(images[held_out].numpy())
    return classifier, float((probabilities.argmax(1) == labels[held_out].numpy()).mean())


def draw_samples(unet: UNet2DModel, count: int, seed: int) -> np.ndarray:
    """Sample images [count, 1, 32, 32] in [-1, 1] with DDIM, 50 steps."""
    scheduler = DDIMScheduler.from_config(new_scheduler().config)
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator, batches = torch.Generator().manual_seed(seed), []
    for start in range(0, count, 100):
        size = min(100, count - start)
        result = pipeline(batch_size=size, generator=generator, num_inference_steps=50, output_type="np")
        batches.append(result.images.transpose(0, 3, 1, 2) * 2 - 1)
        print(f"sampled {start + size}/{count}", flush=True)
    return np.concatenate(batches).astype(np.float32)


def save_grid(samples: np.ndarray, path: Path, side: int = 10, scale: int = 2) -> None:
    """Save the first side x side samples as one PNG."""
    rows = samples[: side * side, 0].reshape(side, side, 32, 32).transpose(0, 2, 1, 3).reshape(side * 32, side * 32)
    pixels = ((rows + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((side * 32 * scale,) * 2, Image.Resampling.NEAREST).save(path)


def evaluate(samples: np.ndarray, classifier: DigitClassifier) -> dict[str, object]:
    """Judge samples with the classifier, beside the same figures for the real digits."""
    images, _ = real_digits()
    real_features, real_probabilities = classifier.describe(images.numpy())
    features, probabilities = classifier.describe(samples)
    halves = np.random.default_rng(0).permutation(len(real_features))
    return {
        "samples": len(samples),
        "confident_share": float((probabilities.max(1) >= CONFIDENT).mean()),
        "confident_share_of_real_digits": round(float((real_probabilities.max(1) >= CONFIDENT).mean()), 3),
        "confidence_threshold": CONFIDENT,
        "class_shares": [round(float(s), 3) for s in np.bincount(probabilities.argmax(1), minlength=10) / len(samples)],
        "classifier_frechet_distance": round(frechet_distance(features, real_features), 2),
        "classifier_frechet_distance_between_halves_of_the_real_digits": round(
            frechet_distance(real_features[halves[::2]], real_features[halves[1::2]]), 2
        ),
    }


def write_card(figures: dict[str, object], path: Path) -> None:
    """Write the model card from the figures."""
    lines = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in figures.items())
    path.write_text(
        f"""# digits: the reference model of unetc

A DDPM denoiser (diffusers `UNet2DModel`, 32x32, one channel, four resolutions, attention at the two lowest) trained
from nothing on the 1,797 handwritten digits that come with scikit-learn. It is small enough to analyse on a laptop and
really trained, so what is measured on it means something. It is not meant to generate digits for any other use.

![100 samples, DDIM, 50 steps](samples.png)

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
doi:10.24432/C50P49, CC BY 4.0; 8x8 scans enlarged to 32x32 (bicubic). The classifier beside it was trained on four
fifths of the same digits. The distance below uses that classifier's features: it is not FID.

| figure | value |
|---|---|
{lines}

Regenerate: `python benchmarks/train_digits.py --work /tmp/digits`. Figures also in `card.json`.
"""
    )


def main() -> None:
    """Train, evaluate and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3500, help="optimiser steps in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    unet, training = train_unet(options.work, options.steps, options.seed)
    classifier, accuracy = train_classifier(options.seed)
    DDPMPipeline(unet=unet, scheduler=new_scheduler()).save_pretrained(options.out, safe_serialization=True)
    (options.out / "classifier").mkdir(exist_ok=True)
    save_file(classifier.state_dict(), options.out / "classifier/model.safetensors")
    samples = draw_samples(unet, SAMPLES, seed=options.seed + 1)
    save_grid(samples, options.out / "samples.png")
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "optimiser_steps": training["steps"],
        "training_minutes": training["minutes"],
        "training_machine": f"{torch.get_num_threads()} threads, {platform.machine()}, no GPU, shared with other work",
        "seed": options.seed,
        "classifier_accuracy_on_held_out_real_digits": round(accuracy, 4),
        **evaluate(samples, classifier),
    }
    (options.out / "card.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(figures, options.out / "README.md")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
