"""Servers that one would write without `unetc serve`: for bench_serve.py, on the same bundle and the same address.

    python benchmarks/serve_contenders.py serial BUNDLE PORT    # unetc.load, one request after the other
    python benchmarks/serve_contenders.py whole BUNDLE PORT     # those that arrive within 50 ms share a run, up to 8
    python benchmarks/serve_contenders.py diffusers MODEL PORT  # the model's own pipeline in torch

They answer `POST /v1/images/generations` with the fields that the benchmark sends, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray

import unetc
from unetc.report.pictures import grid, png_bytes
from unetc.sampler.noise import initial_noise

WINDOW = 0.05
"""Seconds for which the first request of a batch waits for others."""
BATCH = 8

Sample = Callable[[Sequence[dict[str, Any]]], list[NDArray[np.float32]]]
"""Samples one image [channel, height, width] for each request, on the engine thread."""


def with_session(bundle: Path) -> Sample:
    """Sample whole requests with a session; all of a batch have the same number of steps and quality."""
    session = unetc.load(bundle)

    def sample(requests: Sequence[dict[str, Any]]) -> list[NDArray[np.float32]]:
        noise = np.concatenate([initial_noise(one["seed"], [0], session.sample_shape) for one in requests])
        conditions = session.conditions.take([one["prompt_index"] for one in requests])
        first = requests[0]
        images = session.sample(
            noise=noise,
            steps=first["num_inference_steps"],
            conditions=conditions,
            full_model=first["quality"] == "full",
        )
        return list(images)

    return sample


def with_diffusers(model: str) -> Sample:
    """Sample with the model's pipeline, as its authors would: DDIM, no gradients."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    from unetc.models.find import find_model

    folder = find_model(model).folder  # type: ignore[attr-defined]
    torch.set_num_threads(2)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def sample(requests: Sequence[dict[str, Any]]) -> list[NDArray[np.float32]]:
        images = []
        for one in requests:
            generator = torch.Generator().manual_seed(one["seed"] % 2**32)
            given = {"prompt": one["prompt"], "guidance_scale": one["guidance_scale"]} if one.get("prompt") else {}
            made = pipeline(
                num_inference_steps=one["num_inference_steps"], generator=generator, output_type="np", **given
            )
            images.append(2 * made.images[0].transpose(2, 0, 1) - 1)
        return images

    return sample


def make_app(sample: Sample, batch: int, window: float) -> FastAPI:
    """Make a server that samples batches of requests, one batch after the other."""
    queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[NDArray[np.float32]]]] = asyncio.Queue()
    engine = ThreadPoolExecutor(1)

    async def collect() -> list[tuple[dict[str, Any], asyncio.Future[NDArray[np.float32]]]]:
        """Wait for a request, and then for others that can share its run."""
        found, loop = [await queue.get()], asyncio.get_running_loop()
        end = loop.time() + window
        while len(found) < batch and (left := end - loop.time()) > 0:
            try:
                found.append(await asyncio.wait_for(queue.get(), left))
            except TimeoutError:
                break
        return found

    async def drive() -> None:
        while True:
            found = await collect()
            images = await asyncio.get_running_loop().run_in_executor(engine, sample, [one for one, _ in found])
            for (_, future), image in zip(found, images, strict=True):
                if not future.cancelled():
                    future.set_result(image)

    @asynccontextmanager
    async def lifespan(app: FastAPI):  # type: ignore[no-untyped-def]
        app.state.driver = asyncio.create_task(drive())
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/images/generations")
    async def generate(body: dict[str, Any]) -> dict[str, Any]:
        future: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        await queue.put((body, future))
        image = await future
        png = await asyncio.to_thread(lambda: png_bytes(grid(image[None])))
        return {"data": [{"b64_json": base64.b64encode(png).decode()}]}

    return app


def main() -> None:
    """Serve until the process is ended."""
    kind, what, port = sys.argv[1:]
    sample = with_diffusers(what) if kind == "diffusers" else with_session(Path(what))
    app = make_app(sample, *((BATCH, WINDOW) if kind == "whole" else (1, 0.0)))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
