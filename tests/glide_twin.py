"""The network of OpenAI's GLIDE, written from its description, with the parameter names of its checkpoints.

It tests the converter, so its forward pass is written independently of diffusers and unetc.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models import condition_well
from unetc.models.glide import VARIANTS, Variant, unet_config

HEAD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a twin."""

    in_channels: int
    channels: int
    multipliers: tuple[int, ...]
    attending: tuple[bool, ...]
    """Values of each level, from the top."""
    blocks: int
    text_width: int
    text_heads: int
    text_layers: int
    tokens: int
    vocabulary: int


class Residual(nn.Module):
    """Norm, SiLU, resample, conv; norm with scale and shift of the time, SiLU, conv; added to the resampled input."""

    def __init__(self, inner: int, outer: int, time: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * outer))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(self.in_layers[1](self.in_layers[0](x))))
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resampled(x)) + self.out_layers[1:](h)


class Attention(nn.Module):
    """Every position attends to all positions and to the text; both projections are ordered by head."""

    def __init__(self, channels: int, text: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(text, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        flat = x.flatten(2)
        own, others = self.qkv(self.norm(flat)), self.encoder_kv(text)
        heads = []
        for h in range(x.shape[1] // HEAD):
            q, k, v = own[:, 3 * HEAD * h : 3 * HEAD * (h + 1)].split(HEAD, dim=1)
            text_k, text_v = others[:, 2 * HEAD * h : 2 * HEAD * (h + 1)].split(HEAD, dim=1)
            weights = torch.softmax(q.transpose(1, 2) @ torch.cat([text_k, k], 2) / math.sqrt(HEAD), dim=-1)
            heads.append(torch.cat([text_v, v], 2) @ weights.transpose(1, 2))
        return x + self.proj_out(torch.cat(heads, 1)).view_as(x)


class Sequence(nn.Sequential):
    """Layers in sequence, called with time and text if they take them."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, time, text)
        return x


class TextAttention(nn.Module):
    """Self-attention without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // self.heads
        attended = []
        for own in self.c_qkv(x).split(3 * size, dim=-1):
            q, k, v = own.split(size, dim=-1)
            attended.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), dim=-1) @ v)
        return self.c_proj(torch.cat(attended, -1))


class TextBlock(nn.Module):
    """Attention, then a perceptron, each on a residual branch after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = TextAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GlideTwin(nn.Module):
    """The UNet with its text transformer inside."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.channels, time, text = shape.channels, 4 * shape.channels, shape.text_width
        self.token_embedding = nn.Embedding(shape.vocabulary, text)
        self.positional_embedding = nn.Parameter(torch.empty(shape.tokens, text))
        self.padding_embedding = nn.Parameter(torch.empty(shape.tokens, text))
        blocks = [TextBlock(text, shape.text_heads) for _ in range(shape.text_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.final_ln = nn.LayerNorm(text)
        self.transformer_proj = nn.Linear(text, time)
        self.time_embed = nn.Sequential(nn.Linear(shape.channels, time), nn.SiLU(), nn.Linear(time, time))

        width = shape.channels * shape.multipliers[0]
        widths = [width]
        inputs = [Sequence(nn.Conv2d(shape.in_channels, width, 3, padding=1))]
        bottom = len(shape.multipliers) - 1
        for level, (factor, attending) in enumerate(zip(shape.multipliers, shape.attending, strict=True)):
            for _ in range(shape.blocks):
                layers: list[nn.Module] = [Residual(width, shape.channels * factor, time)]
                width = shape.channels * factor
                layers += [Attention(width, text)] * attending
                inputs.append(Sequence(*layers))
                widths.append(width)
            if level < bottom:
                inputs.append(Sequence(Residual(width, width, time, "down")))
                widths.append(width)
        self.input_blocks = nn.ModuleList(inputs)
        self.middle_block = Sequence(Residual(width, width, time), Attention(width, text), Residual(width, width, time))
        outputs = []
        for level in range(bottom, -1, -1):
            for block in range(shape.blocks + 1):
                outer = shape.channels * shape.multipliers[level]
                layers = [Residual(width + widths.pop(), outer, time)]
                width = outer
                layers += [Attention(width, text)] * shape.attending[level]
                if level > 0 and block == shape.blocks:
                    layers.append(Residual(width, width, time, "up"))
                outputs.append(Sequence(*layers))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 6, 3, padding=1))

    def encode(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the states of the text `[batch, width, token]` and its addend for the time embedding."""
        x = self.token_embedding(tokens) + self.positional_embedding[None]
        x = torch.where(mask[..., None], x, self.padding_embedding[None])
        for block in self.transformer["resblocks"]:
            x = block(x)
        x = self.final_ln(x)
        return x.permute(0, 2, 1), self.transformer_proj(x[:, -1])

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        half = self.channels // 2
        angles = timesteps[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)[None]
        text, summary = self.encode(tokens, mask)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1)) + summary
        kept = []
        for block in self.input_blocks:
            x = block(x, time, text)
            kept.append(x)
        x = self.middle_block(x, time, text)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), time, text)
        return self.out(x)


BASE = Shape(
    in_channels=3,
    channels=64,
    multipliers=(1, 2),
    attending=(False, True),
    blocks=2,
    text_width=64,
    text_heads=2,
    text_layers=2,
    tokens=7,
    vocabulary=11,
)
UPSAMPLE = replace(BASE, in_channels=6, multipliers=(1, 1, 2), attending=(False, True, True), blocks=1)
SHAPES = {"glide:base": BASE, "glide:upsample": UPSAMPLE}


def small(name: str) -> Variant:
    """Reduce a variant to the size of its twin."""
    shape = SHAPES[name]
    config = unet_config(
        size=16,
        in_channels=shape.in_channels,
        widths=[shape.channels * factor for factor in shape.multipliers],
        attending=shape.attending,
        blocks=shape.blocks,
        text_width=shape.text_width,
    )
    return replace(VARIANTS[name], size=16, unet=config, text_heads=shape.text_heads)


def twin(name: str) -> GlideTwin:
    original = GlideTwin(SHAPES[name]).eval().requires_grad_(False)
    condition_well(original, seed=1)
    for module in original.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.eps = 1e-5  # as in the published networks
        if isinstance(module, Attention):
            module.qkv.weight *= 3  # otherwise it would attend to everything equally
            module.encoder_kv.weight *= 3
    return original


def tokens_of(prompts: Iterable[str], length: int) -> tuple[Tensor, Tensor]:
    """Stand in for OpenAI's tokenizer: a token per letter."""
    padded = [[ord(letter) % BASE.vocabulary for letter in prompt[:length]] for prompt in prompts]
    rows = [own + [0] * (length - len(own)) for own in padded]
    return torch.tensor(rows), torch.arange(length)[None] < torch.tensor([[len(own)] for own in padded])
