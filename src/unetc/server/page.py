"""The page at `/`: one file without outside resources, and the facts about the models that it shows."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from unetc.artifacts.plan import Plan
from unetc.errors import RequestError
from unetc.percent import percent
from unetc.runtime.batching.request import FULL, SampleRequest

from .door import Door
from .health import error_body
from .service import Level, Served, Service


def make_router(service: Service) -> APIRouter:
    """Make the routes of the page."""
    router = APIRouter(tags=["page"])

    @router.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """Show the page."""
        html, policy = _page()
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(html, headers=headers)

    @router.get("/page/models")
    async def models() -> dict[str, Any]:
        """Describe the models for the page."""
        service.check_ready()
        return {"models": [_describe(served) for served in service.models.values()]}

    @router.get("/page/levels")
    async def levels(model: str, steps: int) -> dict[str, Any]:
        """Estimate the time of every level for a number of steps, and list the phase of each step."""
        service.check_ready()
        served = service.find(model)
        if steps not in served.steps:
            raise RequestError(f"steps is {steps}. Expected one of {', '.join(map(str, served.steps))}.", "steps")
        full = served.batcher.estimate(SampleRequest(steps=steps)).seconds
        return {"levels": [_timed(served, level, steps, full) for level in served.levels.values()]}

    return router


DOOR = Door(prefixes=("/page",), router=make_router, error=error_body, open=("/",))


@cache
def _page() -> tuple[str, str]:
    """Read the page, and make the policy that allows exactly its script and its style sheet."""
    html = files(__package__).joinpath("page.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in found)

    policy = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html, "; ".join(f"{name} {value}" for name, value in policy.items())


def _describe(served: Served) -> dict[str, Any]:
    """Describe a model: its prompts, its steps and its quality levels."""
    prompts, manifest = served.prompts, served.bundle.manifest
    height, width = served.size
    choices = list(prompts.prompts)
    if prompts.free:
        kind, choices = "free", []
    elif prompts.classes is not None:
        kind, choices = "labels", list(prompts.classes.words)
    else:
        kind = "list" if choices else "none"
    return {
        "name": served.name,
        "about": f"{width} × {height} pixels, {manifest.scheduler.name}, {manifest.target}",
        "prompts": kind,
        "choices": choices,
        "guided": prompts.guided and prompts.guidance_scale > 1,
        "guidance_scale": prompts.guidance_scale,
        "steps": manifest.steps,
        "step_counts": list(served.steps),
        "levels": [_level(level) for level in served.levels.values()],
    }


def _level(level: Level) -> dict[str, Any]:
    """Describe a quality level and its measured damage."""
    if level.name == FULL:
        return {"name": FULL, "title": "Full model", "describes": "The reference: every step as it was trained."}
    near = "" if level.psnr is None else f", PSNR {level.psnr:.0f} dB"
    return {
        "name": level.name,
        "title": f"Saves {percent(1 - level.time_ratio)}",
        "describes": f"Level {level.name}: relative L2 {level.relative_l2:.2g}{near}.",
    }


def _timed(served: Served, level: Level, steps: int, full: float) -> dict[str, Any]:
    """Estimate the time of an image, and list the phase of each step: null where the full model runs.

    Args:
        served: The model.
        level: The level.
        steps: Number of steps.
        full: Estimated seconds of the full model. Levels that have not run yet have no better estimate than their
            share of it, as the build measured it.
    """
    session = served.sessions[level.name]
    levels = session.scheduler.table(steps).log_snr.tolist()
    phases = [None if level.name == FULL else _phase(session.plan, log_snr) for log_snr in levels]
    return {"name": level.name, "seconds": full * level.time_ratio, "schedule": phases}


def _phase(plan: Plan, log_snr: float) -> int:
    """Return the index of the phase at a noise level."""
    return sum(log_snr >= later.low for later in plan.phases[1:])
