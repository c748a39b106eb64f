#!/usr/bin/env bash
# With use_beta_sigmas, diffusers' StableDiffusionPipeline samples 31 steps but raises an error in the last of 32.
#
# Guess: use_beta_sigmas, use_karras_sigmas and use_exponential_sigmas only choose other noise levels. A setting that
# works with 30 steps also works with 50, in any pipeline, as long as there are fewer steps than the 1000 of training.
#
# Fact: beta sigmas are dense at both ends. From 32 steps on, the first two sigmas round to the same timestep, 998. The
# first call of step looks for its place by timestep and, of two equal ones, takes the second. So the first sigma is
# never used, every step works one place too far, and the last one runs off the end. This happens with the betas of
# Stable Diffusion in DPMSolverMultistep, DPMSolverSinglestep, UniPC, DEIS and SASolver. Euler keeps fractional
# timesteps and is fine. After set_begin_index(0) all of them are fine, because they then count instead of looking.
#
# Why it matters: StableDiffusionPipeline does not call set_begin_index, StableDiffusionXLPipeline does. So a scheduler
# works in one and fails in the other. The error comes after the work for the whole image, and only with many steps.
# Issue 12771 of diffusers reports equal timesteps for Karras sigmas, but with a cosine schedule.
#
# Seen with diffusers 0.42.1, torch 2.13.0, scipy 1.17.1:
#   DPMSolverMultistepScheduler: 30 steps fine, 50 steps IndexError at step 50, 100 steps IndexError at step 100
#   UniPCMultistepScheduler: 30 steps fine, 50 steps AssertionError at step 50, 100 steps AssertionError at step 100
#   EulerDiscreteScheduler: 30 steps fine, 50 steps fine, 100 steps fine
#   DPMSolverMultistepScheduler: fine up to 31 steps; the first timesteps of 50 steps are [998, 998, 997]
#   in pipelines, 50 steps: StableDiffusionPipeline IndexError, StableDiffusionXLPipeline fine
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q \
  diffusers==0.42.1 transformers==5.23.0 torch==2.13.0 numpy==2.4.6 scipy==1.17.1
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import sys

import diffusers
import scipy
import torch

diffusers.logging.set_verbosity_error()  # DPMSolverSinglestep warns that it sets lower_order_final
print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, scipy {scipy.__version__}")
AFFECTED = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of Stable Diffusion


def sample(name, option, steps, begin=None):
    """Sample with a model that always returns 0, and return the outcome and the scheduler."""
    scheduler = getattr(diffusers, name)(**BETAS, **{option: True})
    scheduler.set_timesteps(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    sample = torch.ones(1, 4, 8, 8) * scheduler.init_noise_sigma
    for place, timestep in enumerate(scheduler.timesteps, 1):
        sample = scheduler.scale_model_input(sample, timestep)
        try:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
        except (IndexError, AssertionError) as error:
            return f"{type(error).__name__} at step {place}", scheduler
    return ("fine" if torch.isfinite(sample).all() else "not finite"), scheduler


as_stated = []
for name in (*AFFECTED, "EulerDiscreteScheduler"):
    outcome = {steps: sample(name, "use_beta_sigmas", steps)[0] for steps in (30, 50, 100)}
    begun = sample(name, "use_beta_sigmas", 50, begin=0)[0]
    others = {sample(name, f"use_{kind}_sigmas", 100)[0] for kind in ("karras", "exponential")}
    print(f"{name}: " + ", ".join(f"{steps} steps {seen}" for steps, seen in outcome.items()))
    print(f"  after set_begin_index(0), 50 steps: {begun}; 100 steps with the other two: {', '.join(sorted(others))}")
    late = [outcome[steps].endswith(f"Error at step {steps}") for steps in (50, 100)]
    as_stated.append(outcome[30] == begun == "fine" and others == {"fine"} and set(late) == {name in AFFECTED})


def through(pipeline, without, unet=(), settings=(), **call):
    """Run a text-to-image pipeline with a random UNet for 50 steps."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **dict(unet),
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, use_beta_sigmas=True)
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", *without))
    pipe = pipeline(unet=model, scheduler=scheduler, **others, **dict(settings))
    pipe.set_progress_bar_config(disable=True)
    call |= {"prompt_embeds": torch.randn(1, 3, 8), "guidance_scale": 1.0, "output_type": "latent"}
    try:
        pipe(num_inference_steps=50, **call)
    except IndexError as error:
        return type(error).__name__
    return "fine"


fine = [steps for steps in range(2, 60) if sample(AFFECTED[0], "use_beta_sigmas", steps)[0] == "fine"]
first = sample(AFFECTED[0], "use_beta_sigmas", 50)[1].timesteps[:3].tolist()
print(f"{AFFECTED[0]}: fine up to {fine[-1]} steps; the first timesteps of 50 steps are {first}")
as_stated.append(fine == list(range(2, 32)) and first[0] == first[1])
classic = through(
    diffusers.StableDiffusionPipeline,
    without=("safety_checker", "feature_extractor"),
    settings={"requires_safety_checker": False},
)
embedding = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
xl = through(
    diffusers.StableDiffusionXLPipeline,
    without=("text_encoder_2", "tokenizer_2"),
    unet=embedding | {"projection_class_embeddings_input_dim": 56},
    pooled_prompt_embeds=torch.randn(1, 8),
)
print(f"in pipelines, 50 steps: StableDiffusionPipeline {classic}, StableDiffusionXLPipeline {xl}")
as_stated.append((classic, xl) == ("IndexError", "fine"))
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
