"""The real server in a separate process, for tests of its APIs with real clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A server that takes requests."""

    address: str
    """As in http://127.0.0.1:8000."""
    models: dict[str, list[str]]
    """Quality levels by model."""

    @property
    def host(self) -> str:
        """Address without http://."""
        return self.address.removeprefix("http://")

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """Send a GET request."""
        return httpx2.get(f"{self.address}{path}", timeout=60, **options)

    def post(self, path: str, body: object = None, **options: Any) -> httpx2.Response:
        """Send a POST request with a JSON body."""
        return httpx2.post(f"{self.address}{path}", json=body, timeout=60, **options)


@contextmanager
def serving(*arguments: object) -> Iterator[Live]:
    """Start `unetc serve` on a free port and wait until it is ready; end it afterwards.

    Args:
        arguments: Bundles and options of the command.
    """
    code = "from unetc.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        lines = []
        while line := process.stdout.readline():
            lines.append(line)
            if line.rstrip() == "}":
                break
        started = json.loads("".join(lines))
        yield Live(address=started["address"], models=started["models"])
    finally:
        process.terminate()
        process.wait(timeout=60)
