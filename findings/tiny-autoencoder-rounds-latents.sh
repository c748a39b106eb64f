#!/usr/bin/env bash
# Calling AutoencoderTiny of diffusers is not encoding and decoding: it rounds the latents to 8 bits in between.
#
# Guess: vae(x) equals vae.decode(vae.encode(x).latents), as with AutoencoderKL without sampling. So the round trip of
# an image measures what the decoder does in a pipeline.
#
# Fact: forward scales the latents to 0 to 1, clips them, rounds them to 256 values and scales them back. encode,
# decode and pipelines do none of that. Latents beyond the config's latent_magnitude are cut off, too.
#
# Why it matters: an error measured with vae(x) is that of an 8-bit codec. A comparison of a compiled decoder with it
# sees a difference that no pipeline has, and forward gives a gradient of zero to the encoder.
#
# Seen with diffusers 0.42.1, torch 2.13.0:
#   AutoencoderTiny, call and decode(encode): relative difference 0.00111
#   the same with latents rounded to 8 bits by hand: 0.0000000
#   AutoencoderKL, call and decode(encode): 0.0000000
#   largest gradient of the encoder's first layer: 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PY'
import sys

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

torch.manual_seed(0)
SMALL = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
         "num_decoder_blocks": (1, 1)}
tiny = AutoencoderTiny(**SMALL).eval()
kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
image = torch.rand(1, 3, 16, 16) * 2 - 1


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


with torch.no_grad():
    latents = tiny.encode(image).latents
    apart, called = tiny.decode(latents).sample, tiny(image).sample
    rounded = tiny.unscale_latents(tiny.scale_latents(latents).mul(255).round().div(255))
    by_hand = tiny.decode(rounded).sample
    kl_called = kl(image).sample
    kl_apart = kl.decode(kl.encode(image).latent_dist.mode()).sample
print(f"AutoencoderTiny, call and decode(encode): relative difference {relative(called, apart):.5f}")
print(f"the same with latents rounded to 8 bits by hand: {relative(called, by_hand):.7f}")
print(f"AutoencoderKL, call and decode(encode): {relative(kl_called, kl_apart):.7f}")
tiny(image).sample.sum().backward()
gradient = next(tiny.encoder.parameters()).grad
print(f"largest gradient of the encoder's first layer: {0.0 if gradient is None else gradient.abs().max().item()}")

as_stated = [
    relative(called, apart) > 1e-4,
    relative(called, by_hand) < 1e-6,
    relative(kl_called, kl_apart) < 1e-6,
    gradient is None or gradient.abs().max().item() == 0,
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
