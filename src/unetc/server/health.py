"""Health of the server: whether it lives, whether it takes requests, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from .door import Door
from .errors import Problem
from .service import Service, State


def make_router(service: Service) -> APIRouter:
    """Make the routes of `/health` and `/metrics`."""
    router = APIRouter(tags=["health"])

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> JSONResponse:
        """Check whether the process can go on; a supervisor restarts it if not."""
        failed = service.state is State.FAILED
        return JSONResponse({"status": service.state.value}, 503 if failed else 200)

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        """Check whether every engine has made a warm-up call, and requests are taken."""
        answers = {name: served.loaded for name, served in service.models.items()}
        status = 200 if service.state is State.READY else 503
        return JSONResponse({"status": service.state.value, "models": answers}, status)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Write the metrics for Prometheus."""
        return Response(await service.scrape(), media_type=CONTENT_TYPE_LATEST)

    return router


def error_body(problem: Problem) -> dict[str, Any]:
    """Write an error."""
    return {"error": {"code": problem.code, "message": problem.message}}


DOOR = Door(prefixes=("/",), router=make_router, error=error_body, open=("/health/live", "/health/ready"))
"""Also the form of errors for paths of no door."""
