#!/usr/bin/env bash
# onnxruntime on Linux writes an identifier of the machine when it is imported, and its own switch comes too late.
#
# Guess: telemetry of onnxruntime exists on Windows alone. If it ever comes to Linux, calling disable_telemetry_events()
# right after the import turns it off, and so do the usual variables.
#
# Fact: the Linux wheel of 1.32 has telemetry, and it is on; that of 1.28 has none. The import alone writes an identifier
# and a database of events to ~/.cache/Microsoft/DeveloperTools/.onnxruntime. disable_telemetry_events() can only be
# called after that. DO_NOT_TRACK and ORT_TELEMETRY_DISABLED change nothing. ORT_DISABLE_TELEMETRY=1 works if it is set
# before the import, in Python too. So does CI=true, which hides all this from tests on a build server.
#
# Why it matters: a library that merely depends on onnxruntime makes its users' servers contact Microsoft.
#
# Seen with onnxruntime 1.32.0 and 1.28.0, as files in the home folder after the import:
#   1.28.0: none
#   1.32.0: deviceid, onnxruntime.db
#   1.32.0, then disable_telemetry_events(): the same
#   1.32.0 with DO_NOT_TRACK=1 or ORT_TELEMETRY_DISABLED=1: the same
#   1.32.0 with ORT_DISABLE_TELEMETRY=1 or CI=true: none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python3 -m venv "$folder/older"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q onnxruntime==1.32.0 numpy==2.4.6
PIP_NO_COMPILE=1 "$folder/older/bin/pip" install -q onnxruntime==1.28.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import os
import subprocess
import sys
import tempfile
from pathlib import Path

clean = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}


def files(code="import onnxruntime", python="venv", **variables):
    """List the files that a process leaves in a home folder that was empty."""
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([f"{python}/bin/python", "-c", code], check=True, env={**clean, "HOME": home, **variables})
        return sorted(path.name for path in Path(home).rglob("*") if path.is_file())


seen = {
    "1.28.0": files(python="older"),
    "1.32.0": files(),
    "disable_telemetry_events()": files("import onnxruntime; onnxruntime.disable_telemetry_events()"),
    "DO_NOT_TRACK=1": files(DO_NOT_TRACK="1"),
    "ORT_TELEMETRY_DISABLED=1": files(ORT_TELEMETRY_DISABLED="1"),
    "ORT_DISABLE_TELEMETRY=1": files(ORT_DISABLE_TELEMETRY="1"),
    "os.environ before the import": files("import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'; import onnxruntime"),
    "CI=true": files(CI="true"),
}
for name, found in seen.items():
    print(f"{name}: {', '.join(found) or 'no file'}")
quiet = {"1.28.0", "ORT_DISABLE_TELEMETRY=1", "os.environ before the import", "CI=true"}
as_stated = all(("deviceid" in found) == (name not in quiet) for name, found in seen.items())
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY
