"""Measure how well a pipeline follows its prompts, and save a gallery of samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from captioned_digits import CAPTION_FORMS, DIGITS, GROUNDS, PENS, SLANTS, Ruler, caption
from diffusers import StableDiffusionPipeline
from image_classifier import ImageClassifier
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ATTRIBUTES = {"slant": SLANTS, "pen": PENS, "ground": GROUNDS}
STEPS = 50
BATCH = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The digit and attributes that a prompt asks for; attributes that are None are not mentioned."""

    digit: int
    slant: int | None = None
    pen: int | None = None
    ground: int | None = None
    form: int = 0

    @property
    def prompt(self) -> str:
        """The prompt's words."""
        words = {
            name: "" if (place := getattr(self, name)) is None else kinds[place] for name, kinds in ATTRIBUTES.items()
        }
        return caption(DIGITS[self.digit], **words, form=self.form)


def full_requests() -> list[Request]:
    """List requests for every digit with every choice of attributes: 80 requests, cycling through all forms."""
    choices = itertools.product(range(len(DIGITS)), range(2), range(2), range(2))
    return [
        Request(digit=digit, slant=slant, pen=pen, ground=ground, form=(place + place // CAPTION_FORMS) % CAPTION_FORMS)
        for place, (digit, slant, pen, ground) in enumerate(choices)
    ]


def sample(pipeline: StableDiffusionPipeline, prompts: Sequence[str], guidance: float, seed: int) -> Tensor:
    """Sample one grey picture per prompt, `[count, 1, 32, 32]` in -1 to 1, each from different noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator, batches = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), BATCH):
        images = pipeline(
            list(prompts[start : start + BATCH]),
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            generator=generator,
            output_type="np",
        ).images
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2).mean(dim=1, keepdim=True) * 2 - 1)
    return torch.cat(batches)


def followed(
    requests: Sequence[Request], images: Tensor, classifier: ImageClassifier, ruler: Ruler
) -> dict[str, float]:
    """Compute the share of pictures `[count, 1, 32, 32]` with the right digit, each right attribute, and all right."""
    digits = torch.tensor([request.digit for request in requests])
    _, probabilities = classifier.describe(images.numpy())
    right = {"digit": torch.from_numpy(probabilities.argmax(1)) == digits}
    for name, seen in ruler.read(images, digits).items():
        right[name] = seen == torch.tensor([getattr(request, name) for request in requests])
    right["everything"] = torch.stack(list(right.values())).all(dim=0)
    return {name: round(float(hits.float().mean()), 3) for name, hits in right.items()}


def left_open(images: Tensor, digits: Tensor, ruler: Ruler) -> dict[str, float]:
    """Compute the share of pictures that are slanted, thick and light when the prompt names only the digit."""
    seen = ruler.read(images, digits)
    return {kinds[1]: round(float(seen[name].float().mean()), 3) for name, kinds in ATTRIBUTES.items()}


def save_gallery(images: Tensor, prompts: Sequence[str], path: Path, columns: int = 5, scale: int = 5) -> None:
    """Save pictures `[count, 1, 32, 32]` as one PNG, each with its prompt below."""
    side, height, gap = 32 * scale, 34, 8
    rows = -(-len(prompts) // columns)
    sheet = Image.new("L", (columns * (side + gap) + gap, rows * (side + height + gap) + gap), 255)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    pixels = ((images[:, 0].numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    for place, (picture, prompt) in enumerate(zip(pixels, prompts, strict=True)):
        left, top = gap + place % columns * (side + gap), gap + place // columns * (side + height + gap)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline=170)
        pen.multiline_text((left, top + side + 2), _wrapped(prompt, font, side), fill=0, font=font, spacing=2)
    sheet.save(path, optimize=True)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
