"""The command that serves on Ray: it starts Ray or joins a cluster, deploys the application, and drains it at the end.

The command itself answers no requests: proxies of Ray Serve take them, and `unetc.server.replicas` answers.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client  # nothing public tells the address of the proxies
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from unetc.errors import SessionError, brief
from unetc.ray_token import LOCAL
from unetc.ray_workers import connect

from .process import Ending, listen
from .replicas import APPLICATION, LAST_ANSWERS_S, deployed, needs
from .service import Service
from .settings import ReplicaRange, ServerSettings

_LOOPBACK = "127.0.0.1"
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}
"""Names of resources in a cluster, by those in the needs of a replica."""
_LOOK_S = 2.0
"""Seconds between two looks at the application."""
_DRAIN_S = 0.2
"""Seconds between two counts of unfinished requests."""


def run(
    service: Service,
    replicas: ReplicaRange,
    address: str,
    on_ready: Callable[[str], object],
    on_note: Callable[[str], object],
) -> Ending:
    """Serve on Ray until a signal ends the process, as `unetc.server.process.run` does.

    If another command deploys the application to the same cluster meanwhile, this one ends and leaves it alone.

    Args:
        service: The models, whose engines are loaded in other processes.
        replicas: Number of processes that serve.
        address: The address of a running Ray, `auto` to find it, or `LOCAL` to start one.
        on_ready: Called with the address of the server, once the engines of all replicas have made a call.
        on_note: Called before that with notes for the user.

    Raises:
        SessionError: If the cluster cannot be reached, the deployment fails, or a Ray that is started here has too few
            cores or GPUs. In a running cluster, replicas wait for machines.
    """
    with _connected(address):
        try:
            if address == LOCAL:
                _check_room(service, replicas)
            elif not _has_room(service):
                on_note(f"no machine of the cluster has {_counted(service)} for a replica; waiting for one.")
            shown = _start(service.settings, "HeadOnly" if address == LOCAL else "EveryNode", on_note)
            owner = secrets.token_hex(8)
            with _withdrawing(owner):
                handle = serve.run(deployed(service, replicas, owner), name=APPLICATION, route_prefix="/")
                with _signals() as signals:
                    on_ready(shown)
                    return _until_the_end(handle, owner, signals, service.settings.drain)
        except (RayError, RayServeException, RuntimeError) as error:
            raise SessionError(f"cannot go on serving on Ray: {_last_line(error)}") from error


@contextlib.contextmanager
def _withdrawing(owner: str) -> Iterator[None]:
    """Delete the application if an error or a signal ends the enclosed code, unless replicas of another command answer.

    Without an owner, it would take cores and answer for ever.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(RayError, RayServeException, RuntimeError):
            owners = set(_ask_all(serve.get_app_handle(APPLICATION), "owner")) - {None}
            if not owners or owner in owners:
                serve.delete(APPLICATION)
        raise


def _start(settings: ServerSettings, proxies: str, on_note: Callable[[str], object]) -> str:
    """Start Ray Serve, unless the cluster runs it, and return the address of its proxies.

    Raises:
        SessionError: If the address is taken.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        with contextlib.closing(listen(settings.host, settings.port)) as listening:
            port = listening.getsockname()[1]
        serve.start(
            proxy_location=proxies,
            http_options={"host": settings.host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        client = _get_global_client()
    options = client.http_config
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{options.port}"
    if (options.host, options.port) != (settings.host, settings.port) and settings.port:
        on_note(f"the cluster serves at {address} already, so --host and --port change nothing.")
    return address


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Join a cluster, or start one for this process alone; leave or end it afterwards."""
    started: dict[str, Any] = {"_node_ip_address": _LOOPBACK, "include_dashboard": False} if address == LOCAL else {}
    try:
        connect(address, **started)
    except (OSError, RuntimeError, ValueError) as error:
        raise SessionError(
            f"cannot reach Ray at {address[:100]!r}: {brief(error)}. Expected local, auto, or HOST:PORT of its head. "
            "Where Ray asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if address == LOCAL:
            serve.shutdown()
        ray.shutdown()


def _check_room(service: Service, replicas: ReplicaRange) -> None:
    """Refuse more replicas than the cores and GPUs of this machine can run.

    Raises:
        SessionError: If there is no room for them.
    """
    there = ray.cluster_resources()
    for name, each in needs(service).items():
        resource = _RESOURCES[name]
        advice = " or --threads" if resource == "CPU" else ""
        if replicas.most * each > there.get(resource, 0):
            raise SessionError(
                f"{replicas.most} replicas of {each:g} {resource}s need {replicas.most * each:g}, but this machine has "
                f"{there.get(resource, 0):g}. Lower --replicas{advice}."
            )


def _has_room(service: Service) -> bool:
    """Check whether a machine of the cluster could run a replica, if nothing else ran there."""
    wanted = {_RESOURCES[name]: count for name, count in needs(service).items()}
    return any(
        all(node["Resources"].get(resource, 0) >= count for resource, count in wanted.items())
        for node in ray.nodes()
        if node["Alive"]
    )


def _counted(service: Service) -> str:
    """Write the cores and GPUs of a replica."""
    return " and ".join(f"{count:g} {_RESOURCES[name]}s" for name, count in needs(service).items())


@contextlib.contextmanager
def _signals() -> Iterator[threading.Semaphore]:
    """Count SIGTERM and SIGINT, as far as the main thread has not taken them from the semaphore."""
    signals = threading.Semaphore(0)

    def count(_: int, __: FrameType | None) -> None:
        signals.release()

    before = {number: signal.signal(number, count) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_the_end(handle: DeploymentHandle, owner: str, signals: threading.Semaphore, drain: float) -> Ending:
    """Wait for a signal; then let accepted requests finish, for some seconds or until a second signal.

    Args:
        handle: Reaches the replicas.
        owner: The name that this command has given its replicas. When others have taken their place, it ends.
        signals: Counts signals.
        drain: Seconds for accepted requests.
    """
    while not signals.acquire(timeout=_LOOK_S):
        owners = set(_ask_all(handle, "owner")) - {None}
        if (owners and owner not in owners) or APPLICATION not in serve.status().applications:
            return Ending(given_up=0, threads_left=False)
    ends = time.monotonic() + drain
    left = 0
    while any(answer != 0 for answer in _ask_all(handle, "drain")):  # a silent replica may have accepted requests
        if signals.acquire(timeout=_DRAIN_S) or time.monotonic() >= ends:
            left = sum(answer or 0 for answer in _ask_all(handle, "give_up"))
            break
    serve.delete(APPLICATION)
    return Ending(given_up=left, threads_left=False)


def _ask_all(handle: DeploymentHandle, question: str) -> list[Any]:
    """Ask all replicas, and return the answers of those that live, with None for one that is too busy."""
    try:
        answers = handle.broadcast(question).results(timeout_s=LAST_ANSWERS_S, return_exceptions=True)
    except RayServeException:  # there is no replica
        return []
    except TimeoutError:
        return [None]
    timely = (None if isinstance(answer, TimeoutError) else answer for answer in answers)
    return [answer for answer in timely if not isinstance(answer, BaseException)]


def _last_line(error: Exception) -> str:
    """Return the last line of a message, where Ray puts the error of a replica below its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return brief(Exception(lines[-1])) + "." if lines else type(error).__name__
