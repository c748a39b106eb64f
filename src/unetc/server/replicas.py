"""Replicas: the application of `unetc.server.app` in several processes, as a deployment of Ray Serve.

Every replica serves all models, and admits or refuses its requests itself. Two things live in one replica only:

- A job. Its name begins with the replica's, so that `Router` sends requests about it there. The request that made it
  counts as running until the images are fetched, so that Ray ends no replica under it.
- The requests of a client of A1111, for progress and interrupt. `Router` sends those of one API key to one replica.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unetc.errors import SessionError
from unetc.runtime.batching.limits import SEATS

from .app import REQUEST_ID, make_app
from .errors import NotReady
from .keys import key_of
from .metrics import Together
from .service import Service, State
from .settings import ApiKeys, BundleSource, ReplicaRange, ServerSettings

APPLICATION, DEPLOYMENT = "unetc", "server"
"""Names in Ray Serve."""
LAST_ANSWERS_S = 5.0
"""Seconds for answers that are being sent when a replica ends."""
_MOST_REQUESTS = 2**15
"""Requests that Ray gives to a replica at once: all of them, so that ours is the only queue, with its 429."""
_HEALTH_S = 1.0
"""Seconds between two looks at a replica; one that has died is replaced after that."""
_TRIES = 3
"""Attempts to start a replica before a new deployment fails."""
_AGAIN_S = 0.1
"""Seconds before another request to a replica that is about to end."""
_JOBS = "/v1/jobs/"
_JOB = re.compile(rb"/v1/jobs/(\w+)-")
"""A job, with the name of its replica."""
_A1111 = b"/sdapi/v1/"
_CLIENT = re.compile(rb"(?i:bearer|basic) +[!-~]+")
"""A client of A1111, by its API key."""


class Replica:
    """One process with the application and its engines."""

    def __init__(self, settings: ServerSettings, owner: str) -> None:
        """Load the engines: Ray sends no request before that.

        Args:
            settings: Bundles and limits.
            owner: The command that deploys it.

        Raises:
            UnetcError: If a bundle cannot be opened, or an engine fails.
        """
        self._owner = owner
        self._service = Service.open(settings)
        self._service.load()
        self._name: str = serve.get_replica_context().replica_tag
        self._service.job_prefix = f"{self._name}-"
        self._service.scrape = self._scrape
        self._jobs = Jobs(self._service)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Make the application, as Ray asks for it."""
        app = make_app(self._service)
        app.add_middleware(Held, jobs=self._jobs)
        return app

    async def check_health(self) -> None:
        """Tell Ray to replace this replica when its engines cannot go on.

        Raises:
            SessionError: In that case.
        """
        if self._service.state is State.FAILED:
            raise SessionError("the engines cannot go on.") from self._service.failure

    async def owner(self) -> str:
        """Return the command that deployed it."""
        return self._owner

    async def drain(self) -> int:
        """Take no more requests, and count those that are not finished or not fetched."""
        self._service.drain()
        return self._service.unfinished + self._service.unfetched()

    async def give_up(self) -> int:
        """Fail the requests that are not finished, and count them."""
        self._jobs.release()
        return self._service.give_up(
            NotReady("the server ended before the request was finished. Send it to another server, or again.")
        )

    async def families(self) -> tuple[str, list[Metric]]:
        """Read the metrics of this replica, with its name."""
        return self._name, self._service.metrics.families()

    async def _scrape(self) -> bytes:
        """Write the metrics of all replicas."""
        answers = serve.get_deployment_handle(DEPLOYMENT).broadcast("families")
        found = await answers.results_async(return_exceptions=True)
        return Together(dict(one for one in found if not isinstance(one, BaseException))).to_text()


class Jobs:
    """Requests that made jobs, and run until their jobs are settled."""

    def __init__(self, service: Service) -> None:
        """Begin without any."""
        self._service = service
        self._holding: set[asyncio.Task[None]] = set()

    async def hold(self, job: str) -> None:
        """Wait until a job is settled, or all are given up."""
        task = asyncio.ensure_future(self._settled(job))
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)
        await asyncio.wait({task})

    async def _settled(self, job: str) -> None:
        await self._service.settled(job)

    def release(self) -> None:
        """Wait no longer."""
        for task in self._holding:
            task.cancel()


