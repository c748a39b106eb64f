"""Train the reference model `digits` and its classifier, and write both with their card.

    python benchmarks/train_digits.py --work /tmp/digits            # train (resumes), evaluate, write the card
    python benchmarks/train_digits.py --work /tmp/digits --steps 0  # evaluate and write the checkpoint

The data are the 1,797 handwritten digits inside scikit-learn (8x8 scans, UCI "Optical Recognition of Handwritten
Digits", E. Alpaydin and C. Kaynak, CC BY 4.0), enlarged to 32x32. Nothing is downloaded. Every step draws its random
numbers from (seed, step), so an interrupted run resumes without changing the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from fit_classifier import accuracy, fit_classifier, shifted
from handwritten_digits import divided, real_digits
from image_classifier import ImageClassifier, frechet_distance
from model_card import machine, write_card
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from training import Training, warmed_up

MODEL = Path(__file__).parents[1] / "src/unetc/models/digits"
BATCH = 64
LEARNING_RATE = 1e-3
SAMPLES = 1000
CONFIDENT = 0.9
"""A sample counts as a clear digit when the classifier gives one class at least this probability."""


TEXT = """# digits: the reference model of unetc

A DDPM denoiser (diffusers `UNet2DModel`, 32x32, one channel, four resolutions, attention at the two lowest) trained
from scratch on the 1,797 handwritten digits that come with scikit-learn. It is small enough to analyse on a laptop, and
since it is really trained, measurements on it are meaningful. It is not meant to generate digits for any other use.

![100 samples, DDIM, 50 steps](samples.png)

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
doi:10.24432/C50P49, CC BY 4.0; 8x8 scans enlarged to 32x32 (bicubic). The included classifier was trained on four
fifths of the same digits. The distance below uses that classifier's features: it is not FID."""


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
    """Build the noise schedule that the model is trained with."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)


def train_unet(work: Path, steps: int, seed: int) -> tuple[UNet2DModel, Training]:
    """Train up to `steps` optimiser steps, resuming from `work`, and return the averaged (EMA) model."""
    images, _ = real_digits()
    torch.manual_seed(seed)
    unet, scheduler = new_unet().train(), new_scheduler()
    training = Training(unet, LEARNING_RATE, work / "checkpoint.pt")
    for step, generator in training.steps(steps, seed):
        clean = shifted(images[torch.randint(0, len(images), (BATCH,), generator=generator)], generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        training.descend(functional.mse_loss(predicted, noise), warmed_up(step))
    training.finish()
    return unet, training


def train_classifier(seed: int, epochs: int = 25) -> tuple[ImageClassifier, float]:
    """Train the classifier on 4/5 of the real digits and return it with its accuracy on the remaining fifth."""
    images, labels = real_digits()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    train, held_out = divided(len(images), generator)
    classifier = fit_classifier(images[train], labels[train], generator, epochs)
    return classifier, accuracy(classifier, images[held_out], labels[held_out])


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


def evaluate(samples: np.ndarray, classifier: ImageClassifier) -> dict[str, object]:
    """Evaluate samples with the classifier, with the same figures for the real digits."""
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


def main() -> None:
    """Train, evaluate and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3500, help="total optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    unet, training = train_unet(options.work, options.steps, options.seed)
    classifier, held_out_accuracy = train_classifier(options.seed)
    DDPMPipeline(unet=unet, scheduler=new_scheduler()).save_pretrained(options.out, safe_serialization=True)
    (options.out / "classifier").mkdir(exist_ok=True)
    save_file(classifier.state_dict(), options.out / "classifier/model.safetensors")
    samples = draw_samples(unet, SAMPLES, seed=options.seed + 1)
    save_grid(samples, options.out / "samples.png")
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "optimiser_steps": training.done,
        "training_minutes": round(training.seconds / 60, 1),
        "training_machine": machine(),
        "seed": options.seed,
        "classifier_accuracy_on_held_out_real_digits": round(held_out_accuracy, 4),
        **evaluate(samples, classifier),
    }
    write_card(TEXT, "python benchmarks/train_digits.py --work /tmp/digits", figures, options.out)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
