#!/usr/bin/env bash
# Tasks and actors of Ray run with the niceness 15: next to any ordinary process they get a thirtieth of a core.
#
# Guess: a worker process of Ray has the priority of the program that called ray.init(). So a function that shares one core
# with another busy process takes twice as long, in a worker as in a process of multiprocessing.
#
# Fact: Ray starts workers with the niceness 15 (its setting RAY_worker_niceness), to keep its own processes and the
# driver responsive. Linux weighs a process of niceness 15 against one of niceness 0 like 1 to 28. On a core with
# one other busy process, the same loop takes about 30 times as long as alone, and not twice. On an idle core nothing shows.
#
# Why it matters: times that workers measure are wrong as soon as anything else runs on the machine: a driver that works
# too, a server, or a second benchmark. The worker looks slow or stuck, and the machine seems busy with the other process.
# RAY_worker_niceness=0 in the environment of ray.init(), or of `ray start` on every machine, gives equal shares.
#
# Seen with ray 2.60.0 (share of a core that a busy worker gets next to a busy process; 0.5 would be equal):
#   default:                niceness 15, share 0.03
#   RAY_worker_niceness=0:  niceness 0, share 0.49
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q ray==2.60.0
cd "$folder"
cat >share.py <<'PY'
import multiprocessing
import os
import sys
import time

import ray

CORE = max(os.sched_getaffinity(0))


def be_busy():
    os.sched_setaffinity(0, {CORE})
    while True:
        pass


@ray.remote
def measure(seconds):
    """Return the niceness of this process, and the CPU time that it gets for each second."""
    os.sched_setaffinity(0, {CORE})
    wall, own = time.monotonic(), time.process_time()
    while time.monotonic() < wall + seconds:
        pass
    return os.nice(0), (time.process_time() - own) / (time.monotonic() - wall)


if __name__ == "__main__":
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.get(measure.remote(0.1))
    other = multiprocessing.get_context("fork").Process(target=be_busy, daemon=True)
    other.start()
    niceness, share = ray.get(measure.remote(8.0))
    other.kill()
    ray.shutdown()
    expected = int(sys.argv[1])
    print(f"ray {ray.__version__}: niceness {niceness} (driver: {os.nice(0)}), share of the core {share:.2f}")
    assert niceness == os.nice(0) + expected, "the behaviour has changed"
    assert (share < 0.15) if expected else (share > 0.3), "the behaviour has changed"
PY
export RAY_USAGE_STATS_ENABLED=0
venv/bin/python -W ignore share.py 15 2>log || { cat log; exit 1; }
RAY_worker_niceness=0 venv/bin/python -W ignore share.py 0 2>log || { cat log; exit 1; }
