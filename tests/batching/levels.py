"""Quality levels of a tiny model, as the sessions of a batcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.models import Tiny
from tests.plans import plan_of
from unetc.artifacts.plan import Phase
from unetc.artifacts.profile import GUIDANCE, STEP, with_guidance
from unetc.backend import Backend, Program
from unetc.call import CONTEXT
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTables
from unetc.treatments import Treatment

STEPS = (3, 5, 8)
CONFIG = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": True}
LEVELS = "full", "half", "fast", "guidance", "denoised"
ROUNDING = 2e-5
"""Most `relative_error` of an image made in company: engines choose their kernels by the size of the batch."""

Wrap = Callable[[Program], Program]


@functools.cache
def scheduler_of(name: str) -> SchedulerTables:
    """Make the tables of a scheduler; `ddim` clips, `dpmsolver++` has a history, `ddpm` adds noise in every step."""
    return extract_all(make_scheduler(name, CONFIG), name, STEPS)


@dataclass(frozen=True, eq=False)
class Levels:
    """A full model and plans that share its engines; one treats guidance, and one reuses the denoised sample."""

    tiny: Tiny
    backend: Backend

    @functools.cache  # noqa: B019 (one per module)
    def opened(self, scheduler: str) -> Mapping[str, Session]:
        """Open one session per level, once."""
        return self.sessions(scheduler)

    def sessions(self, scheduler: str, wrap: Wrap = lambda program: program) -> Mapping[str, Session]:
        """Open one session per level; `wrap` changes every loaded program."""
        tiny, means = self.tiny, np.zeros(self.tiny.gated.channels, np.float32)
        level = next(c.name for c in tiny.gated.components if c.kind == "level")
        forecast = {name: Treatment.FORECAST for name in tiny.names if name.endswith("resnets.0")}
        halves = [{GUIDANCE: Treatment.FORECAST}, {GUIDANCE: Treatment.HOLD, level: Treatment.HOLD}]
        steps = [{STEP: Treatment.HOLD}, {STEP: Treatment.FORECAST_X0}]
        assignments = [{}, {level: Treatment.HOLD}, forecast, *halves, *steps]
        engines = with_emissions(assignments, with_guidance(tiny.gated.components))
        loader = self.backend.open_weights(tiny.gated.weights.read_bytes())
        graphs = [
            specialise(tiny.gated, one.in_graph, means, [name for name in one.emits if name != GUIDANCE])
            for one in engines
        ]
        full, *programs = (wrap(loader.load(graph)) for graph in (specialise(tiny.gated, {}, means), *graphs))
        cycles = {"full": (0,), "half": (0, 1), "fast": (0, 2, 1, 2), "guidance": (0, 3, 5, 4), "denoised": (0, 6)}

        def session(phases: Sequence[Phase]) -> Session:
            channels = tiny.inputs(batch=1, height=8, width=8)["sample"].shape[1]
            return Session(
                plan=plan_of(engines, phases),
                full=full,
                programs=programs,
                scheduler=scheduler_of(scheduler),
                sample_shape=(channels, 8, 8),
                steps=STEPS[1],
                predicted_channels=tiny.gated.predicted_channels,
                conditions=self.conditions(1, 0),
                device=self.backend.device,
            )

        return {
            name: session([Phase(low=-20.0, high=1.0, cycle=cycle), Phase(low=1.0, high=20.0, cycle=cycle[::-1])])
            for name, cycle in cycles.items()
        }

    def conditions(self, rows: int, seed: int, *, scale: float = 1.0) -> Conditions:
        """Draw conditions; with a scale, there are negative ones too."""
        drawn = self.tiny.inputs(batch=2 * rows, height=8, width=8, seed=seed)
        if CONTEXT not in drawn:
            return Conditions()
        own, negative = drawn[CONTEXT][:rows], drawn[CONTEXT][rows:]
        return Conditions(own={CONTEXT: own}, negative={CONTEXT: negative} if scale > 1 else {}, scale=scale)
