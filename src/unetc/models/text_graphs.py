"""The text encoders of a pipeline as modules without choices: tokens in, states out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unetc.call import TIMESTEP_COND
from unetc.errors import ModelError

from .text import TextEncoders

_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """A text encoder with its tokenizer."""

    module: StatesOfTokens
    tokenizer: str
    """JSON of the library `tokenizers`."""
    length: int
    """Number of tokens that it reads."""
    padding: int
    """Token after the end of a shorter prompt."""
    width: int
    """Width of a token's state."""
    pooled: int | None
    """Width of the state of a prompt; None if the denoiser does not take it."""


class StatesOfTokens(nn.Module):
    """A text encoder as a pipeline uses it."""

    def __init__(self, encoder: Any, *, layer: int | None, pooled: bool) -> None:
        """Wrap an encoder of transformers.

        Args:
            encoder: The encoder, of a class in transformers.
            layer: Index of the hidden states to return; None for the last, normalised ones.
            pooled: Whether to return the state of the whole prompt too.
        """
        super().__init__()
        self.encoder = encoder
        self.layer = layer
        self.pooled = pooled

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Compute the states [batch, length, width] of tokens [batch, length], and perhaps of the prompt."""
        made = self.encoder(tokens, output_hidden_states=self.layer is not None)
        states = made.last_hidden_state if self.layer is None else made.hidden_states[self.layer]
        return (states, made.text_embeds) if self.pooled else (states,)


def text_parts(text: TextEncoders) -> tuple[TextPart, ...]:
    """List the text encoders in the order in which their states are joined.

    Raises:
        ModelError: If unetc cannot export an encoder or a tokenizer.

    Source:
        `encode_prompt` in StableDiffusionPipeline and StableDiffusionXLPipeline of diffusers 0.42.1, with `clip_skip`
        None.
    """
    two = text.kind.two_encoders
    suffixes = [suffix for suffix in ("", "_2") if getattr(text.pipeline, f"text_encoder{suffix}", None) is not None]
    return tuple(
        _part(
            getattr(text.pipeline, f"text_encoder{suffix}"),
            getattr(text.pipeline, f"tokenizer{suffix}"),
            layer=-2 if two else None,
            pooled=two and suffix == suffixes[-1],
        )
        for suffix in suffixes
    )


def _part(encoder: Any, tokenizer: Any, *, layer: int | None, pooled: bool) -> TextPart:
    kind = type(encoder).__name__
    if kind not in _CLASSES:
        raise ModelError(f"a {kind} cannot be exported as a text encoder; supported are {', '.join(_CLASSES)}")
    if getattr(encoder.config, "use_attention_mask", False):
        raise ModelError(f"its {kind} reads a mask of the tokens (use_attention_mask), which is not supported")
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ModelError(f"its {type(tokenizer).__name__} has no form for the library tokenizers")
    return TextPart(
        module=StatesOfTokens(encoder, layer=layer, pooled=pooled).eval().requires_grad_(False),
        tokenizer=fast.to_str(),
        length=tokenizer.model_max_length,
        padding=tokenizer.pad_token_id,
        width=encoder.config.hidden_size,
        pooled=encoder.config.projection_dim if pooled else None,
    )


def zero_negative(text: TextEncoders) -> bool:
    """Check whether the pipeline takes zeros as the conditions of no negative prompt."""
    return text.kind.two_encoders and bool(text.pipeline.config.get("force_zeros_for_empty_prompt"))


def guidance_frequencies(text: TextEncoders) -> tuple[float, ...]:
    """List the frequencies that embed the guidance scale; empty if the denoiser does not read it.

    They are rounded as in diffusers, because the scale multiplies their errors by thousands.

    Source:
        `get_guidance_scale_embedding` in pipeline_stable_diffusion.py of diffusers 0.42.1.
    """
    widths: Mapping[str, Any] = {item.name: item.axes[-1] for item in text.calls.conditions if item.axes}
    if TIMESTEP_COND not in widths:
        return ()
    half = widths[TIMESTEP_COND] // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies: list[float] = torch.exp(torch.arange(half, dtype=torch.float32) * -step).tolist()
    return tuple(frequencies)
