"""The application in this process, for tests that need no socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import httpx2

from unetc.server.app import make_app
from unetc.server.service import Service, State
from unetc.server.settings import BundleSource, ServerSettings


@asynccontextmanager
async def local(bundle: Path, **settings: Any) -> AsyncIterator[tuple[httpx2.AsyncClient, Service]]:
    """Serve a bundle as `plain`, and wait until the service is ready."""
    service = Service.open(ServerSettings(bundles=(BundleSource(path=bundle, name="plain"),), **settings))
    app = make_app(service)
    async with app.router.lifespan_context(app):
        while service.state is State.LOADING:
            await asyncio.sleep(0.01)
        assert service.state is State.READY, service.failure
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield client, service


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run
