"""The classes of a class-conditional denoiser."""

from __future__ import annotations

from .record import Record, require


class Classes(Record, frozen=True, kw_only=True):
    """Labels that a denoiser takes: whole numbers from 0, perhaps with names, and perhaps one that means no class."""

    count: int
    """Number of labels, the one that means no class included."""
    names: tuple[str, ...] = ()
    """Name of each class, by label; empty if the classes have no names."""
    no_class: int | None = None
    """Label that means no class, which guidance needs; None without."""

    def __post_init__(self) -> None:
        """Check that every name means one class."""
        require(self.count > 0, f"there must be a class, got {self.count}")
        known = f"there are {self.count} labels"
        require(self.no_class is None or 0 <= self.no_class < self.count, f"no_class is {self.no_class}, but {known}")
        require(not self.names or len(self.names) == len(self.labels), f"{len(self.names)} classes have names, {known}")
        require(len({*map(_folded, self.names)}) == len(self.names), f"two classes have the same name: {self.names}")
        for name in self.names:
            plain = name.strip() == name and name and "," not in name and not name.isdecimal()
            require(bool(plain), f"{name!r} cannot be the name of a class: it must be a word without commas")

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels of classes, without the one that means no class."""
        return tuple(label for label in range(self.count) if label != self.no_class)

    @property
    def words(self) -> tuple[str, ...]:
        """One word per class: its name, or its label where it has none."""
        return self.names or tuple(map(str, self.labels))

    def find(self, word: str) -> int | None:
        """Return the label of a class from its name, in any case, or from its number; None if there is no such."""
        own = {_folded(name): label for name, label in zip(self.names, self.labels, strict=False)}
        own |= {str(label): label for label in range(self.count)}
        return own.get(_folded(word))

    def describe(self) -> str:
        """Describe the labels that a user may choose."""
        numbers = f"whole numbers from 0 to {self.count - 1}"
        return f"{numbers}, or {', '.join(self.names)}" if self.names else numbers


def _folded(name: str) -> str:
    return name.strip().casefold()
