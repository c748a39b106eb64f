"""What components produced at earlier steps, for one request.

An engine that is refreshed *emits* the branch of a component; one that holds or forecasts it takes it as an input. The
tensors are what the backend's programs emit: nobody but the backend looks into them, so they stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from unetc.device import HOST, Device, Tensor

COMPUTED = "computed."
"""Prefix of an engine's outputs: the branch of the component with this index, as just computed."""
HELD = "held."
"""Prefix of an engine's inputs: the branch at the last step that computed it."""
EARLIER = "earlier."
"""Prefix of an engine's inputs: the branch at the step before that which computed it."""
EXTRAPOLATION = "extrapolation."
"""Prefix of an engine's inputs, [1]: how far ahead a forecast looks, in distances between `EARLIER` and `HELD`."""


@dataclass(slots=True)
class Held:
    """The last two values of every component that was emitted; made anew for each request."""

    device: Device = HOST
    """Where the inputs are made."""
    _history: dict[str, tuple[tuple[float, Tensor], ...]] = field(default_factory=dict)
    """By component: timestep and value, newest first."""
    _factors: dict[float, Tensor] = field(default_factory=dict)
    """Inputs that say how far a forecast looks; steps of one distance look equally far."""

    def remember(self, emitted: Mapping[str, Tensor], timestep: float) -> None:
        """Take what an engine emitted at a step."""
        for name, value in emitted.items():
            key = name.removeprefix(COMPUTED)
            self._history[key] = ((timestep, value), *self._history.get(key, ())[:1])

    def inputs(self, timestep: float) -> dict[str, Tensor]:
        """Make the inputs of engines that hold or forecast at a step.

        A component that was computed once only is held: its forecast reaches nowhere.
        """
        inputs: dict[str, Tensor] = {}
        for key, history in self._history.items():
            (last, held), (before, earlier) = history[0], history[-1]
            factor = (timestep - last) / (last - before) if last != before else 0.0
            inputs[HELD + key] = held
            inputs[EARLIER + key] = earlier
            if factor not in self._factors:
                self._factors[factor] = self.device.full((1,), factor)
            inputs[EXTRAPOLATION + key] = self._factors[factor]
        return inputs
