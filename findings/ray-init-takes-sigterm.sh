#!/usr/bin/env bash
# ray.init() replaces the program's own handler of SIGTERM, and the program then ends with exit code 15, without a word.
#
# Guess: a library that is called from a program leaves its signal handlers alone, or calls the earlier one from its own.
# Without one, a program that SIGTERM ends has the status of a death by signal: 143 in a shell.
#
# Fact: the driver gets a handler that calls sys.exit(15); the earlier one is not called. The exit code is a plain 15, so a
# supervisor sees a failure of the program. ray.shutdown() sets the system's default, and not the earlier handler.
#
# Why it matters: a command that saves its state on SIGTERM, or says how to resume, does neither once it has used Ray.
# Whoever needs the handler must set it again after every ray.init().
#
# Seen with ray 2.60.0:
#   before ray.init():     exit code 77, the handler's
#   after ray.init():      exit code 15
#   after ray.shutdown():  killed by the signal, 143 in a shell
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q ray==2.60.0
cd "$folder"
cat >ends.py <<'PY'
import os
import signal
import sys

import ray

signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
if sys.argv[1] != "before":
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
if sys.argv[1] == "after the end":
    ray.shutdown()
os.kill(os.getpid(), signal.SIGTERM)
PY
export RAY_USAGE_STATS_ENABLED=0
as_stated=true
for case in "before 77" "after 15" "after the end 143"; do
  status=0
  venv/bin/python ends.py "${case% *}" 2>/dev/null || status=$?
  echo "${case% *}: exit code $status"
  [[ $status == "${case##* }" ]] || as_stated=false
done
$as_stated && echo "as stated" || { echo "NOT as stated"; exit 1; }
