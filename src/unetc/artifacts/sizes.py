"""The heights and widths of samples that a denoiser can take."""

from __future__ import annotations

from .record import Record, require


class SampleSizes(Record, frozen=True, kw_only=True):
    """Sizes of samples that a denoiser can take, in pixels of the sample."""

    multiple: int
    """Height and width must be multiples of this."""
    smallest: int = 1
    """Smallest height and width."""
    largest: int | None = None
    """Largest height and width; None if there is no limit."""
    only: tuple[int, int] | None = None
    """The only height and width; None if they are free."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        numbers = (self.multiple, self.smallest, self.largest or 1, *(self.only or ()))
        require(min(numbers) > 0, f"sizes must be positive: {self}")

    def problem(self, height: int, width: int) -> str | None:
        """Say why the denoiser cannot take a sample of this height and width, and which sizes it takes.

        Returns:
            Sentences for an error message; None if it can take the sample.
        """
        got = f"the denoiser cannot take samples of height {height} and width {width}"
        if self.only is not None:
            if (height, width) == self.only:
                return None
            return f"{got}: its size is fixed. Expected height {self.only[0]} and width {self.only[1]}."
        if all(self._takes(side) for side in (height, width)):
            return None
        limit = f" from {self.smallest}" if self.smallest > self.multiple else ""
        limit += "" if self.largest is None else f" up to {self.largest}"
        near = " and ".join(
            f"{name} {' or '.join(map(str, self._nearest(side)))}"
            for name, side in (("height", height), ("width", width))
            if not self._takes(side)
        )
        return f"{got}. Expected multiples of {self.multiple}{limit}. Nearest: {near}."

    def _takes(self, side: int) -> bool:
        return side >= self.smallest and side % self.multiple == 0 and (self.largest is None or side <= self.largest)

    def _nearest(self, side: int) -> list[int]:
        """Find the possible sizes just below and just above a side."""
        below = max(side, self.smallest) // self.multiple * self.multiple
        if self.largest is not None:
            below = min(below, self.largest // self.multiple * self.multiple)
        return [size for size in (below, below + self.multiple) if self._takes(size)]
