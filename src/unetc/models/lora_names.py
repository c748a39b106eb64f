"""Tensor names in LoRA files, and the layers of a pipeline that they mean.

Every trainer and library has its own names for the same layer. A layer name is compared without its separators, so
`lora_unet_mid_block_attentions_0_proj_in`, `unet.mid_block.attentions.0.proj_in` and Stability AI's
`lora_unet_middle_block_1_proj_in` all mean the layer `mid_block.attentions.0.proj_in`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
PARTS = (UNET, *TEXT_ENCODERS)
"""Folders of a pipeline whose weights a LoRA can change."""


class Role(StrEnum):
    """Purpose of a tensor within the change of a layer."""

    DOWN = "down"
    """First factor, [rank, input, ...]; A in the papers."""
    UP = "up"
    """Second factor, [output, rank, ...]; B in the papers."""
    MID = "mid"
    """Convolution between the factors, [rank, rank, height, width]; LyCORIS calls this a Tucker decomposition."""
    ALPHA = "alpha"
    """One number; the product of the factors is multiplied by alpha / rank."""
    BIAS = "bias"
    """Change of the layer's bias, [output]."""
    DORA_SCALE = "dora_scale"
    """Norms of the changed weight in LyCORIS and OneTrainer; their shape tells the axis."""
    MAGNITUDE = "lora_magnitude_vector"
    """Norms of the changed weight for each output, in peft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorName:
    """A tensor name of a LoRA file, taken apart."""

    full: str
    part: str | None
    """One of `PARTS`, or None if the name fits none."""
    layer: str
    """Name of the layer within the part, in the spelling of `spellings`."""
    role: Role
    bare: bool
    """Whether the name itself does not mention the part."""


_HALVES = {"down": Role.DOWN, "A": Role.DOWN, "up": Role.UP, "B": Role.UP, "mid": Role.MID}

_ROLES: Sequence[tuple[str, Role | None]] = (
    (r"(?:[._]lora|\.lora_linear_layer)\.(?P<half>down|up)\.weight", None),  # diffusers before peft
    (r"\.lora_(?P<half>down|up|mid|A|B)(?:\.default)?\.weight", None),  # kohya, LyCORIS, peft
    (r"(?:[._]lora|\.lora_linear_layer)?\.alpha", Role.ALPHA),
    (r"\.lora_B(?:\.default)?\.bias", Role.BIAS),
    (r"\.dora_scale", Role.DORA_SCALE),
    (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", Role.MAGNITUDE),
)
"""Ends of tensor names with their roles; the first match counts. Without a role, the group `half` decides."""

_PREFIXES = {
    "lora_unet_": UNET,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": UNET,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": UNET,
}
_PEFT_PREFIX = "base_model.model."

_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TEXT_BLOCKS = ("text_model", "encoder", "text_projection")


def take_apart(name: str) -> TensorName | None:
    """Take a tensor name apart; None if its end has no known role."""
    for end, role in _ROLES:
        if match := re.fullmatch(rf"(?P<layer>.+?){end}", name):
            known = role or _HALVES[match["half"]]
            break
    else:
        return None
    layer = match["layer"].removeprefix(_PEFT_PREFIX)
    prefix = next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), "")
    layer = layer.removeprefix(prefix).removeprefix(_PEFT_PREFIX)
    part = _PREFIXES.get(prefix)
    if part is None:
        block = layer.partition(".")[0]
        part = UNET if block in _UNET_BLOCKS else TEXT_ENCODERS[0] if block in _TEXT_BLOCKS else None
    flat = _flat(layer.replace("processor.", ""))
    if part in TEXT_ENCODERS:
        flat = flat.removeprefix("text_model_")
    return TensorName(full=name, part=part, layer=flat, role=known, bare=not prefix)


def _flat(path: str) -> str:
    return path.replace(".", "_")


def spellings(part: str, layers: Iterable[str]) -> dict[str, str]:
    """Map every spelling of the layers of a part to the path of the layer.

    Args:
        part: One of `PARTS`.
        layers: Paths of the layers, as in `named_modules`.
    """
    paths = list(layers)
    names: dict[str, str] = {}
    for path in paths:
        own = _flat(path)
        if part in TEXT_ENCODERS:
            own = own.removeprefix("text_model_")  # a level that depends on the release of transformers
            names.setdefault(own, path)
            if match := re.fullmatch(r"(.+_self_attn_)(?:(q|k|v|out)_proj)", own):
                names.setdefault(f"{match[1]}to_{match[2]}", path)
        else:
            names.setdefault(own, path)
            if own.endswith("to_out_0"):
                names.setdefault(own.removesuffix("_0"), path)
    if part == UNET:
        for name, path in _stability_names(paths):
            names.setdefault(name, path)
    return names


_STABILITY_TOP = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_STABILITY_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def _stability_names(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of UNet layers in Stability AI's code, which numbers blocks through all levels, with paths.

    Source: `ldm/modules/diffusionmodules/openaimodel.py` of Stable Diffusion.
    """
    counts: Counter[tuple[str, int, str]] = Counter()  # layers of each kind in each level
    for side, level, kind, _ in {m.groups() for path in paths if (m := _INSIDE.match(path))}:
        counts[side, int(level), kind] += 1
    starts: dict[tuple[str, int], int] = {}  # number of the first block of each level
    for side, first, ending in (("down", 1, "downsamplers"), ("up", 0, "")):
        level, number = 0, first
        while counts[side, level, "resnets"]:
            starts[side, level] = number
            number += counts[side, level, "resnets"] + min(1, counts[side, level, ending])
            level += 1
    for path in paths:
        if path in _STABILITY_TOP:
            yield _STABILITY_TOP[path], path
        elif match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
            kind, number, rest = match[1], int(match[2]), match[3]
            tail = _STABILITY_RESNET.get(rest, _flat(rest)) if kind == "resnets" else _flat(rest)
            yield f"middle_block_{2 * number + (kind == 'attentions')}_{tail}", path
        elif (match := _INSIDE.match(path)) and (match[1], int(match[2])) in starts:
            side, level, kind, number = match[1], int(match[2]), match[3], int(match[4])
            rest, start = path[match.end() + 1 :], starts[side, level]
            last, blocks = start + counts[side, level, "resnets"], "input_blocks" if side == "down" else "output_blocks"
            if kind == "resnets":
                yield f"{blocks}_{start + number}_0_{_STABILITY_RESNET.get(rest, _flat(rest))}", path
            elif kind == "attentions":
                yield f"{blocks}_{start + number}_1_{_flat(rest)}", path
            elif kind == "downsamplers":
                yield f"{blocks}_{last}_0_op", path
            else:
                yield f"{blocks}_{last - 1}_{1 + min(1, counts[side, level, 'attentions'])}_conv", path


