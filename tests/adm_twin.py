"""The networks of guided-diffusion and its relatives, written from their description, with their checkpoints' names.

They test the converter, so their forward pass is written independently of diffusers and unetc.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models import condition_well


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Form of a twin."""

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    attending: tuple[bool, ...] = (False, True)
    """Values of each level, from the top."""
    blocks: int = 1
    heads: int | None = None
    head_channels: int | None = None
    by_part: bool = False
    scale_shift: bool = True
    residual_resampling: bool = True
    classes: int | None = None
    square_projections: bool = False
    """Whether attentions project with convolutions over two axes, as in consistency models, or over one."""


class Residual(nn.Module):
    """Norm, SiLU, resample, conv; the time added or applied to a norm; SiLU, conv; added to the resampled input."""

    def __init__(self, inner: int, outer: int, form: Form, resample: str = "") -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, form.scale_shift
        time = 4 * form.channels
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, (2 if form.scale_shift else 1) * outer))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(self.in_layers[1](self.in_layers[0](x))))
        own = self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = own.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + own)
        return self.skip_connection(self.resampled(x)) + h


class Attention(nn.Module):
    """Every position attends to all positions."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.heads = form.heads or channels // (form.head_channels or channels)
        self.by_part = form.by_part
        convolution = nn.Conv2d if form.square_projections else nn.Conv1d
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = convolution(channels, 3 * channels, 1), convolution(channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        size = x.shape[1] // self.heads
        flat = x.flatten(2)
        projected = functional.conv1d(self.norm(flat), self.qkv.weight.flatten(1)[..., None], self.qkv.bias)
        attended = []
        for head in range(self.heads):
            if self.by_part:
                q, k, v = (part[:, head * size : (head + 1) * size] for part in projected.chunk(3, dim=1))
            else:
                q, k, v = projected[:, 3 * head * size : 3 * (head + 1) * size].split(size, dim=1)
            weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(size), dim=-1)
            attended.append(v @ weights.transpose(1, 2))
        joined = torch.cat(attended, 1)
        return x + functional.conv1d(joined, self.proj_out.weight.flatten(1)[..., None], self.proj_out.bias).view_as(x)


class Down(nn.Module):
    """A convolution that halves both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    """Doubles both sides, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class Sequence(nn.Sequential):
    """Layers in sequence, called with the time if they take it."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, time)
        return x


class AdmTwin(nn.Module):
    """The UNet."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        width = time = form.channels
        self.time_embed = nn.Sequential(nn.Linear(time, 4 * time), nn.SiLU(), nn.Linear(4 * time, 4 * time))
        if form.classes is not None:
            self.label_emb = nn.Embedding(form.classes, 4 * time)
        inputs, widths = [Sequence(nn.Conv2d(form.in_channels, width, 3, padding=1))], [width]
        bottom = len(form.multipliers) - 1
        for level, (factor, attending) in enumerate(zip(form.multipliers, form.attending, strict=True)):
            for _ in range(form.blocks):
                layers: list[nn.Module] = [Residual(width, form.channels * factor, form)]
                width = form.channels * factor
                layers += [Attention(width, form)] * attending
                inputs.append(Sequence(*layers))
                widths.append(width)
            if level < bottom:
                inputs.append(
                    Sequence(Residual(width, width, form, "down") if form.residual_resampling else Down(width))
                )
                widths.append(width)
        self.input_blocks = nn.ModuleList(inputs)
        self.middle_block = Sequence(Residual(width, width, form), Attention(width, form), Residual(width, width, form))
        outputs = []
        for level in range(bottom, -1, -1):
            for block in range(form.blocks + 1):
                outer = form.channels * form.multipliers[level]
                layers = [Residual(width + widths.pop(), outer, form)]
                width = outer
                layers += [Attention(width, form)] * form.attending[level]
                if level > 0 and block == form.blocks:
                    layers.append(self._resampling(width, "up"))
                outputs.append(Sequence(*layers))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, form.out_channels, 3, padding=1))

    def _resampling(self, width: int, way: str) -> nn.Module:
        if self.form.residual_resampling:
            return Residual(width, width, self.form, way)
        return Down(width) if way == "down" else Up(width)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.form.channels // 2
        # in float32 always, as in the published networks: the rest can then be compared in float64
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)[None]
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        if labels is not None:
            time = time + self.label_emb(labels)
        kept = []
        for block in self.input_blocks:
            x = block(x, time)
            kept.append(x)
        x = self.middle_block(x, time)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), time)
        return self.out(x)


def adm_twin(form: Form) -> AdmTwin:
    """Make a twin in which every part matters."""
    original = AdmTwin(form).eval().requires_grad_(False)
    condition_well(original, seed=1, own_eps=True)
    for module in original.modules():
        if isinstance(module, Attention):
            module.qkv.weight *= 3  # otherwise it would attend to everything equally
    return original
