"""Draw captioned pictures of handwritten digits, and measure the attributes of a picture.

A picture starts from a digit of scikit-learn's data set, straightened to the typical lean of its class. It is drawn
upright or slanted, with a thin or a thick pen, on a dark or a light ground. Its caption names these attributes in one
of several forms and may omit some. Ground, thickness and slant are measured on the pixels, without a trained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from handwritten_digits import scans
from torch import Tensor
from torch.nn import functional

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SLANTS = ("upright", "slanted")
PENS = ("thin", "thick")
GROUNDS = ("dark", "light")
PICTURES = 24_000
"""Pictures drawn for training; the denoiser trains on their latents, and the ruler is calibrated on them."""

SAID = 0.8
"""Probability that a caption names an attribute; it always names the digit."""

LEAN = 0.45
"""Lean of a slanted digit to the right, in widths per height."""

UPRIGHT_SPREAD = 0.06
PEN_LEVELS = (0.62, 0.3)
"""Blackness of the scan, 0 to 1, at the edge of a thin and of a thick stroke."""

EDGE = 14.0
"""Steepness of a stroke's edge, per unit of blackness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Pictures with their attributes and captions."""

    images: Tensor
    """[count, 1, 32, 32] float32 in [-1, 1]."""
    digits: Tensor
    """[count] int64, 0 to 9."""
    slants: Tensor
    """[count] int64, index into SLANTS; pens and grounds likewise."""
    pens: Tensor
    grounds: Tensor
    captions: tuple[str, ...]


def caption(digit: str, slant: str = "", pen: str = "", ground: str = "", *, form: int = 0) -> str:
    """Write a caption in one of four forms; empty attributes are omitted."""
    where = f"on a {ground} ground" if ground else ""
    if form == 0:
        return _listed(_with_article(slant, digit), pen, where)
    if form == 1:
        return " ".join(filter(None, (_with_article(pen, slant, digit), where)))
    if form == 2:
        return _listed(where, _with_article(digit), " and ".join(filter(None, (slant, pen))))
    return _listed(digit, pen, slant, ground and f"{ground} ground")


CAPTION_FORMS = 4


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _with_article(*words: str) -> str:
    phrase = " ".join(filter(None, words))
    return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith('one') else 'a'} {phrase}"


def draw(count: int, seed: int, sources: Tensor | None = None) -> Pictures:
    """Draw captioned pictures; the same seed gives the same pictures.

    Args:
        count: Number of pictures.
        seed: Seed of all random draws.
        sources: Indices of the scans to draw from, among all 1,797; all by default.
    """
    ink, labels = scans()
    ink, labels = (ink, labels) if sources is None else (ink[sources], labels[sources])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(ink), (count,), generator=generator)
    slants, pens, grounds = torch.randint(0, 2, (3, count), generator=generator)
    digits = labels[chosen]
    drawn = _sheared(ink[chosen], _straightening(ink, labels)[chosen], slants, generator)
    drawn = drawn / drawn.amax(dim=(1, 2, 3), keepdim=True)
    jitter = (torch.rand(count, generator=generator) - 0.5) * 0.08
    edges = torch.tensor(PEN_LEVELS)[pens] + jitter
    stroke = ((drawn - edges.view(-1, 1, 1, 1)) * EDGE).sigmoid()
    paper, pen_tone = 0.75 + 0.25 * torch.rand(2, count, 1, 1, 1, generator=generator)
    sign = (grounds * 2 - 1).view(-1, 1, 1, 1)
    images = sign * (paper - (paper + pen_tone) * stroke)
    return Pictures(
        images=images,
        digits=digits,
        slants=slants,
        pens=pens,
        grounds=grounds,
        captions=tuple(_captions(digits, slants, pens, grounds, generator)),
    )


def _captions(digits: Tensor, slants: Tensor, pens: Tensor, grounds: Tensor, generator: torch.Generator) -> list[str]:
    said = torch.rand(3, len(digits), generator=generator) < SAID
    forms = torch.randint(0, CAPTION_FORMS, (len(digits),), generator=generator)
    rows = torch.stack((digits, slants, pens, grounds, forms, *said), dim=1).tolist()
    return [
        caption(
            DIGITS[digit],
            SLANTS[slant] if slant_said else "",
            PENS[pen] if pen_said else "",
            GROUNDS[ground] if ground_said else "",
            form=form,
        )
        for digit, slant, pen, ground, form, slant_said, pen_said, ground_said in rows
    ]


