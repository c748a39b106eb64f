"""The real server in a separate process, for tests of its APIs with real clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

COMMAND = "from unetc.cli import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A server that takes requests."""

    address: str
    """As in http://127.0.0.1:8000."""
    models: dict[str, list[str]]
    """Quality levels by model."""
    process: subprocess.Popen[str]

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

    def delete(self, path: str) -> httpx2.Response:
        """Send a DELETE request."""
        return httpx2.delete(f"{self.address}{path}", timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """Read a metric; 0 if it has no value for these labels."""
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0

    def terminate(self) -> None:
        """Ask the server to end."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextmanager
def serving(*arguments: object, code: str = COMMAND) -> Iterator[Live]:
    """Start `unetc serve` on a free port and wait until it is ready; end it afterwards.

    Args:
        arguments: Bundles and options of the command.
        code: Python code that runs the command.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
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
        assert lines, process.communicate()[1]
        started = json.loads("".join(lines))
        yield Live(address=started["address"], models=started["models"], process=process)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.02)


def pair(one: Path, other: Path) -> tuple[str, str]:
    """Name two bundles `plain` and `prompted`."""
    return f"plain={one}", f"prompted={other}"