_INSIDE = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")

_METHODS: Mapping[str, str] = {
    r"hada_[wt]\d(_[ab])?": "LoHa",
    r"lokr_[wt]\d(_[ab])?": "LoKr",
    r"on_input|ia3_l(\..+)?": "IA3",
    r"oft_blocks|oft_diag|oft_[rR](\..+)?|rescale": "OFT",
    r"boft_.+": "BOFT",
    r"[ab][12]\.weight|b[12m]\.weight|glora_.+": "GLoRA",
    r"diff(_b)?|set_weight": "full difference of weights",
    r"[wb]_norm": "norm weights",
    r"lora_embedding_[AB](\..+)?": "LoRA of an embedding",
    r"lora_E|ranknum": "AdaLoRA",
    r"vera_lambda_.+": "VeRA",
    r"vblora_.+": "VB-LoRA",
    r"fourierft_spectrum(\..+)?": "FourierFT",
    r"hra_u(\..+)?": "HRA",
    r"wd_for_diff|bora_scale.*": "weight decomposition of differences",
}
"""Methods other than LoRA and DoRA by the end of their tensor names, which follows a dot."""


def foreign_method(name: str) -> str | None:
    """Name the method other than LoRA and DoRA that a tensor belongs to; None if it is not known."""
    return next((method for end, method in _METHODS.items() if re.search(rf"(?:^|\.)(?:{end})$", name)), None)


def is_embedding(name: str) -> bool:
    """Check whether a tensor is part of an embedding (textual inversion), alone or bundled with a LoRA."""
    return bool(re.match(r"(bundle_emb|string_to_param)\.|(emb_params|clip_[lg]|text_encoders_[01])$", name))
