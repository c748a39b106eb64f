"""Choose the engines of a bundle: the options of `unetc compile`, with their checks and notes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from unetc.arguments import plain_fields
from unetc.environment import lacking
from unetc.errors import EngineBuildError, MissingDependency
from unetc.nvidia.library import LIBRARIES, Library, library_of
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.runtime.bundle import Bundle

from .ranges import describe_sides


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Sizes and precision of the engines to build, and the limits of the work."""

    target: str
    precision: Precision = Precision.FP32
    batch: str | int | None = None
    """One size as 4, or least and most, or least, usual and most, as '1,2,8'; None for 1 up to the bundle's batch."""
    height: str | int | None = None
    """The same for the samples' height; None for the bundle's height."""
    width: str | int | None = None
    """The same for the samples' width; None for the bundle's width."""
    time_limit_s: float = 3600.0
    """Limit for one engine."""
    jobs: int = 1
    """Most engines to build at once; fewer where memory or cores do not allow it, one where kernels are timed."""
    trust_engines: bool = False
    """Whether to take engines that others have put into the cache; from then on they count as built here."""
    on_this_gpu: bool = False
    """Whether the engines may be built for this machine's GPU alone."""
    controls: bool = False
    """Whether to build the engines of the control plans too."""
    fallback: bool = True
    """Whether to build the full model in float32 too; it repeats a step that overflows in half precision."""

    def __post_init__(self) -> None:
        """Check numbers and flags.

        Raises:
            EngineBuildError: If one has another type.
        """
        plain_fields(self, EngineBuildError)


def target_of(text: str, precision: str | None) -> tuple[str, Precision]:
    """Parse a target as `unetc sample` takes it, with its precision behind a colon or given separately.

    Raises:
        EngineBuildError: If no engines are built for the target, or two different precisions are given.
    """
    name, _, suffix = text.partition(":")
    library_of(name if name in LIBRARIES else text)
    given = {Precision.parse(one) for one in (suffix, precision) if one}
    if len(given) > 1:
        raise EngineBuildError(f"--target {text} and --precision {precision} contradict each other. Give one of them.")
    return name, given.pop() if given else Precision.FP32


def sizes_of(bundle: Bundle, options: CompileOptions) -> Sizes:
    """Parse the sizes in the options; missing ones are taken from the bundle."""
    _, height, width = bundle.manifest.sample_shape
    batch = bundle.manifest.batch * bundle.conditions.rows_per_sample
    return Sizes(
        batch=Range.parse(options.batch, batch, least=1),
        height=Range.parse(options.height, height),
        width=Range.parse(options.width, width),
    )


def check_tools(library: Library, precisions: Collection[Precision]) -> None:
    """Refuse to build where a library is missing that checks, lowers or calibrates graphs.

    Raises:
        MissingDependency: If any is missing; the message names all of them.
    """
    needed = {"onnx": library.extra}
    if any(precision is not Precision.FP32 for precision in precisions):
        needed["onnx_ir"] = library.extra
    if Precision.FP16 in precisions:
        needed["onnxruntime"] = "cpu"
    if missing := lacking(needed):
        extras = ",".join(dict.fromkeys([library.extra, *(needed[name] for name in missing)]))
        raise MissingDependency(
            f"compiling for {library.target} in {' and '.join(sorted(precisions))} needs {', '.join(missing)}: "
            f"pip install 'unetc[{extras}]'"
        )


def notes_on(bundle: Bundle, options: CompileOptions) -> list[str]:
    """List remarks about sizes that the user may not have meant, before building takes minutes."""
    sizes, notes = sizes_of(bundle, options), []
    if bundle.manifest.decoder is not None and (options.height or options.width):
        notes.append(f"Engines take {describe_sides(bundle.manifest, sizes)}.")
    if sizes.one_side_varies() and options.target == "tensorrt-rtx":
        notes.append(
            "One of height and width is a range: tensorrt_rtx 1.7 fails on some graphs then. If it does, make both a "
            "range, or neither."
        )
    return notes
