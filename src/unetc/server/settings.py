"""Settings of the server."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from unetc.arguments import plain_fields
from unetc.artifacts.reading import read_bounded
from unetc.errors import SessionError
from unetc.runtime.batching.ladder import saving_of

from .limits import LONGEST_PROMPT, MOST_IMAGES

_KEY_FILE_BYTES = 2**20
"""Largest file of API keys."""
_LEAST_KEY = 8
"""Fewest characters of an API key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSource:
    """A bundle to serve."""

    path: Path
    name: str | None = None
    """Name of the model in requests; None for the name of the bundle's model."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `path` or `name=path`; a path that contains an equals sign needs a name.

        Raises:
            SessionError: If the name or the path is empty.
        """
        name, equals, path = text.partition("=")
        if not equals:
            return cls(path=Path(text))
        if not name or not path:
            raise SessionError(f"cannot serve {text!r}. Expected the folder of a bundle, or name=folder.")
        return cls(path=Path(path), name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeys:
    """Keys of which a request must show one."""

    digests: tuple[bytes, ...]
    """SHA-256 of each key: digests have one length, so that a comparison does not reveal the length of a key."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file with one key a line; empty lines and lines that begin with # are ignored.

        Raises:
            ArtifactError: If the file cannot be read.
            SessionError: If it has no key, or a key is too short.
        """
        lines = [line.strip() for line in read_bounded(path, _KEY_FILE_BYTES).splitlines()]
        keys = [line for line in lines if line and not line.startswith(b"#")]
        if not keys:
            raise SessionError(f"{path} has no API key. Write one key a line.")
        if min(map(len, keys)) < _LEAST_KEY:
            raise SessionError(f"{path} has a key of fewer than {_LEAST_KEY} characters. Use longer ones.")
        return cls(digests=tuple(hashlib.sha256(key).digest() for key in keys))

    def allow(self, key: str) -> bool:
        """Check a key in a time that depends neither on the key nor on the position of a match."""
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        return sum([hmac.compare_digest(digest, known) for known in self.digests]) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRange:
    """How many processes serve together."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2`, or `1:4` for as many as the load needs.

        Raises:
            SessionError: If it is neither.
        """
        least, colon, most = text.partition(":")
        found = [int(number) for number in (least, most if colon else least) if re.fullmatch(r"\d{1,4}", number)]
        if len(found) < 2 or not 1 <= found[0] <= found[1]:
            raise SessionError(f"cannot run {text[:40]!r} replicas. Expected a number as 2, or a range as 1:4.")
        return cls(least=found[0], most=found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Bundles to serve, and limits."""

    bundles: Sequence[BundleSource]
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 for a free one."""
    api_keys: ApiKeys | None = None
    """None serves everyone."""
    target: str | None = None
    """Where engines run; None for the target that a bundle was built for."""
    threads: int | None = None
    """CPU threads of the target; None for the bundle's."""
    memory: str = "fast"
    """Memory mode of the backend."""

    queue: int = 64
    """Most images that wait."""
    deadline: float = 300.0
    """Seconds after which a request is given up; a request may ask for fewer."""
    degrade_to: str | None = None
    """The fastest level to which the server steps down under load, such as "55%"; None to never step down."""
    target_p95: float | None = None
    """Seconds in which requests are to be finished before the server steps down; None for the deadline."""
    drain: float = 30.0
    """Seconds for accepted requests to finish after SIGTERM."""

    body_bytes: int = 16 * 2**20
    """Largest body of a request."""
    images: int = MOST_IMAGES
    """Most images of one request."""
    pixels: int | None = None
    """Most pixels of an image; None to derive the limit from each model's own size."""
    prompt_characters: int = LONGEST_PROMPT
    """Longest prompt."""

    job_seconds: float = 600.0
    """Seconds for which a finished job is kept."""
    jobs: int = 1000
    """Most jobs that are kept, unfinished ones included."""
    job_bytes: int = 256 * 2**20
    """Most bytes of images of finished jobs."""

    def __post_init__(self) -> None:
        """Refuse values of another type, and settings that contradict each other.

        Raises:
            SessionError: If there are any.
        """
        plain_fields(self, SessionError)
        if not self.bundles:
            raise SessionError("there is nothing to serve. Name the folder of a bundle.")
        if self.degrade_to is not None:
            saving_of(self.degrade_to)
        if self.target_p95 is not None and self.degrade_to is None:
            raise SessionError("--target-p95 is the time to keep by stepping down; add --degrade-to, such as 55%.")
