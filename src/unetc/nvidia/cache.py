"""Built engines on disk, each under a key of everything that it depends on.

Deserializing an engine runs code, so engines are not part of a bundle. The cache returns an engine only if every field
of its key is as requested, its bytes are unchanged, and its record carries the seal of this cache. The seal is a hash
that can only be made by someone who can read the cache's secret. An engine that was copied from another machine has a
different seal.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unetc.artifacts.reading import read_plain
from unetc.artifacts.record import MAX_JSON_BYTES, Artifact, write_atomically
from unetc.errors import ArtifactError, StaleEngineError
from unetc.precision import Precision
from unetc.temporary import claim_file, delete_abandoned, prefix_for

from .key import Effort, EngineKey, Origin, compile_command
from .sizes import SAMPLE, Shape

ENGINE = "engine.trt"
RECORD = "record.json"
_TEMPORARY = "."
"""How names of files begin that are being written."""
_SECRET = "secret"
_SECRET_BYTES = 32
_TRUST = "loading one runs code; if you trust who built it, `unetc compile --trust-engines` takes it"


class EngineRecord(Artifact, frozen=True, kw_only=True):
    """Everything that the cache stores about one engine."""

    key: EngineKey
    engine_sha256: str
    engine_bytes: int
    layers: int
    """Number of layers of the network that the parser made from the graph."""
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    """Least, usual and largest shape of every input."""
    spent: Effort
    """Effort of the try that succeeded."""
    tries: int
    seconds: float
    peak_bytes: int
    """Peak memory of building."""
    scratch_bytes: int | None
    """GPU memory that a call needs in addition to the engine; None if it was built without a GPU."""
    seal: str = ""

    def refused(self, call: Mapping[str, Shape]) -> str | None:
        """Name the first input, the sample before the others, that is outside the call ranges; None if all are inside.

        Args:
            call: Shape of every input; those that are missing are inside.
        """
        for name in sorted(self.shapes, key=lambda name: name != SAMPLE):  # the others follow it
            least, _, most = self.shapes[name]
            got = call.get(name, least)
            if len(got) != len(least) or not all(map(_in_range, least, got, most)):
                return name
        return None

    def unsealed(self) -> bytes:
        """Encode the fields that the seal covers."""
        return msgspec.structs.replace(self, seal="").to_json()


@dataclass(frozen=True, slots=True)
class EngineCache:
    """A folder of engines."""

    root: Path

    @classmethod
    def inside(cls, caches: Path) -> EngineCache:
        """Open the cache of engines in the folder of all caches."""
        return cls(caches / "engines")

    def folder(self, key: EngineKey) -> Path:
        """Return the folder of a key's engine."""
        return self.root / key.sha256()[:32]

    def open(self, key: EngineKey, *, trust: bool = False) -> tuple[EngineRecord, bytes]:
        """Read an engine.

        Args:
            key: Key that the engine must have.
            trust: Return it even if it was not built here. It can do anything that you can do.

        Raises:
            StaleEngineError: If there is no engine, a field of its key differs, its bytes have changed, or it was built
                elsewhere.
        """
        folder = self.folder(key)
        try:
            record = self._record(folder.name)
            serialized = self.read(folder / ENGINE, record.engine_bytes)
        except ArtifactError as error:
            raise StaleEngineError(f"there is no engine in {folder}: {error} Build it with `unetc compile`.") from error
        if differences := key.differences(record.key):
            raise StaleEngineError(
                f"the engine in {folder} differs from the requested one in {', '.join(differences)}. Build it again."
            )
        if len(serialized) != record.engine_bytes or hashlib.sha256(serialized).hexdigest() != record.engine_sha256:
            raise StaleEngineError(
                f"{folder / ENGINE} has changed since it was built (its hash differs). Build it again."
            )
        if not trust and not self.is_ours(record):
            raise StaleEngineError(f"the engine in {folder} was not built here ({_TRUST}).")
        return record, serialized

    def building(self, key: EngineKey, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Lock the engine of a key for building: wait for other builders first, and make later ones wait.

        Engines of other keys can be built meanwhile. Inside the lock, the caller must first check whether the engine
        has been built by now.

        Args:
            key: Key of the engine.
            on_wait: Called repeatedly during the wait. If it raises, the wait is over.
        """
        from unetc.lock import locked  # imported late: filelock is not installed where engines are only run

        return locked(_lock_of(self.folder(key)), on_wait)

    def touch(self, key: EngineKey) -> None:
        """Record for `trim` that an engine was used now; failing to record it does not matter."""
        with contextlib.suppress(OSError):
            os.utime(self.folder(key) / ENGINE)

    def read(self, path: Path, limit: int, *, hard_links: bool = False) -> bytes:
        """Read a file of the cache; nothing below its folder may be a link.

        Args:
            path: The file.
            limit: Largest size in bytes.
            hard_links: Whether it may have another name.

        Raises:
            ArtifactError: If it is missing, unreadable or larger, or is reached through a link.
        """
        return read_plain(self.root, path.relative_to(self.root).as_posix(), limit, hard_links=hard_links)

    def records(self) -> list[EngineRecord]:
        """List the readable records of the cache; changes are only detected when an engine is opened."""
        found = []
        for path in sorted(self.root.glob(f"*/{RECORD}")):
            try:
                found.append(self._record(path.parent.name))
            except ArtifactError:
                continue  # of another version, or damaged
        return found

    def _record(self, folder: str) -> EngineRecord:
        path = self.root / folder / RECORD
        return EngineRecord.from_json(self.read(path, MAX_JSON_BYTES), str(path))

    def find(
        self,
        graph_sha256: str,
        weights_sha256: str,
        precision: Precision,
        here: Origin,
        call: Mapping[str, Shape],
    ) -> tuple[EngineRecord, bytes]:
        """Read the engine of a graph that runs here.

        If there are several with different call ranges, the preferred one takes the usual call; then the one that
        takes the largest calls; then the one that also takes the smallest; then one that is for this GPU alone. Engines
        that were not built here are skipped.

        Args:
            graph_sha256: Hash of the graph.
            weights_sha256: Hash of the weights file that it reads.
            precision: Precision of the engine.
            here: Origin that it must have been built for.
            call: Shapes of the inputs in the usual call, as far as they are known.

        Raises:
            StaleEngineError: If there is none; the message lists how the existing ones differ, and how to build one.
        """
        wanted = (graph_sha256, weights_sha256, precision, here.target)
        known = [record for record in self.records() if _question(record.key) == wanted]
        refusals: Counter[str] = Counter()
        for record in sorted(known, key=lambda one: (one.refused(call) is None, *_preference(one)), reverse=True):
            if misfit := record.key.origin.misfit(here):
                refusals[misfit] += 1
                continue
            if not self.is_ours(record):
                refusals[f"not built here ({_TRUST})"] += 1
                continue
            try:
                return self.open(record.key)
            except StaleEngineError:
                refusals["damaged"] += 1
        others = "; ".join(f"{count} {reason}" for reason, count in refusals.items())
        raise StaleEngineError(
            f"no {here.target} engine in {precision} of this graph that can be run here is in {self.root}. "
            + (f"Others are: {others}. " if others else "")
            + f"Build it: `{compile_command(here.target, precision)}` (--controls for the engines of verify). "
            "UNETC_CACHE names the folder of engines."
        )

    def put(self, record: EngineRecord, serialized: bytes) -> EngineRecord:
        """Write an engine, its record last, sealed. A link in the place of its folder is removed.

        Raises:
            ArtifactError: If the folder cannot be written or the disk is full.
        """
        sealed = msgspec.structs.replace(record, seal=self._seal_of(record))
        folder = self.folder(record.key)
        try:
            if folder.is_symlink():
                folder.unlink()
        except OSError as error:
            raise ArtifactError(f"cannot write {folder}: {error.strerror}. Delete this link.") from error
        write_atomically(folder / ENGINE, serialized)
        sealed.save(folder / RECORD)
        return sealed

    def seal(self, data: bytes) -> bytes:
        """Hash data with this cache's secret; the data must begin with its kind, because all seals look alike.

        Raises:
            ArtifactError: If the secret is missing and cannot be written, or is damaged.
        """
        return hmac.digest(self._secret(), data, hashlib.sha256)

    def is_ours(self, record: EngineRecord) -> bool:
        """Check whether a record carries the seal of this cache."""
        return hmac.compare_digest(record.seal.encode(), self._seal_of(record).encode())  # of text it takes ASCII alone

    def _seal_of(self, record: EngineRecord) -> str:
        return self.seal(record.unsealed()).hex()

    def _secret(self) -> bytes:
        """Read this cache's secret, or draw one if there is none."""
        path = self.root / _SECRET
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                drawn, handle = claim_file(self.root, prefix_for(path))
                try:
                    with os.fdopen(handle, "wb") as file:
                        file.write(secrets.token_bytes(_SECRET_BYTES))
                        file.flush()
                        os.link(drawn, path)
                except FileExistsError:
                    pass  # another process was first
                finally:
                    drawn.unlink(missing_ok=True)  # that process may have taken it for abandoned
            elif path.stat().st_nlink > 1:  # who drew it was killed before it could delete the other name
                delete_abandoned(self.root, prefix_for(path))
            secret = self.read(path, _SECRET_BYTES, hard_links=True)  # it has two names while it is being drawn
        except OSError as error:
            raise ArtifactError(f"cannot write {self.root}: {error.strerror}. Choose another with --cache.") from error
        if len(secret) != _SECRET_BYTES:
            raise ArtifactError(f"{path} is damaged. Delete it; engines in {self.root} are built again.")
        return secret


def trim(folder: Path, most_bytes: int) -> None:
    """Delete the least recently used engines of all caches in a folder until the others fit; one engine always stays.

    Files that killed processes were writing are deleted first, beside engines and where no engine was finished.

    Args:
        folder: Folder of the caches, each a folder.
        most_bytes: Largest total size of the engines that stay, with the files beside them.
    """
    left = most_bytes
    places = [
        path for path in folder.glob("*/*") if path.is_dir() and not any(map(Path.is_symlink, (path, path.parent)))
    ]
    for place in places:
        delete_abandoned(place, _TEMPORARY)
    engines = (place / ENGINE for place in places if (place / ENGINE).exists())
    for i, engine in enumerate(sorted(engines, key=_used, reverse=True)):
        left -= _size(engine.parent)
        if i and left < 0:
            shutil.rmtree(engine.parent, ignore_errors=True)  # another process may be deleting it too
            _lock_of(engine.parent).unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    """Name the file that is locked while the engine in a folder is built."""
    return folder.with_suffix(".lock")


def _used(engine: Path) -> float:
    """Return the time when an engine was last used; 0 if it is gone by now."""
    try:
        return engine.stat().st_mtime
    except OSError:
        return 0.0


def _size(place: Path) -> int:
    """Add up the files in the folder of an engine; 0 if it is gone by now."""
    try:
        with os.scandir(place) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError:
        return 0


def _question(key: EngineKey) -> tuple[str, str, Precision, str]:
    """Return the part of a key that a search must match."""
    return key.graph_sha256, key.weights_sha256, key.precision, key.origin.target


def _in_range(least: int, size: int, most: int) -> bool:
    return least <= size <= most


def _preference(record: EngineRecord) -> tuple[int, int, bool, str]:
    sizes = record.key.sizes
    least, _, most = zip(sizes.batch.corners(), sizes.height.corners(), sizes.width.corners(), strict=True)
    return math.prod(most), -math.prod(least), record.key.origin.gpu is not None, record.key.sha256()
