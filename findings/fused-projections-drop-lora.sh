#!/usr/bin/env bash
# After fuse_qkv_projections() of diffusers, a LoRA acts on some of its layers and is ignored in the others.
#
# Guess: fuse_qkv_projections computes three products as one and changes no result. A LoRA that is loaded before it or
# after it acts as without it, or there is an error because the layers of the LoRA are gone.
#
# Fact: the layers to_q, to_k and to_v stay in the model beside the fused ones, so the LoRA finds its layers and is
# reported as active. They are no longer called. In self-attention to_q, to_k and to_v of the LoRA do nothing, in
# cross-attention to_k and to_v. to_q of cross-attention and to_out still act. The order does not matter: fusing copies
# the weights below a LoRA that was loaded before. fuse_lora() after fuse_qkv_projections() does not help, because it
# changes the layers that are not called. fuse_lora() before it gives the right result, and so does unfusing.
#
# Why it matters: fusing the projections is advised as a harmless speed-up. A LoRA then draws a mixture that is neither
# its style nor the model's. Issue 11903 of diffusers tells of training with fused projections.
#
# Seen with diffusers 0.42.1, peft 0.21.2, torch 2.13.0 (norm of the LoRA's effect on the prediction, relative to its
# effect without fusing, and norm of the error):
#   LoRA on to_q:                     loaded after 0.845, error 0.477; before: the same; fuse_lora() first: error 0.000
#   LoRA on to_k and to_v:            loaded after 0.000, error 1.000; before: the same; fuse_lora() first: error 0.000
#   LoRA on to_out:                   loaded after 1.000, error 0.000; before: the same; fuse_lora() first: error 0.000
#   LoRA on all four, the usual case: loaded after 0.624, error 0.855; before: the same; fuse_lora() first: error 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q \
  diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import sys

import diffusers
import peft
import torch

diffusers.logging.set_verbosity_error()
print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
torch.manual_seed(1)
SAMPLE, STATES = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)


def pipeline():
    """Make a Stable Diffusion with a small UNet, always with the same random weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    without = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        unet=unet.eval(), scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **without
    )


def predict(*changes):
    """Change a pipeline in some order, and return what its UNet predicts and the adapters that are active."""
    pipe = pipeline()
    for change in changes:
        change(pipe)
    with torch.no_grad():
        return pipe.unet(SAMPLE, 500, STATES).sample, pipe.get_active_adapters()


def loading(targets):
    """Make a LoRA with random weights for some layers, and return a change that loads it."""
    unet = pipeline().unet
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    weights = {f"unet.{name}": value for name, value in peft.get_peft_model_state_dict(unet).items()}
    return lambda pipe: pipe.load_lora_weights(dict(weights))


def fuse_projections(pipe):
    pipe.unet.fuse_qkv_projections()


def unfuse_projections(pipe):
    pipe.unet.unfuse_qkv_projections()


def fuse_lora(pipe):
    pipe.fuse_lora()


base = predict()[0]
as_stated = [torch.allclose(predict(fuse_projections)[0], base, atol=1e-5)]
print(f"fusing changes nothing without a LoRA: {as_stated[0]}")
for targets, effect in (
    (["to_q"], (0.7, 0.95)),
    (["to_k", "to_v"], (0.0, 1e-3)),
    (["to_out.0"], (0.999, 1.001)),
    (["to_q", "to_k", "to_v", "to_out.0"], (0.5, 0.75)),
):
    load = loading(targets)
    right = predict(load)[0]

    def seen(*changes):
        """Measure the effect of the LoRA and its error, relative to its effect without fusing."""
        found, active = predict(*changes)
        norm = (right - base).norm()
        return float((found - base).norm() / norm), float((found - right).norm() / norm), bool(active)

    after, before = seen(fuse_projections, load), seen(load, fuse_projections)
    late, first = seen(fuse_projections, load, fuse_lora), seen(load, fuse_lora, fuse_projections)
    unfused = seen(fuse_projections, load, unfuse_projections)
    print(f"LoRA on {', '.join(targets)}, effect and error, active:")
    for how, (share, error, active) in {
        "loaded after fusing the projections": after,
        "loaded before": before,
        "loaded after, then fuse_lora()": late,
        "loaded before, with fuse_lora()": first,
        "loaded after, then unfused": unfused,
    }.items():
        print(f"  {how:36} {share:.3f} {error:.3f} {active}")
    low, high = effect
    as_stated.append(all(low <= share <= high and active for share, _, active in (after, before, late)))
    ignored = targets != ["to_out.0"]
    as_stated.append(all((error > 0.3) == ignored for _, error, _ in (after, before, late)))
    as_stated.append(max(first[1], unfused[1]) < 1e-3)
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
