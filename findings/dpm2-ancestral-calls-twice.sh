#!/usr/bin/env bash
# KDPM2AncestralDiscreteScheduler calls the model twice at the timestep of every step but the first.
#
# Guess: DPM-Solver-2 makes its second call in the middle of a step, between two noise levels. KDPM2DiscreteScheduler
# does, and its ancestral relative has the same structure, so a schedule of 10 steps has 19 different timesteps.
#
# Fact: the ancestral one goes down further than the next level, to s_down, and adds noise to come back. With full noise
# s_down = s_next^2 / s. The middle between s and s_down, on the scale of logarithms, is then s_next itself. So the
# second call of a step is at the noise level, and the timestep, of the first call of the next step. Of 19 timesteps, 10
# differ by more than rounding. The pairs are equal only up to rounding, and either one may be larger.
#
# Why it matters: whatever recognises a step by its timestep sees one step twice. Caches keyed by the timestep reuse what
# belongs to another sample, rules such as "in every third timestep" count wrongly, and code that expects timesteps to
# fall fails on a pair that rises by its rounding error.
#
# Seen with diffusers 0.42.1, torch 2.13.0, 10 steps:
#   KDPM2DiscreteScheduler          19 calls, 19 different timesteps
#   KDPM2AncestralDiscreteScheduler 19 calls, 10 different timesteps
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


def different(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    times = scheduler.timesteps.double()
    found = sum(all(abs(time - other) > 0.01 for other in times[:k]) for k, time in enumerate(times))
    print(f"{name:31} {len(times)} calls, {found} different timesteps")
    return len(times), found


seen = [different(name) for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")]
scheduler = diffusers.KDPM2AncestralDiscreteScheduler()
scheduler.set_timesteps(10)
between, following = scheduler.sigmas_interpol[0:16:2], scheduler.sigmas[1:17:2]
nearly = bool((between / following - 1).abs().max() < 1e-3)
print(f"the second call of a step is at the next noise level: {nearly}")
as_stated = seen == [(19, 19), (19, 10)] and nearly
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY
