"""The loop's bundle names, in place of each graph, the model of Triton that runs it."""

from __future__ import annotations

from unetc.artifacts.record import Artifact, require


class ServedGraph(Artifact, frozen=True, kw_only=True):
    """The model that runs a graph, and the tensors that it takes and returns."""

    model: str
    """Name of the model."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """The prediction first, then the branches that the graph emits."""
    most_rows: int | None
    """Largest batch of the model; None if the graph has a fixed one, which Triton does not see as a batch."""

    def __post_init__(self) -> None:
        """Check that there is an output, and room for a row."""
        require(bool(self.outputs), f"{self.model} has no output")
        require(self.most_rows is None or self.most_rows > 0, f"{self.model} takes {self.most_rows} rows")
