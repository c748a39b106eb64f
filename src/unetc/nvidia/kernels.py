"""Kernels that a library has finished on a GPU, stored in the folder of their engine.

`tensorrt_rtx` compiles the last kernels of an engine on the machine that runs it. Once stored, they need not be
compiled at every start. Loading them runs code, as loading an engine does. They therefore carry the seal of the cache
of engines, and kernels with another seal are made again. A damaged or missing file never keeps an engine from running.
The library also checks that the kernels fit the GPU and its driver.
"""

from __future__ import annotations

import hashlib
import hmac
import logging

from unetc.artifacts.record import write_atomically
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
            cache: Cache of the engine.
            record: Record of the engine.
            here: The machine that runs it.
        """
        place = here.sha256()
        self.path = cache.folder(record.key) / f"kernels-{place[:16]}.bin"
        self._cache = cache
        self._about = f"kernels {record.engine_sha256} {place} ".encode()
        self._on_disk: bytes | None = None
        """Hash of the kernels in the file, if known."""

    def read(self) -> bytes | None:
        """Read the kernels; None if the file has none that this cache has sealed for this engine and place."""
        try:
            content = self._cache.read(self.path, MOST_BYTES)
            seal, kernels = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
            if not hmac.compare_digest(seal, self._seal(kernels)):
                logger.warning("%s is damaged or was not written here; its kernels are made again", self.path)
                return None
        except ArtifactError as error:
            logger.info("kernels are made again: %s", error)
            return None
        self._on_disk = hashlib.sha256(kernels).digest()
        return kernels

    def keep(self, kernels: bytes) -> None:
        """Write the kernels unless the file already has them; a failure to write is only logged."""
        digest = hashlib.sha256(kernels).digest()
        if digest == self._on_disk:
            return
        try:
            write_atomically(self.path, self._seal(kernels) + kernels)
        except ArtifactError as error:
            logger.warning("finished kernels cannot be stored, so the next start makes them again: %s", error)
        else:
            self._on_disk = digest

    def _seal(self, kernels: bytes) -> bytes:
        return self._cache.seal(self._about + kernels)
