#!/usr/bin/env bash
# A diffusers scheduler made from the config of another one depends on whether that config was ever saved to a file.
#
# Guess: scheduler.config and the same config after saving and loading hold the same values, so from_config makes the
# same scheduler from both. The noise schedule is kept in particular, because it belongs to the model.
#
# Fact: a live config also records which values were left at their defaults (key _use_default_values). from_config of
# another class drops these and takes the defaults of the new class. The file lacks that list, so every value in it
# counts as chosen. LCMScheduler has other default betas, so DDPM -> LCM gets another noise schedule from the live
# config than from the file. Euler -> DDIM gets other timesteps. The two configs compare equal all the same.
#
# Why it matters: Other.from_config(pipeline.scheduler.config) is the usual way to swap schedulers. A program that
# tests in one process and serves from a saved folder samples another schedule without any warning. A compiler that
# reads scheduler_config.json measures steps that a pipeline built in code never makes.
#
# Seen with diffusers 0.42.1, torch 2.13.0:
#   values equal after saving and loading: True
#   DDPM -> LCM, live:      scaled_linear 0.00085 to 0.012, alphas_cumprod at the end 4.66e-03
#   DDPM -> LCM, from file: linear 0.0001 to 0.02, alphas_cumprod at the end 4.04e-05
#   Euler -> DDIM, live:      timesteps [800, 600, 400, 200, 0]
#   Euler -> DDIM, from file: timesteps [999, 749, 500, 250, 0]
#   Euler with its default spacing written out -> DDIM, live: timesteps [999, 749, 500, 250, 0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import sys

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler

print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")


def by_file(scheduler):
    """Save a scheduler and load its config."""
    scheduler.save_pretrained(type(scheduler).__name__)
    return type(scheduler).load_config(type(scheduler).__name__)


def plain(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def schedule(scheduler):
    betas = f"{scheduler.config.beta_schedule} {scheduler.config.beta_start} to {scheduler.config.beta_end}"
    return f"{betas}, alphas_cumprod at the end {scheduler.alphas_cumprod[-1]:.2e}"


def timesteps(scheduler):
    scheduler.set_timesteps(5)
    return scheduler.timesteps.tolist()


ddpm, euler = DDPMScheduler(), EulerDiscreteScheduler()
equal = all(plain(one.config) == plain(by_file(one)) for one in (ddpm, euler))
print(f"values equal after saving and loading: {equal}")
lcm = [LCMScheduler.from_config(config) for config in (ddpm.config, by_file(ddpm))]
print(f"DDPM -> LCM, live:      {schedule(lcm[0])}")
print(f"DDPM -> LCM, from file: {schedule(lcm[1])}")
ddim = [timesteps(DDIMScheduler.from_config(config)) for config in (euler.config, by_file(euler))]
print(f"Euler -> DDIM, live:      timesteps {ddim[0]}")
print(f"Euler -> DDIM, from file: timesteps {ddim[1]}")
written = EulerDiscreteScheduler(timestep_spacing=euler.config.timestep_spacing)
explicit = timesteps(DDIMScheduler.from_config(written.config))
print(f"Euler with its default spacing written out -> DDIM, live: timesteps {explicit}")

as_stated = [
    equal,
    lcm[0].config.beta_schedule == "scaled_linear" and lcm[1].config.beta_schedule == "linear",
    lcm[0].alphas_cumprod[-1] > 100 * lcm[1].alphas_cumprod[-1],
    torch.equal(lcm[1].alphas_cumprod, ddpm.alphas_cumprod),
    ddim[0] != ddim[1] and ddim[1] == explicit,
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
