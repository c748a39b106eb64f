#!/usr/bin/env bash
# FlowMatchEulerDiscreteScheduler with shift_terminal has a NaN noise level when it is asked for one step.
#
# Guess: shift_terminal stretches a schedule so that its last level before 0 is the given one. A schedule of one step has
# nothing to stretch: it goes from 1 to 0, as without the setting, or set_timesteps refuses it.
#
# Fact: the stretch divides by 1 minus the last level. With one step the last level is the first one, 1, so it computes
# 0 / 0. set_timesteps accepts the call, the only timestep and level are NaN, and every image is NaN. There is no error; numpy
# alone warns, once, of an invalid value.
#
# Why it matters: pipelines with this setting in their configuration give black images in one step, the number that
# distilled models are asked for. Whoever tabulates schedules for many step counts must expect a NaN in one of them.
#
# Seen with diffusers 0.42.1, torch 2.13.0:
#   one step, no shift_terminal:    sigmas 1, 0
#   one step, shift_terminal=0.1:   sigmas nan, 0
#   two steps, shift_terminal=0.1:  sigmas 1, 0.1, 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import math
import sys
import warnings

import diffusers
import torch

print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")


def levels(steps, **settings):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.set_timesteps(steps)
    found = [round(float(level), 6) for level in scheduler.sigmas]
    print(f"{steps} steps, {settings}: sigmas {found}, {len(caught)} warnings")
    return found


plain, terminal, two = levels(1), levels(1, shift_terminal=0.1), levels(2, shift_terminal=0.1)
as_stated = plain == [1.0, 0.0] and math.isnan(terminal[0]) and two == [1.0, 0.1, 0.0]
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY
