"""GLIDE's text transformer, with the weight names of OpenAI's checkpoints.

In OpenAI's code it is part of the UNet and runs in every step. It depends on neither sample nor timestep, so unetc runs
it once per prompt. All timings exclude it, for the full model as well as for plans.

Source:
    Nichol et al. 2021, "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models",
    arXiv:2112.10741, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from unetc.errors import ModelError, brief

PARTS = ("token_embedding", "positional_embedding", "padding_embedding", "transformer", "final_ln", "transformer_proj")
"""First parts of the transformer's weight names."""


class TextTransformer(nn.Module):
    """Transformer from tokens to states for the UNet's attention and a summary for its time embedding."""

    def __init__(self, *, vocabulary: int, tokens: int, width: int, layers: int, heads: int, projected: int) -> None:
        """Create the modules; weights are loaded later.

        Args:
            vocabulary: Number of different tokens.
            tokens: Length of padded texts, in tokens.
            width: Width of a token's state.
            layers: Number of residual blocks.
            heads: Number of attention heads.
            projected: Width of the time embedding.
        """
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.padding_embedding = nn.Parameter(torch.empty(tokens, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(_Block(width, heads) for _ in range(layers))})
        self.final_ln = nn.LayerNorm(width)
        self.transformer_proj = nn.Linear(width, projected)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode texts.

        Args:
            tokens: [batch, token], integers.
            mask: [batch, token], False for padding.

        Returns:
            States [batch, token, width] and their summary [batch, projected].
        """
        states = self.token_embedding(tokens) + self.positional_embedding
        states = torch.where(mask[..., None], states, self.padding_embedding)  # replaces an attention mask
        for block in self.transformer["resblocks"].children():
            states = block(states)
        states = self.final_ln(states)
        return states, self.transformer_proj(states[:, -1])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_qkv": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.heads = heads

    def forward(self, states: Tensor) -> Tensor:
        states = states + self._attend(self.ln_1(states))
        hidden: Tensor = self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(states))))
        return states + hidden

    def _attend(self, states: Tensor) -> Tensor:
        """Apply attention; the projection holds query, key and value of the first head, then of the next one."""
        heads = self.attn["c_qkv"](states).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        projected: Tensor = self.attn["c_proj"](attended)
        return projected


def text_transformer(weights: Mapping[str, Tensor], heads: int) -> TextTransformer:
    """Create the transformer for some weights, whose shapes determine everything but the number of heads.

    Args:
        weights: Weights under OpenAI's names.
        heads: Number of attention heads.

    Raises:
        ModelError: If the weights do not belong to a text transformer.
    """
    try:
        vocabulary, width = weights["token_embedding.weight"].shape
        model = TextTransformer(
            vocabulary=vocabulary,
            tokens=len(weights["positional_embedding"]),
            width=width,
            layers=sum(name.startswith("transformer.resblocks.") and name.endswith("ln_1.bias") for name in weights),
            heads=heads,
            projected=len(weights["transformer_proj.bias"]),
        )
        model.load_state_dict(dict(weights))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"the checkpoint has no text transformer of GLIDE: {brief(error)}.") from error
    return model.float().eval().requires_grad_(False)
