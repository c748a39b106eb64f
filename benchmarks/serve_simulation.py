"""Queues before calls that take the times measured by the build, and nothing else: for bench_serve.py.

They show the limits that the engines set, without servers, Python and noise. Whole requests share batches, as in
`serve_contenders.py`; one request after the other is a batch of one. The others share calls, in the turns that the
batcher chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unetc.runtime.batching.turns import Waiting, choose

SEATS = 4, 8, 12, 16, 32

Cost = Callable[[int, int], float]
"""Returns the seconds of a call, for an engine and a number of samples."""


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Draw Poisson times in seconds."""
    times: list[float] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()
    return times


def simulate(
    schedule: Sequence[int],
    batch_ms: Sequence[Sequence[tuple[int, float]]],
    *,
    batch: int,
    window_s: float,
    requests: int,
    rounds: int,
) -> dict[str, object]:
    """Compare step batching with batches of whole requests, and with one request after the other.

    Args:
        schedule: Engine of every step.
        batch_ms: Measured samples and milliseconds of calls, by engine.
        batch: Most requests of a whole batch.
        window_s: Seconds for which the first request of a batch waits for others.
        requests: Requests of one round.
        rounds: Rounds; each has other arrivals, and begins without requests.

    Returns:
        `images_per_s`: ratio of images per second to whole requests, with the best number of seats.
        `p95` and `p95_serial`: 95th percentiles of the latency at 0.8 of the capacity of whole requests, and of one
        request after the other, / theirs, by number of seats.
    """

    def cost(engine: int, samples: int) -> float:
        sizes, times = zip(*batch_ms[engine], strict=True)
        return float(np.interp(samples, sizes, times)) / 1e3

    def capacity(batch: int) -> float:
        return batch / sum(cost(engine, batch) for engine in schedule)

    def p95(batch: int, window_s: float) -> dict[int, float]:
        queues = [arrivals(0.8 * capacity(batch), requests, turn) for turn in range(rounds)]
        theirs = _p95([in_batches(schedule, cost, queue, batch, window_s) for queue in queues])
        return {seats: _p95([shared(schedule, cost, queue, seats) for queue in queues]) / theirs for seats in SEATS}

    full = [0.0] * (8 * SEATS[-1])
    ended = min(max(shared(schedule, cost, full, seats)) for seats in SEATS)
    return {
        "images_per_s": len(full) / ended / capacity(batch),
        "p95": p95(batch, window_s),
        "p95_serial": p95(1, 0.0),
    }


def in_batches(schedule: Sequence[int], cost: Cost, queue: list[float], batch: int, window_s: float) -> list[float]:
    """Return the latencies of requests that share whole batches."""
    now, latencies, waiting = 0.0, [], queue
    while waiting:
        closes = max(now, waiting[0]) + window_s
        taken = [at for at in waiting[:batch] if at <= closes]
        begins = closes if len(taken) < batch else max(now, taken[-1])
        now = begins + sum(cost(engine, len(taken)) for engine in schedule)
        latencies += [now - at for at in taken]
        waiting = waiting[len(taken) :]
    return latencies


def _p95(latencies: Sequence[list[float]]) -> float:
    return float(np.quantile(np.concatenate(latencies), 0.95))


@dataclass(slots=True, eq=False)
class _Image:
    """A request on its way."""

    arrived: float
    step: int = 0
    turn: int = 0


def shared(schedule: Sequence[int], cost: Cost, queue: list[float], seats: int) -> list[float]:
    """Return the latencies of requests that share calls, with a number of seats."""
    now, turn, latencies, coming, running = 0.0, 0, [], list(reversed(queue)), list[_Image]()
    while coming or running:
        if not running:
            now = max(now, coming[-1])
        while coming and coming[-1] <= now and len(running) < seats:
            running.append(_Image(coming.pop(), turn=turn))
        turn += 1
        waiting = [
            Waiting(
                member=one, key=schedule[one.step], rows=1, age=turn - one.turn, seconds=cost(schedule[one.step], 1)
            )
            for one in running
        ]
        engine, members = choose(waiting, lambda key: seats)
        now += cost(engine, len(members))
        for one in members:
            one.step, one.turn = one.step + 1, turn
            if one.step == len(schedule):
                running.remove(one)
                latencies.append(now - one.arrived)
    return latencies
