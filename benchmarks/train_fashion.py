"""Train the class-conditional reference model `fashion` and its classifier, and write both with their card.

    apt-get install dataset-fashion-mnist
    python benchmarks/train_fashion.py --work /tmp/fashion            # train (resumes), evaluate, write
    python benchmarks/train_fashion.py --work /tmp/fashion --steps 0  # evaluate and write the checkpoint

Every step draws its random numbers from (seed, step), so an interrupted run resumes without changing the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from fashion_images import NAMES, TRAINING, UNSEEN, as_samples, read
from fit_classifier import fit_classifier
from image_classifier import ImageClassifier, frechet_distance
from model_card import machine, write_card
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from training import Training, annealed

MODEL = Path(__file__).parents[1] / "src/unetc/models/fashion"
BATCH = 64
LEARNING_RATE = 1e-3
NO_CLASS = len(NAMES)
"""Label that stands for no class, for classifier-free guidance."""
DROPPED_LABELS = 0.1
"""Share of labels replaced by `NO_CLASS` in training."""
CLASSIFIER_EPOCHS = 6
SAMPLES = 500
GUIDANCES = (1.0, 2.0)
"""Guidance scales that are judged; 1 is no guidance."""

Images = NDArray[np.float32]


CARD = """# fashion: the class-conditional reference model of unetc

A DDPM denoiser (diffusers `UNet2DModel`, 32x32, one channel, four resolutions, attention at the two lowest) that
draws clothes of ten classes, trained from scratch on the 60,000 real images of Fashion-MNIST. It predicts v, and one
more label means no class, so that it can be guided. `labels.json` names the classes. With it, the quality of a plan
can be measured, not only its fidelity. It is not meant to generate images for any other use.

![Ten samples of each class, without guidance and with it, DDIM, 50 steps](samples.png)

Data: Fashion-MNIST, H. Xiao, K. Rasul and R. Vollgraf, arXiv:1708.07747, MIT licence, as in Debian's
`dataset-fashion-mnist`, with a border of two pixels. The included classifier was trained on the same 60,000 images. The
distances below are Fréchet distances of its features to the 10,000 test images: they are not FID. For comparison, the
distance of as many training images is given. A class is *right* if the classifier sees the class that was asked for."""


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
    """Build the noise schedule that the model is trained with; the model predicts v.

    Predicted images are not clipped. With guidance they overshoot, and DDIM in diffusers would combine the clipped
    image with the noise of the other one. Samples get brighter at every step, until a sneaker is a bag.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
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


def train_classifier(path: Path, seed: int) -> ImageClassifier:
    """Train the classifier on all training images, or load it if it is there."""
    if not path.exists():
        images, labels = read(TRAINING)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        save_file(fit_classifier(as_samples(images), labels, generator, CLASSIFIER_EPOCHS).state_dict(), path)
    return ImageClassifier.load(path)


@torch.inference_mode()
def draw_samples(unet: UNet2DModel, labels: Tensor, scale: float, seed: int) -> Images:
    """Sample one image [count, 1, 32, 32] in [-1, 1] per label with DDIM, 50 steps, and guidance of a scale."""
    noise = torch.randn(len(labels), 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    drawn = []
    for sample, named in zip(torch.split(noise, BATCH), torch.split(labels, BATCH), strict=True):
        scheduler: Any = DDIMScheduler.from_config(new_scheduler().config)
        scheduler.set_timesteps(50)
        for timestep in scheduler.timesteps:
            predicted = unet(sample, timestep, named).sample
            if scale > 1:
                negative = unet(sample, timestep, torch.full_like(named, NO_CLASS)).sample
                predicted = negative + scale * (predicted - negative)
            sample = scheduler.step(predicted, timestep, sample).prev_sample
        drawn.append(sample.clamp(-1, 1))
        print(f"guidance {scale:g}: {sum(map(len, drawn))}/{len(labels)} samples", flush=True)
    return torch.cat(drawn).numpy()


def save_grid(samples: Mapping[float, Images], path: Path, columns: int = 10, scale: int = 2) -> None:
    """Draw ten samples of every class, a row each: without guidance on the left, with it on the right."""
    sides = [
        one[: len(NAMES) * columns, 0]
        .reshape(columns, len(NAMES), 32, 32)
        .transpose(1, 2, 0, 3)
        .reshape(len(NAMES) * 32, -1)
        for one in samples.values()
    ]
    gap = np.full((len(NAMES) * 32, 8), 1.0, np.float32)
    pixels = ((np.concatenate([sides[0], gap, sides[-1]], axis=1) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST).save(
        path
    )


def evaluate(samples: Mapping[float, Images], labels: Tensor, classifier: ImageClassifier) -> dict[str, object]:
    """Judge samples with the classifier, and the classifier on images that it has not seen."""
    real, truth = read(UNSEEN)
    real_features, real_chances = classifier.describe(as_samples(real).numpy())
    right = real_chances.argmax(1) == truth.numpy()
    seen, _ = classifier.describe(as_samples(read(TRAINING)[0][: len(labels)]).numpy())
    figures: dict[str, object] = {
        "classifier_accuracy_on_unseen_images": round(float(right.mean()), 4),
        "classifier_accuracy_by_class": _by_class(right, truth.numpy()),
        "samples": len(labels),
        "classifier_frechet_distance_of_as_many_training_images": round(frechet_distance(seen, real_features), 2),
    }
    for scale, one in samples.items():
        features, chances = classifier.describe(one)
        right = chances.argmax(1) == labels.numpy()
        figures[f"guidance_{scale:g}"] = {
            "classifier_frechet_distance": round(frechet_distance(features, real_features), 2),
            "right": round(float(right.mean()), 3),
            "right_by_class": _by_class(right, labels.numpy()),
        }
    return figures


def _by_class(right: NDArray[np.bool_], labels: NDArray[np.int64]) -> dict[str, float]:
    return {name: round(float(right[labels == label].mean()), 3) for label, name in enumerate(NAMES)}


def main() -> None:
    """Train, evaluate and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4500, help="total optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    unet, training = train_unet(options.work, options.steps, options.seed)
    classifier = train_classifier(options.work / "classifier.safetensors", options.seed)
    DDPMPipeline(unet=unet, scheduler=new_scheduler()).save_pretrained(options.out, safe_serialization=True)
    (options.out / "labels.json").write_text(json.dumps({"names": NAMES, "no_class": NO_CLASS}, indent=2) + "\n")
    (options.out / "classifier").mkdir(exist_ok=True)
    save_file(classifier.state_dict(), options.out / "classifier/model.safetensors")
    labels = torch.arange(SAMPLES) % len(NAMES)
    samples = {scale: draw_samples(unet, labels, scale, options.seed + 1) for scale in GUIDANCES}
    save_grid(samples, options.out / "samples.png")
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "optimiser_steps": training.done,
        "training_minutes": round(training.seconds / 60, 1),
        "training_machine": machine(),
        "seed": options.seed,
        **evaluate(samples, labels, classifier),
    }
    write_card(CARD, "python benchmarks/train_fashion.py --work /tmp/fashion", figures, options.out)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
