#!/usr/bin/env bash
# One call of a diffusers UNet with LoRA scale 0 changes all later calls: the adapter's weight becomes 1.
#
# Guess: cross_attention_kwargs={"scale": s} holds for one call. The weight from set_adapters is multiplied by s before
# the call and divided by s after it, so the next call is unaffected.
#
# Fact: this is true for every scale except 0. A division by 0 is impossible, so after a call with scale 0 the adapter
# gets weight 1, whatever it had before. A LoRA with weight 0.5 then acts in full until set_adapters is called again.
#
# Why it matters: scale 0 is the natural way to get the plain model as a reference, or to switch a LoRA off for some of
# the steps. From then on a server returns other images for the same request, and a comparison that runs the reference
# first measures the wrong LoRA.
#
# Seen with diffusers 0.42.1, peft 0.21.2, torch 2.13.0 (largest difference of the output from the first call):
#   again, after a call with scale 0.3: 0.0e+00
#   again, after a call with scale 0:   1.5e-01
#   the same as with weight 1 from the beginning: True
#   again, after set_adapters:          0.0e+00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import sys

import diffusers
import peft
import torch
from diffusers import UNet2DConditionModel

print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
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
).eval()
config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
unet.add_adapter(config, "style")
sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)


@torch.no_grad()
def call(**settings):
    return unet(sample, 500, text, **settings).sample


def difference(one, other):
    return (one - other).abs().max().item()


unet.set_adapters("style", 1.0)
full = call()
unet.set_adapters("style", 0.5)
first = call()
call(cross_attention_kwargs={"scale": 0.3})
after_other = difference(call(), first)
print(f"again, after a call with scale 0.3: {after_other:.1e}")
call(cross_attention_kwargs={"scale": 0.0})
spoilt = call()
after_zero = difference(spoilt, first)
print(f"again, after a call with scale 0:   {after_zero:.1e}")
as_full = torch.allclose(spoilt, full, atol=1e-5)
print(f"the same as with weight 1 from the beginning: {as_full}")
unet.set_adapters("style", 0.5)
after_set = difference(call(), first)
print(f"again, after set_adapters:          {after_set:.1e}")

as_stated = [after_other < 1e-5, after_zero > 1e-3, as_full, after_set < 1e-5]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
