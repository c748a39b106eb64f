"""Call ranges of an engine: the ranges of batch, height and width that it is built for."""

from __future__ import annotations

from unetc.artifacts.record import Record, require
from unetc.errors import EngineBuildError

SAMPLE = "sample"
"""The input whose batch, height and width determine the other inputs."""
MOST = 2**20
"""Largest size that is accepted."""

Shape = tuple[int, ...]


class Range(Record, frozen=True, kw_only=True):
    """A range of one size, from least to most; the engine is fastest at the usual one."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        """Check the order of the sizes."""
        require(0 < self.least <= self.usual <= self.most <= MOST, f"not in order, or not in 1..{MOST}: {self}")

    @classmethod
    def parse(cls, text: str | int | None, own: int, least: int | None = None) -> Range:
        """Parse one size, two (least and most) or three (least, usual and most), as in '1,2,8'.

        Args:
            text: Input of the user; None for the range from `least` to `own`.
            own: Usual size, if the text does not set it and it is in the range.
            least: Least size if there is no text (default: `own`).

        Raises:
            EngineBuildError: If the text is not one to three positive numbers in order.
        """
        wanted = "expected N, LEAST,MOST or LEAST,USUAL,MOST, each at least 1 and in this order"
        try:
            sizes = [int(part) for part in str(text).split(",")] if text is not None else [least or own, own]
        except ValueError as error:
            raise EngineBuildError(f"cannot read the sizes {text!r}; {wanted}.") from error
        if not 1 <= len(sizes) <= 3 or sizes != sorted(sizes) or not 1 <= sizes[0] <= sizes[-1] <= MOST:
            raise EngineBuildError(f"cannot build for the sizes {text!r}; {wanted}.")
        usual = sizes[1] if len(sizes) == 3 else min(max(own, sizes[0]), sizes[-1])
        return cls(least=sizes[0], usual=usual, most=sizes[-1])

    def __str__(self) -> str:
        """Format for `parse`."""
        sizes = (self.least, self.usual, self.most)
        return str(self.usual) if self.least == self.most else ",".join(map(str, sizes))

    def corners(self) -> Shape:
        """Return the least, the usual and the largest size."""
        return self.least, self.usual, self.most

    def including(self, size: int) -> Range:
        """Return the range widened to a size."""
        return Range(least=min(self.least, size), usual=self.usual, most=max(self.most, size))


class Sizes(Record, frozen=True, kw_only=True):
    """Call ranges: one range for each size that a caller may choose."""

    batch: Range
    height: Range
    width: Range

    def including(self, batch: int, height: int, width: int) -> Sizes:
        """Return the ranges widened to a call."""
        return Sizes(
            batch=self.batch.including(batch), height=self.height.including(height), width=self.width.including(width)
        )

    def one_side_varies(self) -> bool:
        """Check whether one of height and width is a range and the other a single size."""
        return (self.height.least == self.height.most) != (self.width.least == self.width.most)

    def options(self) -> str:
        """Format as options of `unetc compile`."""
        return f"--batch {self.batch} --height {self.height} --width {self.width}"
