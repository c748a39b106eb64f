"""Every error unetc raises on purpose.

A message says what failed, what was got, what was expected and what to do next. The command line prints it as one line
and exits with 1; anything that is not a `UnetcError` is a bug and shows its traceback.
"""

from __future__ import annotations


class UnetcError(Exception):
    """The root of the hierarchy."""


class ModelError(UnetcError):
    """A model cannot be loaded, captured or understood."""


class ProfileError(UnetcError):
    """An analysis cannot be made or does not belong to this model."""


class PlanError(UnetcError, ValueError):
    """A plan cannot be made or is not valid."""


class QualityGateError(PlanError):
    """A build met its time budget but not its quality gate."""


class ArtifactError(UnetcError):
    """A file or folder of unetc cannot be written or read."""


class SchemaVersionError(ArtifactError):
    """An artifact was written by an incompatible version of unetc."""


class CorruptArtifactError(ArtifactError):
    """An artifact is not what was written: truncated, edited, or reaching outside its folder."""


class CompileError(UnetcError):
    """A graph cannot be specialised or exported."""


class EngineBuildError(CompileError):
    """A library cannot build an engine of a graph."""


class StaleEngineError(ArtifactError):
    """An engine is not the one that was asked for, or nobody here has built it; it is never run."""


class SessionError(UnetcError):
    """A session cannot be opened or sampled."""


class NonFiniteError(SessionError):
    """An engine produced NaN or infinity."""


class ShapeMismatch(SessionError, ValueError):
    """An array does not have the shape that is needed."""


class MissingDependency(UnetcError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""
