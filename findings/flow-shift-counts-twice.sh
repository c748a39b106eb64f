#!/usr/bin/env bash
# A flow-matching scheduler of diffusers ends elsewhere when its shift is set in the constructor than with set_shift.
#
# Guess: FlowMatchEulerDiscreteScheduler(shift=3) and FlowMatchEulerDiscreteScheduler(shift=1) with set_shift(3) walk
# through the same sigmas, shift(s) = 3 s / (1 + 2 s) of evenly spaced s. So a reimplementation needs one formula.
#
# Fact: only the first sigma agrees. The constructor shifts the smallest sigma, 1/1000, and set_timesteps spaces sigmas
# down to the result and shifts them all once more. The last step starts at shift(shift(1/1000)). With set_shift it
# starts at shift(1/1000), a third of that. Every sigma between is moved too.
#
# Why it matters: the last step removes three times as much noise as the formula says, and a table that was made with
# the other way of setting the shift is another trajectory. Nothing fails; images only differ a little.
#
# Seen with diffusers 0.42.1, torch 2.13.0:
#   4 steps, shift=3:      1.000000 0.857692 0.602151 0.008929
#   4 steps, set_shift(3): 1.000000 0.857327 0.600719 0.002994
#   last / shift(1/1000): 2.982, 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PY'
import sys

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

SHIFT, STEPS, SMALLEST = 3.0, 4, 1 / 1000


def shifted(sigma):
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def sigmas(scheduler):
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas[:-1].double().numpy()


built = sigmas(FlowMatchEulerDiscreteScheduler(shift=SHIFT))
later = FlowMatchEulerDiscreteScheduler(shift=1.0)
later.set_shift(SHIFT)
later = sigmas(later)
print(f"{STEPS} steps, shift=3:      " + " ".join(f"{sigma:.6f}" for sigma in built))
print(f"{STEPS} steps, set_shift(3): " + " ".join(f"{sigma:.6f}" for sigma in later))
ratios = built[-1] / shifted(SMALLEST), later[-1] / shifted(SMALLEST)
print(f"last / shift(1/1000): {ratios[0]:.3f}, {ratios[1]:.3f}")

as_stated = [
    np.allclose(later, shifted(np.linspace(1, SMALLEST, STEPS)), atol=1e-6),
    np.allclose(built, shifted(np.linspace(1, shifted(SMALLEST), STEPS)), atol=1e-6),
    2.9 < ratios[0] < 3.0,
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY
