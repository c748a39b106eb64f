#!/usr/bin/env bash
# Ray reads RAY_AUTH_MODE when it is imported, and RAY_AUTH_TOKEN once, when a process first connects.
#
# Guess: both take effect in ray.init(), like most of Ray's environment. So a program may import ray, set the two, and
# start a cluster of this process alone that asks everybody for the token; the next cluster may have another token.
#
# Fact: set after `import ray`, the mode holds for the processes that ray.init() starts, and not for the process that
# calls it. The cluster asks its own driver for a token and refuses it. Set before the import, the first cluster works.
# The token is kept for the life of the process, but children get the new one, so a second cluster refuses its driver too.
#
# Why it matters: the GCS and the raylets of a local cluster listen on all interfaces, so the token is what keeps others out.
# A library that imports ray at the top of a module cannot set the mode later, and a test suite cannot change tokens.
#
# Seen with ray 2.60.0:
#   mode and token set before the import:  connected
#   the same, then a second token:         connected, then refused
#   set after the import:                  refused ("RAY_AUTH_MODE is currently 'disabled'")
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q ray==2.60.0
cd "$folder"
cat >tokens.py <<'PY'
import os
import secrets
import sys


def choose_token():
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def connected():
    """Start a cluster and leave it; return what its refusal says, or nothing."""
    try:
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    except RuntimeError as error:
        return str(error)
    ray.shutdown()
    return ""


case = sys.argv[1]
if case == "before":
    choose_token()
import ray

if case == "before":
    assert connected() == "", "the behaviour has changed"
    print("set before the import: connected")
    choose_token()
    assert "InvalidAuthToken" in connected(), "the behaviour has changed"
    print("then a second token: refused")
else:
    choose_token()
    refusal = connected()
    assert "InvalidAuthToken" in refusal and "RAY_AUTH_MODE is currently 'disabled'" in refusal, "the behaviour has changed"
    print("set after the import: refused")
PY
export RAY_USAGE_STATS_ENABLED=0
for case in before after; do
  venv/bin/python -W ignore tokens.py "$case" 2>log || { cat log; exit 1; }
done
