#!/usr/bin/env bash
# With one step and spacing "linspace", many diffusers schedulers start at timestep 0, where an image is finished.
#
# Guess: set_timesteps(1) with spacing "linspace", the default of EulerDiscreteScheduler, gives the noisiest timestep,
# 999, and for Euler a starting noise of 157. Only "leading" is known to leave out the noisy end.
#
# Fact: the timesteps are evenly spaced numbers from 0 to 999 in reverse order. A single such number is 0. So the only
# timestep is 0, and init_noise_sigma of Euler falls from 157 to 0.01. DDIM starts from noise of size 1 and tells the
# model that there is almost none. DPMSolver and UniPC compute one number more and drop it again: with the same config
# they start at 999. With two steps the two kinds differ as well: 999, 0 and 999, 500.
#
# Why it matters: an engine for one step (distilled models, warm-up, a smoke test, the short end of a sweep over step
# counts) runs at a noise level where sampling never begins. There is no warning, and all shapes are right. With spacing
# "trailing" all six schedulers start at 999.
#
# Seen with diffusers 0.42.1, torch 2.13.0 (timesteps of 1 step; of 2 steps; init_noise_sigma of 1 step):
#   DDIMScheduler               linspace: [0]; [999, 0]; 1.00      trailing: [999]
#   DDPMScheduler               linspace: [0]; [999, 0]; 1.00      trailing: [999]
#   EulerDiscreteScheduler      linspace: [0]; [999, 0]; 0.01      trailing: [999]
#   LMSDiscreteScheduler        linspace: [0]; [999, 0]; 0.01      trailing: [999]
#   DPMSolverMultistepScheduler linspace: [999]; [999, 500]; 1.00  trailing: [999]
#   UniPCMultistepScheduler     linspace: [999]; [999, 500]; 1.00  trailing: [999]
#   EulerDiscreteScheduler, 2 steps: init_noise_sigma 157.41
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
EVENLY = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler")
ONE_MORE = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def begin(name, steps, spacing):
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return [int(timestep) for timestep in scheduler.timesteps], float(scheduler.init_noise_sigma)


as_stated = [diffusers.EulerDiscreteScheduler().config.timestep_spacing == "linspace"]
for name in (*EVENLY, *ONE_MORE):
    (one, sigma), (two, _) = (begin(name, steps, "linspace") for steps in (1, 2))
    trailing, _ = begin(name, 1, "trailing")
    seen = f"{one}; {two}; {sigma:.2f}"
    print(f"{name:27} linspace: {seen:24} trailing: {trailing}")
    as_stated.append((one, two) == (([0], [999, 0]) if name in EVENLY else ([999], [999, 500])) and trailing == [999])
    if name == "EulerDiscreteScheduler":
        as_stated.append(sigma < 0.02)
usual = begin("EulerDiscreteScheduler", 2, "linspace")[1]
print(f"EulerDiscreteScheduler, 2 steps: init_noise_sigma {usual:.2f}")
as_stated.append(usual > 100)
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
