#!/usr/bin/env bash
# The two EDM schedulers of diffusers have different timesteps and sigmas for the same settings, in the last bits.
#
# Guess: EDMEulerScheduler and EDMDPMSolverMultistepScheduler with their defaults have the same sigmas and timesteps, bit
# for bit: sigma_min, sigma_max and rho are the same, and both name Karras et al. as the source. So calls at the same
# timestep may be found by equality, and results may be cached by timestep.
#
# Fact: the first timestep is the same. At 20 steps 16 of the others differ, by up to 4e-7. Timesteps are 0.25 ln(sigma),
# so they cross zero, and near it the relative difference is 1e-5: far more than the rounding of one operation.
#
# Why it matters: a cache, a table of noise levels or a check by `==` works with each scheduler alone, and misses as soon
# as both are used with one model. A tolerance must be absolute, because a relative one fails near zero.
#
# Seen with diffusers 0.42.1, torch 2.13.0:
#   6 steps: 3 of 6 timesteps differ, by up to 1.5e-07, relative 8.8e-06
#   20 steps: 16 of 20 timesteps differ, by up to 3.6e-07
#   50 steps: 38 of 50 timesteps differ, by up to 2.6e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 scipy==1.17.1
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import sys

import diffusers
import torch

print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
as_stated = []
for steps in (6, 20, 50):
    both = diffusers.EDMEulerScheduler(), diffusers.EDMDPMSolverMultistepScheduler()
    for scheduler in both:
        scheduler.set_timesteps(steps)
    euler, multistep = (scheduler.timesteps.double() for scheduler in both)
    apart = (euler - multistep).abs()
    differ, relative = int((apart > 0).sum()), float((apart / multistep.abs()).max())
    print(f"{steps} steps: {differ} of {steps} timesteps differ, by up to {apart.max():.1e}, relative {relative:.1e}")
    as_stated.append(differ >= steps // 2 and 0 < float(apart.max()) < 1e-6 and float(apart[0]) == 0)
    as_stated.append(not torch.equal(both[0].sigmas, both[1].sigmas))
    if steps == 6:
        as_stated.append(relative > 1e-6)
    names = ("sigma_min", "sigma_max", "sigma_data", "rho", "prediction_type", "num_train_timesteps")
    as_stated.append(all(both[0].config[name] == both[1].config[name] for name in names))
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
