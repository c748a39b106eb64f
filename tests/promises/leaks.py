"""Loading and unloading bundles, and answering requests, leaves no memory, file, thread or shared memory behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import msgspec

from tests.promises.loads import MODES
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.usage import Usage, growth
from tests.server.live import Live, serving, until

LOADS, REQUESTS = 1000, 10_000
CLIENTS = 4
POOL = 4
"""Threads that a server starts when they are first needed, and keeps."""
LOOKS = 100
"""How often the memory of a server is read."""
OF_LOADS = "% that memory grew over loads"
OF_REQUESTS = "% that memory grew over requests"

Ask = Callable[[httpx2.Client, Live, int], tuple[httpx2.Response, int]]
"""Sends request k, and returns the answer and the status that it should have."""


def images(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Ask for images at one of two levels."""
    body = {"seed": k, "n": 1 + k % 3, "num_inference_steps": 2, "quality": live.models["plain"][k % 2]}
    return client.post("/v1/images/generations", json=body), 200


def stream(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Ask for a stream with previews."""
    body = {"seed": k, "num_inference_steps": 3, "stream": True, "partial_images": 2}
    return client.post("/v1/images/generations", json=body), 200


def job(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Follow a job to its end, fetch the image and forget it."""
    address = client.post("/v1/jobs", json={"seed": k, "num_inference_steps": 2}).headers["Location"]
    client.get(f"{address}/events")
    picture = client.get(f"{address}/images/0")
    client.delete(address)
    return picture, 200


def cancelled(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Cancel a job that has hardly begun, and forget it."""
    address = client.post("/v1/jobs", json={"seed": k, "num_inference_steps": 1000}).headers["Location"]
    client.delete(address)
    client.delete(address)
    return client.get(address), 404


def tensors(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Ask for samples of another size as a tensor."""
    parameters = {"seed": k, "steps": 2, "height": 8 + 8 * (k % 3), "output_datatype": "FP32"}
    return client.post("/v2/models/plain/infer", json={"inputs": [], "parameters": parameters}), 200


def a1111(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Ask as a client of the web UI."""
    return client.post("/sdapi/v1/txt2img", json={"seed": k, "steps": 2, "batch_size": 2}), 200


def wrong(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Ask for something that is refused."""
    return client.post("/v1/images/generations", json={"seed": k, "n": 0, "size": "x" * 1000}), 400


def vanish(client: httpx2.Client, live: Live, k: int) -> tuple[httpx2.Response, int]:
    """Go away before the answer."""
    host, port = live.host.split(":")
    body = f'{{"seed": {k}, "num_inference_steps": 1000}}'
    with socket.create_connection((host, int(port))) as gone:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {live.host}\r\nContent-Type: application/json\r\n"
        gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client.get("/metrics"), 200


ASKED: tuple[Ask, ...] = (images, stream, job, cancelled, tensors, a1111, wrong, vanish)


def load_often(bundle: Path, temporary: Path, count: int) -> Outcome:
    """Load and unload a bundle in a fresh process."""
    temporary.mkdir(exist_ok=True)
    process = subprocess.run(
        [sys.executable, "-m", "tests.promises.loads", str(bundle), str(count)],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        cwd=Path(__file__).parents[2],
    )
    usages = [msgspec.json.decode(line, type=Usage) for line in process.stdout.splitlines()]
    problems = [f"loads, {one}" for one in usages[-1].left_since(usages[len(MODES) - 1])]
    problems += [f"loads, {path.name} is left" for path in temporary.iterdir()]
    figures = {OF_LOADS: growth([usage.resident for usage in usages])} if count >= LOADS else {}
    return Outcome(tries=count, broken=tuple(problems), figures=figures)


def ask_often(bundle: Path, count: int) -> Outcome:
    """Send requests of every kind to a server."""
    with serving(f"plain={bundle}") as live:

        def ask(share: range) -> list[str]:
            problems = []
            with httpx2.Client(base_url=live.address, timeout=600, trust_env=False) as client:
                for k in share:
                    send = ASKED[k % len(ASKED)]
                    answer, status = send(client, live, k)
                    if answer.status_code != status:
                        problems.append(f"{send.__name__} {k}: {answer.status_code}, {answer.text[:200]}")
            return problems

        def ask_all(numbers: range) -> list[str]:
            with ThreadPoolExecutor(CLIENTS) as clients:
                found = list(clients.map(ask, [numbers[i::CLIENTS] for i in range(CLIENTS)]))
            until(lambda: not any(live.metric(f"unetc_{kind}_images", model="plain") for kind in ("queued", "running")))
            return [one for some in found for one in some]

        problems = ask_all(range(warm_up := CLIENTS * len(ASKED)))
        before, resident = Usage.of(live.process.pid), []
        before = msgspec.structs.replace(before, threads=before.threads + POOL)
        for first in range(warm_up, count, size := max(CLIENTS, (count - warm_up) // LOOKS)):
            problems += ask_all(range(first, min(first + size, count)))
            resident.append(Usage.of(live.process.pid).resident)
        with contextlib.suppress(AssertionError):  # the server closes the last connections when it looks again
            until(lambda: not Usage.of(live.process.pid).left_since(before), seconds=10)
        problems += [f"requests, {one}" for one in Usage.of(live.process.pid).left_since(before)]
    figures = {OF_REQUESTS: growth(resident)} if count >= REQUESTS else {}
    return Outcome(tries=count, broken=tuple(problems), figures=figures)


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Build the bundle."""
    bundle, temporary = place.tiny_build / "bundle", place.own / "temporary"

    def trial(number: int) -> Outcome:
        """Look for things that are left after a few loads and requests; then for memory, after many of one kind."""
        match number:
            case 0:
                loads, requests = load_often(bundle, temporary, 2 * len(MODES)), ask_often(bundle, 64)
                return Outcome(tries=loads.tries + requests.tries, broken=loads.broken + requests.broken)
            case 1:
                return load_often(bundle, temporary, LOADS)
            case _:
                return ask_often(bundle, REQUESTS)

    yield trial


PROMISE = Promise(
    name="leaks",
    promised="Bundles that were unloaded and requests that were answered leave nothing behind: no memory, no open "
    "file, no thread, no shared memory.",
    tried="A bundle loaded, sampled and unloaded in both memory modes; requests of every kind to a server, cancelled "
    "and abandoned ones among them.",
    prepare=prepare,
    trials=3,
    short=1,
    seconds=89,
    limits={OF_LOADS: 1.0, OF_REQUESTS: 1.0},
)
