"""Sizes that an engine is built for: a range of each size that a caller may choose."""

from __future__ import annotations

from unetc.artifacts.record import Record, require
from unetc.errors import EngineBuildError

SAMPLE = "sample"
"""The input whose batch, height and width the others follow."""
MOST = 2**20
"""No size is larger."""

Shape = tuple[int, ...]


class Range(Record, frozen=True, kw_only=True):
    """Sizes from least to most; the engine is fastest at the usual one."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        """Check the order."""
        require(0 < self.least <= self.usual <= self.most <= MOST, f"not in order, or not in 1..{MOST}: {self}")

    @classmethod
    def parse(cls, text: str | None, own: int, least: int | None = None) -> Range:
        """Read one size, two (least and most) or three (least, usual and most), as in '1,2,8'.

        Args:
            text: What the user gave; None for `least` to `own`.
            own: What is usual if it is not said and lies in the range.
            least: Least size if nothing is said (default: `own`).

        Raises:
            EngineBuildError: If these are not one to three positive numbers in order.
        """
        wanted = "expected N, LEAST,MOST or LEAST,USUAL,MOST, each at least 1 and in this order"
        try:
            sizes = [int(part) for part in text.split(",")] if text is not None else [least or own, own]
        except ValueError as error:
            raise EngineBuildError(f"cannot read the sizes {text!r}; {wanted}.") from error
        if not 1 <= len(sizes) <= 3 or sizes != sorted(sizes) or not 1 <= sizes[0] <= sizes[-1] <= MOST:
            raise EngineBuildError(f"cannot build for the sizes {text!r}; {wanted}.")
        usual = sizes[1] if len(sizes) == 3 else min(max(own, sizes[0]), sizes[-1])
        return cls(least=sizes[0], usual=usual, most=sizes[-1])

    def __str__(self) -> str:
        """Write as `parse` reads."""
        sizes = (self.least, self.usual, self.most)
        return str(self.usual) if self.least == self.most else ",".join(map(str, sizes))

    def corners(self) -> Shape:
        """List the three sizes."""
        return self.least, self.usual, self.most

    def including(self, size: int) -> Range:
        """Widen, so that a size is in the range."""
        return Range(least=min(self.least, size), usual=self.usual, most=max(self.most, size))


class Sizes(Record, frozen=True, kw_only=True):
    """Ranges of what a caller may choose."""

    batch: Range
    height: Range
    width: Range

    def including(self, batch: int, height: int, width: int) -> Sizes:
        """Widen, so that a call is in the range."""
        return Sizes(
            batch=self.batch.including(batch), height=self.height.including(height), width=self.width.including(width)
        )

    def one_side_varies(self) -> bool:
        """Tell whether one of height and width is a range and the other one size."""
        return (self.height.least == self.height.most) != (self.width.least == self.width.most)

    def options(self) -> str:
        """Write as options of `unetc compile`."""
        return f"--batch {self.batch} --height {self.height} --width {self.width}"
