"""Loads a bundle again and again, in a process that does nothing else, and prints its usage as JSON after every load:

python -m tests.promises.loads BUNDLE COUNT
"""

from __future__ import annotations

import sys
from itertools import cycle, islice, product
from pathlib import Path

import msgspec

import unetc
from tests.promises.usage import Usage

MODES = tuple(product(("fast", "low"), (False, True)))
"""Memory mode, and whether the full model samples: it is loaded when it is first called."""


def main(bundle: Path, count: int) -> None:
    """Load, sample and unload."""
    for memory, full_model in islice(cycle(MODES), count):
        unetc.load(bundle, memory=memory).sample(steps=2, full_model=full_model)
        print(msgspec.json.encode(Usage.of()).decode(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
