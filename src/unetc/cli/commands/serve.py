"""`unetc serve`: bundle → server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..groups import Group
from ..options import BundleTarget, BundleThreads, Json


class LoadGroup(Group, panel="Under load"):
    """Limits for the time when requests come faster than images can be made."""

    queue: Annotated[int, typer.Option(min=1, help="Most images that wait; further requests get 429.")] = 64
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request is given up; requests may ask for fewer.")
    ] = 300.0
    degrade_to: Annotated[
        str | None,
        typer.Option(help="Fastest quality level to step down to under load, as 55% (default: never step down)."),
    ] = None
    target_p95: Annotated[
        float | None,
        typer.Option(min=0.01, help="Seconds in which requests are to be finished; beyond, the server steps down."),
    ] = None
    drain: Annotated[float, typer.Option(min=0, help="Seconds for accepted requests to finish after SIGTERM.")] = 30.0


class AccessGroup(Group, panel="Access and limits"):
    """Clients that are let in, and limits of their requests."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; a request must show one (default: none needed).")
    ] = None
    max_images: Annotated[int, typer.Option(min=1, help="Most images of one request.")] = 16
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Most pixels of one image (default: 16 times the model's own, at most 4194304)."),
    ] = None
    max_body: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MiB.")] = 16


class RayGroup(Group, panel="On Ray"):
    """Several processes, on one machine or many."""

    ray: Annotated[
        str | None,
        typer.Option(
            help="Serve on Ray, with the extra ray: local starts it here, auto or HOST:PORT joins a cluster.",
            metavar="ADDRESS",
        ),
    ] = None
    replicas: Annotated[
        str, typer.Option(help="Processes that serve; MIN:MAX for as many as the load needs.", metavar="MIN[:MAX]")
    ] = "1"


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(help="Bundle folders; name=folder gives a model another name.", metavar="[NAME=]BUNDLE..."),
    ],
    access: AccessGroup,
    load: LoadGroup,
    on_ray: RayGroup,
    target: BundleTarget = None,
    memory: Annotated[str, typer.Option(metavar="fast|low", help="fast, or low: weights are held once.")] = "fast",
    threads: BundleThreads = None,
    as_json: Json = False,
) -> None:
    """Serve bundles to many clients at once, behind the APIs of OpenAI and others. Needs the extra serve.

    Requests share engine calls, whatever their step, seed or quality level.
    """
    import contextlib

    from unetc.ray_token import guard
    from unetc.server.app import make_app
    from unetc.server.process import address_of, leave, listen, run
    from unetc.server.service import Service
    from unetc.server.settings import ApiKeys, BundleSource, ReplicaRange, ServerSettings

    from ..output import ERR, OUT, print_json, progress, say

    replicas = ReplicaRange.parse(on_ray.replicas)
    if on_ray.ray is None and replicas.most > 1:
        raise typer.BadParameter("--replicas needs --ray, as in --ray local.")
    settings = ServerSettings(
        bundles=tuple(BundleSource.parse(text) for text in bundles),
        host=access.host,
        port=access.port,
        api_keys=None if access.api_keys is None else ApiKeys.read(access.api_keys),
        target=target,
        threads=threads,
        memory=memory,
        queue=load.queue,
        deadline=load.deadline,
        degrade_to=load.degrade_to,
        target_p95=load.target_p95,
        drain=load.drain,
        images=access.max_images,
        pixels=access.max_pixels,
        body_bytes=access.max_body * 2**20,
    )
    shown = contextlib.ExitStack()
    on_progress = shown.enter_context(progress())

    def announce(address: str) -> None:
        shown.close()
        if as_json:
            models = {name: list(served.levels) for name, served in service.models.items()}
            print_json({"address": address, "models": models})
        else:
            for name, served in service.models.items():
                say(f"serving {name} at {address} with quality {', '.join(served.levels)}")
            say(_example(address, needs_key=settings.api_keys is not None))
        OUT.file.flush()

    with shown:
        if on_ray.ray is not None:
            guard(on_ray.ray)
            from unetc.server import cluster

            service = Service.open(settings)
            ending = cluster.run(service, replicas, on_ray.ray, announce, lambda note: say(note, ERR))
        else:
            listening = listen(settings.host, settings.port)
            address = address_of(listening)
            service = Service.open(settings)
            ending = run(make_app(service, on_progress=on_progress), listening, lambda: announce(address))
    ERR.print(ending.message)
    if ending.threads_left:
        leave()


def _example(address: str, *, needs_key: bool) -> str:
    """Write a command that asks for an image."""
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    return f"""curl {address}/v1/images/generations -H 'Content-Type: application/json'{key} -d '{{"seed": 1}}'"""
