"""Loads and samples bundles in a separate process, and prints the audit events of the interpreter.

    python -m tests.promises.watched KNOWN... -- BUNDLE...

The known bundles come first, so that everything that unetc itself imports is there already. Prints a line of JSON per
other bundle: its name, whether it was refused, and every event that only code or another file can cause.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import unetc
from tests.promises.audit import Event, heard
from unetc.errors import UnetcError

CODE = (
    *("import", "exec", "compile", "code.__new__", "marshal.loads", "pickle.find_class", "ctypes.dlopen"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename"),
    *("open", "socket.connect", "socket.bind", "socket.getaddrinfo"),
)


def sample(bundle: str) -> bool:
    """Load a bundle and sample; return whether it was refused."""
    try:
        unetc.load(bundle).sample(seed=0)
    except UnetcError:
        return True
    return False


def strange(event: Event, bundle: str) -> bool:
    """Check whether an event is more than reading a file of the bundle."""
    name, arguments = event
    return name != "open" or not _reads_within(bundle, *arguments)


def _reads_within(bundle: str, path: Any, mode: Any, flags: Any) -> bool:
    if isinstance(path, int):
        return True  # of a file that was opened by its name before
    return Path(str(path)).is_relative_to(bundle) and not set(mode or "r") & set("wax+")


def main() -> None:
    """Sample, and print."""
    known, bundles = " ".join(sys.argv[1:]).split(" -- ")
    for bundle in known.split():
        sample(bundle)
    for bundle in bundles.split():
        with heard(*CODE) as events:
            refused = sample(bundle)
        told = [f"{name}{arguments[:2]}" for name, arguments in events if strange((name, arguments), bundle)]
        print(json.dumps({"bundle": bundle, "refused": refused, "events": told}), flush=True)


if __name__ == "__main__":
    main()
