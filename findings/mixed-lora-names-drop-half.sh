#!/usr/bin/env bash
# A LoRA file for SDXL that names layers in two ways loses one of the two groups in diffusers, without a word.
#
# Guess: in kohya's format a layer of the UNet is named either as in diffusers (down_blocks) or as in Stability AI's
# code (input_blocks). diffusers loads files of both kinds. In a file with both, each name still means one layer, so
# all layers are loaded, or an error is raised.
#
# Fact: as soon as one name of the first kind is found, all names of the second kind are removed, even if they belong
# to other layers. The loaded LoRA is exactly the one without them. load_lora_weights logs nothing about it, not even
# at the level of info, although it reports unexpected keys otherwise. Both groups alone are loaded completely.
#
# Why it matters: such files are published; pull request 11292 of diffusers is about one. A single layer with a name of
# the first kind is enough to remove hundreds with names of the second. The image then shows a part of the style, as
# from a LoRA that was trained badly. Only counting the layers in the file and in the UNet shows the loss.
#
# Seen with diffusers 0.42.1, peft 0.21.2, torch 2.13.0:
#   first layer, name of diffusers:     1 of 1 loaded, effect 0.076
#   second layer, name of Stability AI: 1 of 1 loaded, effect 0.235
#   both layers, both as in diffusers:  2 of 2 loaded, effect 0.326
#   both layers, one name of each kind: 1 of 2 loaded, effect 0.076
#   the last is exactly the first: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import io
import logging
import sys

import diffusers
import peft
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
diffusers.logging.set_verbosity_info()
diffusers.logging.disable_default_handler()
FIRST = "transformer_blocks_0_attn1_to_q"
SECOND = "transformer_blocks_0_attn2_to_q"


def pipeline():
    """Make the same pipeline at every call, without LoRA."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    others = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(unet=unet.eval(), scheduler=DDIMScheduler(), **others)


def lora(block, layer, seed):
    """Make a LoRA for one layer in kohya's format."""
    generator = torch.Generator().manual_seed(seed)
    name = f"lora_unet_{block}_{layer}"
    return {
        f"{name}.lora_down.weight": torch.randn(2, 8, generator=generator),
        f"{name}.lora_up.weight": torch.randn(8, 2, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }


torch.manual_seed(1)
SAMPLE, EMBEDDING = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)


@torch.no_grad()
def output(file=None):
    """Load a file and return the layers with LoRA, the output of the UNet and the log that concerns keys."""
    pipe = pipeline()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    if file is not None:
        save_file(file, "lora.safetensors")
        diffusers.logging.add_handler(handler)
        pipe.load_lora_weights("lora.safetensors")
        diffusers.logging.remove_handler(handler)
    layers = [name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")]
    return layers, pipe.unet(SAMPLE, 500, EMBEDDING).sample, log.getvalue()


diffusers_name, other_name = "down_blocks_0_attentions_0", "input_blocks_1_1"
one = lora(diffusers_name, FIRST, 1)
files = {
    "first layer, name of diffusers": one,
    "second layer, name of Stability AI": lora(other_name, SECOND, 2),
    "both layers, both as in diffusers": one | lora(diffusers_name, SECOND, 2),
    "both layers, one name of each kind": one | lora(other_name, SECOND, 2),
}
plain = output()[1]
seen = {}
for name, file in files.items():
    seen[name] = output(file)
    layers, sample, log = seen[name]
    print(f"{name + ':':35} {len(layers)} of {len(file) // 3} loaded, effect {(sample - plain).abs().max():.3f}")
first, second, both, mixed = seen.values()
same = torch.equal(mixed[1], first[1])
print(f"the last is exactly the first: {same}")
logged = [line for line in mixed[2].splitlines() if "text_encoder" not in line]
print(f"logged about the UNet at level info: {logged}")
as_stated = [
    [len(case[0]) for case in seen.values()] == [1, 1, 2, 1],
    second[0] != first[0] and (second[1] - plain).abs().max() > 0.01,
    same and (both[1] - mixed[1]).abs().max() > 0.01,
    not any("input_blocks" in line or "attn2" in line for line in logged),
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
