"""Every error that unetc raises on purpose.

A message names the failure, the value found, the expected value and the next thing to do. The command line prints the
message on one line and exits with 1. Any other exception is a bug, so the command line shows its traceback.
"""

from __future__ import annotations


class UnetcError(Exception):
    """Base class of all errors of unetc."""


class ModelError(UnetcError):
    """A model cannot be loaded or captured, or is not supported."""


class ProfileError(UnetcError):
    """An analysis cannot be run, or its profile does not belong to this model."""


class WorkerError(UnetcError):
    """Other machines cannot do the work."""


class PlanError(UnetcError, ValueError):
    """A plan cannot be made, or is not valid."""


class QualityGateError(PlanError):
    """A build met its time budget, but not its quality gate."""


class OutOfMemory(UnetcError):
    """There is too little memory for the work."""


class ArtifactError(UnetcError):
    """A file or folder of unetc cannot be read or written."""


class SchemaVersionError(ArtifactError):
    """An artifact was written by an incompatible version of unetc."""


class CorruptArtifactError(ArtifactError):
    """An artifact differs from its original: it is truncated, edited, or refers to files outside its folder."""


class CompileError(UnetcError):
    """A graph cannot be specialised or exported."""


class EngineBuildError(CompileError):
    """A library cannot build an engine from a graph."""


class StaleEngineError(ArtifactError):
    """An engine does not match the request, or was not built on this machine; it is never run."""


class SessionError(UnetcError):
    """A session cannot be opened, or cannot sample."""


class NonFiniteError(SessionError):
    """An engine produced NaN or infinity."""


class ShapeMismatch(SessionError, ValueError):
    """An array does not have the expected shape."""


class QueueFull(SessionError):
    """A request cannot be accepted now."""

    def __init__(self, message: str, seconds: float) -> None:
        """Refuse a request.

        Args:
            message: The reason.
            seconds: Estimated time until there is room.
        """
        super().__init__(message)
        self.seconds = seconds


class DeadlineExceeded(SessionError):
    """A request was not finished within its time limit."""


class BatcherStopped(SessionError):
    """The thread that runs the engines has ended."""


class RequestError(UnetcError):
    """A field of a request is wrong."""

    def __init__(self, message: str, field: str | None = None) -> None:
        """Keep the name of the field; None if the request as a whole is wrong."""
        super().__init__(message)
        self.field = field


class MissingDependency(UnetcError, ImportError):
    """An optional library is not installed; the message names the extra that installs it."""


def brief(error: Exception) -> str:
    """Shorten the message of a library to one line of at most 300 characters."""
    return (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")
