"""Kernels that a library has finished on a GPU, on disk beside the engine that they are of.

`tensorrt_rtx` compiles an engine's last kernels where the engine runs; kept, they are compiled once and not at every
start. Loading them runs code, as loading an engine does, so they carry the seal of the cache of engines, and what has
another is made anew. Nothing that happens to the file keeps an engine from running. That kernels fit the GPU and its
driver is checked by the library once more.
"""

from __future__ import annotations

import hashlib
import hmac
import logging

from unetc.artifacts.record import read_bounded, write_atomically
from unetc.errors import ArtifactError

from .cache import EngineCache, EngineRecord
from .key import Origin

logger = logging.getLogger(__name__)

MOST_BYTES = 2**30
"""Larger files are not read."""
_SEAL_BYTES = hashlib.sha256().digest_size


class KernelFile:
    """Finished kernels of one engine in one place: a GPU with its driver and the version of the library."""

    def __init__(self, cache: EngineCache, record: EngineRecord, here: Origin) -> None:
        """Name the file; nothing is read yet.

        Args:
            cache: Where the engine is.
            record: Of the engine.
            here: Where it runs.
        """
        place = here.sha256()
        self.path = cache.folder(record.key) / f"kernels-{place[:16]}.bin"
        self._cache = cache
        self._about = f"kernels {record.engine_sha256} {place} ".encode()
        self._on_disk: bytes | None = None
        """Hash of the kernels that the file holds, as far as is known."""

    def read(self) -> bytes | None:
        """Give the kernels; None if there are none that this cache has sealed for this engine and place."""
        try:
            content = read_bounded(self.path, MOST_BYTES)
            seal, kernels = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
            if not hmac.compare_digest(seal, self._seal(kernels)):
                logger.warning("%s is damaged or was not written here; its kernels are made anew", self.path)
                return None
        except ArtifactError as error:
            logger.info("kernels are made anew: %s", error)
            return None
        self._on_disk = hashlib.sha256(kernels).digest()
        return kernels

    def keep(self, kernels: bytes) -> None:
        """Write the kernels, unless the file holds these already; that it cannot be written is only logged."""
        digest = hashlib.sha256(kernels).digest()
        if digest == self._on_disk:
            return
        try:
            write_atomically(self.path, self._seal(kernels) + kernels)
        except ArtifactError as error:
            logger.warning("finished kernels are not kept, so the next start makes them again: %s", error)
        else:
            self._on_disk = digest

    def _seal(self, kernels: bytes) -> bytes:
        return self._cache.seal(self._about + kernels)