class Held:
    """Lets a request that made a job run until the job is settled; its client has the answer long before."""

    def __init__(self, app: ASGIApp, *, jobs: Jobs) -> None:
        """Wrap an application."""
        self._app = app
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and wait for the job that it made."""
        made = ""

        async def noted(message: Message) -> None:
            nonlocal made
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers[REQUEST_ID]  # Ray's proxy adds the same
                made = headers.get("Location", "")
            await send(message)

        await self._app(scope, receive, noted)
        if made.startswith(_JOBS):
            await self._jobs.hold(made.rpartition("/")[2])


class Router(RequestRouter):
    """Chooses the less busy of two replicas, unless a request belongs to a certain one.

    A replica that is about to end is still asked about its jobs. Ray routes nothing to it, but it answers until its
    last request is finished.
    """

    def initialize_state(self, *, keep: float) -> None:
        """Take the arguments of `RequestRouterConfig`.

        Args:
            keep: Seconds for which a replica that Ray no longer lists may have jobs.
        """
        self._keep = keep
        self._leaving: dict[ReplicaID, float] = {}
        """Times at which to forget replicas that are about to end."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run, and remember the others for their jobs."""
        now = time.monotonic()
        listed = {replica.replica_id for replica in replicas}
        ends = {name: self._leaving.get(name, now + self._keep) for name in self.curr_replicas if name not in listed}
        self._leaving = {name: end for name, end in ends.items() if end > now}
        super().update_replicas([*replicas, *(self.curr_replicas[name] for name in self._leaving)])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica."""
        self._leaving.pop(replica_id, None)
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Choose the replica to which a request belongs, or two at random; Ray takes the less busy one."""
        running = [one for one in candidate_replicas if one.replica_id not in self._leaving]
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # or Ray asks without a pause while none can be had
            owner = _owner(pending_request.args, candidate_replicas, running)
            if owner is not None and owner.replica_id in self._leaving:
                await asyncio.sleep(_AGAIN_S)  # it may refuse everything, shortly before it ends
            if owner is not None:
                return [[owner]]
        return [random.sample(running, min(2, len(running)))]


def _owner(
    arguments: Sequence[object], known: Sequence[RunningReplica], running: Sequence[RunningReplica]
) -> RunningReplica | None:
    """Find the replica to which a request belongs; None if any may answer.

    Args:
        arguments: The arguments of a call in Ray. A request of HTTP is a pickle, which is searched and not unpacked; a
            match elsewhere than in the address does no harm.
        known: All replicas.
        running: Those that are not about to end.
    """
    packed = arguments[0] if arguments else None
    if not isinstance(packed, bytes):
        return None
    if job := _JOB.search(packed):
        name = job[1].decode()
        return next((one for one in known if one.replica_id.unique_id == name), None)
    if _A1111 in packed:
        client = _CLIENT.search(packed)
        key = key_of(client[0].decode()) if client else ""
        return max(running, key=lambda one: _weight(one.replica_id.unique_id, key), default=None)
    return None


def _weight(replica: str, key: str) -> bytes:
    """Rank a replica for a client, so that few clients move when replicas come and go."""
    return hashlib.sha256(f"{replica} {key}".encode()).digest()


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Make the application from the arguments of a configuration file of Ray Serve.

    Args:
        arguments: `bundles`, a list of [NAME=]BUNDLE; optionally `replicas` as MIN:MAX, `api_keys` as the path of a
            file, and other fields of `ServerSettings`.

    Raises:
        UnetcError: If an argument or a bundle is wrong.
    """
    given = dict(arguments)
    replicas = ReplicaRange.parse(str(given.pop("replicas", "1")))
    bundles = tuple(BundleSource.parse(text) for text in given.pop("bundles", ()))
    keys = given.pop("api_keys", None)
    try:
        settings = ServerSettings(bundles=bundles, api_keys=None if keys is None else ApiKeys.read(Path(keys)), **given)
    except TypeError as error:
        raise SessionError(f"cannot read the arguments of the application: {error}.") from error
    return deployed(Service.open(settings), replicas)


def deployed(service: Service, replicas: ReplicaRange, owner: str = "") -> serve.Application:
    """Describe a deployment to Ray Serve.

    Args:
        service: The models, which every replica opens again; no engine need be loaded.
        replicas: Their number.
        owner: The command that deploys them; nothing for a configuration file.
    """
    settings = service.settings
    sources = tuple(replace(source, path=source.path.absolute()) for source in settings.bundles)
    scale: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": SEATS,  # beyond, images wait
            }
        }
    longest = settings.drain + LAST_ANSWERS_S
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options=needs(service),
        max_ongoing_requests=_MOST_REQUESTS,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=longest,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_S,
        max_constructor_retry_count=_TRIES,
        request_router_config=RequestRouterConfig(request_router_class=Router, request_router_kwargs={"keep": longest}),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **scale,
    )
    return deployment.bind(replace(settings, bundles=sources), owner)


def needs(service: Service) -> dict[str, float]:
    """Return the cores and GPUs of one replica, as Ray counts them."""
    settings = service.settings
    manifests = [served.bundle.manifest for served in service.models.values()]
    targets = [(settings.target or manifest.target).split(":") for manifest in manifests]
    threads = [
        (manifest.threads if settings.threads is None else settings.threads) or os.cpu_count() or 1
        for manifest, target in zip(manifests, targets, strict=True)
        if "cpu" in target
    ]
    on_gpu = len(threads) < len(targets)
    return {"num_cpus": max(threads, default=1), **({"num_gpus": 1} if on_gpu else {})}
