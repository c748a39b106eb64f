"""A Ray cluster of several processes on this machine, and a thread that kills workers: for tests and bench_ray.py."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray_processes import RUNNING, processes

from unetc.ray_token import LOCAL
from unetc.ray_workers import connect


@contextmanager
def started(cpus: int) -> Iterator[None]:
    """Start a cluster that lasts as long as the context.

    Args:
        cpus: CPUs that it counts with; more than the machine has are fine for small jobs.
    """
    connect(LOCAL, num_cpus=cpus, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


class Killer:
    """Kills workers that run a job, at random moments, in a thread.

    It waits for a sign of progress after each kill: nothing ends if workers live for less time than a job takes.
    """

    def __init__(self, kills: int, done: Callable[[], object], *, seed: int = 0, pause_s: float = 0.3) -> None:
        """Kill nothing yet.

        Args:
            kills: Number of workers to kill.
            done: Returns another value when there has been progress.
            seed: Seed of the moments and the victims.
            pause_s: Longest time in seconds between progress and the next kill.
        """
        self.left = kills
        self._done = done
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        """Begin to kill."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        seen: object = None
        while self.left and not self._end.is_set():
            time.sleep(0.002)
            if self._done() != seen and (running := processes(RUNNING)):
                os.kill(self._random.choice(running), signal.SIGKILL)
                self.left -= 1
                seen = self._done()
                self._end.wait(self._random.uniform(0, self._pause_s))