def lean(ink: Tensor) -> Tensor:
    """Measure the lean of ink `[count, 1, height, width]` to the right, in widths per height, `[count]`."""
    height, width = ink.shape[2:]
    mass = ink.sum(dim=(1, 2, 3))
    rows, columns = torch.arange(height, dtype=ink.dtype), torch.arange(width, dtype=ink.dtype)
    row = (ink.sum(dim=(1, 3)) @ rows) / mass
    column = (ink.sum(dim=(1, 2)) @ columns) / mass
    below = rows.view(1, -1, 1) - row.view(-1, 1, 1)
    right = columns.view(1, 1, -1) - column.view(-1, 1, 1)
    return -(ink[:, 0] * below * right).sum(dim=(1, 2)) / (ink[:, 0] * below**2).sum(dim=(1, 2))


def _straightening(ink: Tensor, labels: Tensor) -> Tensor:
    """Compute the lean to add to each scan so that it leans like the mean of its class."""
    leans = lean(ink)
    typical = torch.stack([leans[labels == digit].mean() for digit in range(len(DIGITS))])
    return typical[labels] - leans


def _sheared(ink: Tensor, extra: Tensor, slants: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarge scans `[count, 1, 8, 8]` to `[count, 1, 32, 32]`, slightly sheared, shifted and scaled."""
    count = len(ink)
    spread = (torch.rand(count, generator=generator) * 2 - 1) * UPRIGHT_SPREAD
    shear = extra + slants * LEAN + spread
    scale = 1.2 + 0.15 * torch.rand(count, generator=generator)
    shift = (torch.rand(2, count, generator=generator) * 2 - 1) * 0.08
    zero = torch.zeros(count)
    affine = torch.stack(
        (torch.stack((scale, scale * shear, shift[0]), dim=1), torch.stack((zero, scale, shift[1]), dim=1)), dim=1
    )
    grid = functional.affine_grid(affine, [count, 1, 32, 32], align_corners=False)
    return functional.grid_sample(ink, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _ink(images: Tensor) -> tuple[Tensor, Tensor]:
    """Split pictures into the tone of their ground `[count]` and their ink `[count, 1, 32, 32]`, 0 to 1."""
    border = torch.cat((images[:, 0, (0, -1), :].flatten(1), images[:, 0, :, (0, -1)].flatten(1)), dim=1)
    tone = border.median(dim=1).values
    distance = (images - tone.view(-1, 1, 1, 1)) * -tone.sign().view(-1, 1, 1, 1)
    strongest = distance.flatten(1).quantile(0.98, dim=1).clamp(min=0.1).view(-1, 1, 1, 1)
    return tone, (distance / strongest).clamp(0, 1)


def _stroke_width(ink: Tensor) -> Tensor:
    """Measure the mean stroke width in pixels: twice the area divided by the length of the edge."""
    across, down = ink.diff(dim=3)[:, :, :-1], ink.diff(dim=2)[:, :, :, :-1]
    edge = (across**2 + down**2 + 1e-12).sqrt().sum(dim=(1, 2, 3))
    return 2 * ink.sum(dim=(1, 2, 3)) / edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """Reads slant, pen and ground off pictures; each threshold lies half way between the means of the two kinds."""

    leans: Tensor
    """[10] Lean from which a digit of each class counts as slanted."""
    widths: Tensor
    """[10] Stroke width in pixels from which it counts as thick."""

    def read(self, images: Tensor, digits: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Read slant, pen and ground off pictures of digits, as indices `[count]` into SLANTS, PENS and GROUNDS."""
        tone, ink = _ink(images)
        digits = torch.as_tensor(digits)
        return {
            "slant": (lean(ink) > self.leans[digits]).long(),
            "pen": (_stroke_width(ink) > self.widths[digits]).long(),
            "ground": (tone > 0).long(),
        }


def new_ruler(pictures: Pictures) -> Ruler:
    """Calibrate a ruler on drawn pictures."""
    _, ink = _ink(pictures.images)

    def halves(values: Tensor, kinds: Tensor) -> Tensor:
        means = [
            values[(pictures.digits == digit) & (kinds == kind)].mean()
            for digit in range(len(DIGITS))
            for kind in range(2)
        ]
        return torch.stack(means).view(-1, 2).mean(dim=1)

    return Ruler(leans=halves(lean(ink), pictures.slants), widths=halves(_stroke_width(ink), pictures.pens))
