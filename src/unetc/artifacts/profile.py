"""Profile: the measurements of one model on one target."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import msgspec

from unetc.treatments import Treatment

from .record import Artifact, Record, finite, require

STEP = "step"
"""Name of the component that is the whole denoiser call."""
GUIDANCE = "guidance"
"""Name of the component that is the difference between the two halves of a guided call: own - negative."""


class ModelReference(Record, frozen=True, kw_only=True):
    """The model that an artifact belongs to."""

    name: str
    """The name as the user typed it: a built-in name, a folder or a Hub id."""
    sha256: str
    """Hash of the denoiser's configuration, its weights and the scheduler's configuration."""
    pipeline: str
    """Class of the pipeline."""
    denoiser: str
    """Class of the denoiser."""
    controlnet: bool = False
    """Whether the graph has ControlNet inputs; part of the hash."""
    loras: tuple[str, ...] = ()
    """LoRAs fused into the denoiser, as path and scale, in order; their contents and scales are part of the hash."""
    text_sha256: str | msgspec.UnsetType = msgspec.UNSET
    """Hash of the tokenizers and text encoders; absent for a model without text, and from older versions of unetc."""

    @property
    def title(self) -> str:
        """Name of the model, followed by its LoRAs."""
        return " + ".join((self.name, *self.loras))


class ControlMeasured(Record, frozen=True, kw_only=True):
    """The ControlNet and the control images that damage was measured with."""

    model: str
    """Folder of the ControlNet, as the user typed it."""
    model_sha256: str
    images: int
    """Number of images; prompt k has image k modulo this number."""
    images_sha256: str
    """Hash of the pixels of all images at the size of the output."""


class Component(Record, frozen=True, kw_only=True):
    """A place in the graph where a branch joins the trunk; the denoiser call itself, `step`, joins the scheduler.

    A guided model has one more, outside its graph: `guidance`. Treating it leaves out the rows of the negative
    conditions.
    """

    name: str
    kind: Literal["residual", "skip", "level", "step", "guidance"]
    owner: str
    """Path of the module that owns the join."""
    index: int
    """Row of the component in the gate input; guidance, which has no gate, comes after the last."""
    channels: int
    """Width of the branch."""
    axis: int
    """Axis of the channels in the branch."""
    nested: tuple[str, ...]
    """Components computed only for this one's branch; removing the branch removes them too."""
    offset: int
    """Position of the component's first mean in the concatenated means."""

    @property
    def rank(self) -> int:
        """Number of axes of the branch: channels come second in images and last in token sequences."""
        return 4 if self.axis == 1 else 3


def with_guidance(components: tuple[Component, ...]) -> tuple[Component, ...]:
    """Add guidance to the components of a graph; it is nested in the step, as skipping the step skips both halves."""
    (step,) = (component for component in components if component.kind == "step")
    guidance = Component(
        name=GUIDANCE,
        kind="guidance",
        owner="",
        index=len(components),
        channels=step.channels,
        axis=step.axis,
        nested=(),
        offset=sum(component.channels for component in components),
    )
    outer = msgspec.structs.replace(step, nested=(*step.nested, GUIDANCE))
    return (*(outer if component is step else component for component in components), guidance)


def without_guidance(components: tuple[Component, ...]) -> tuple[Component, ...]:
    """List the components that a graph has."""
    if not any(component.kind == "guidance" for component in components):
        return components
    return tuple(
        msgspec.structs.replace(component, nested=tuple(name for name in component.nested if name != GUIDANCE))
        for component in components
        if component.kind != "guidance"
    )


class Bin(Record, frozen=True, kw_only=True):
    """A range of noise levels in log-SNR, low inclusive and high exclusive; the outer bins are open-ended."""

    low: float
    high: float
    steps: int
    """Number of steps of the analysed schedule in the bin."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(finite(self.low, self.high) and self.low < self.high, "a bin must not be empty", got=self)


class Estimate(Record, frozen=True, kw_only=True):
    """A mean with its 95 % confidence interval (Student t over samples)."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check that the interval encloses the mean."""
        require(finite(self.mean, self.low, self.high), "an estimate must be finite", got=self)
        require(self.low <= self.mean <= self.high, "an interval must enclose its mean", got=self)


class Damage(Record, frozen=True, kw_only=True):
    """Difference between the final output and the original model's, from the same noise."""

    relative_l2: Estimate
    """Norm of the difference / norm of the original, per sample, dimensionless."""
    psnr: Estimate
    """Peak signal-to-noise ratio in dB over the value range 2; capped at 100 dB."""
    ssim: Estimate
    """Structural similarity, 1 = same."""


class Ablated(Record, frozen=True, kw_only=True):
    """One component with one treatment in one bin, while everything else is kept."""

    component: str
    treatment: Treatment
    period: int
    """The component is computed once in this many steps; 1 if it is never computed."""
    bin: int

    @property
    def key(self) -> tuple[str, Treatment, int, int]:
        """What was ablated, apart from what came of it."""
        return self.component, self.treatment, self.period, self.bin


class Effect(Ablated, frozen=True, kw_only=True):
    """Damage of an ablation to the final output."""

    measured: bool
    """Whether the damage was measured on the final output; otherwise it is estimated from the local error."""
    relative_l2: Estimate
    """Norm of the difference / norm of the original, per sample, dimensionless."""

    def __post_init__(self) -> None:
        """Check that a period belongs to a treatment that refreshes."""
        require(self.treatment is not Treatment.KEEP, "an effect must have a treatment other than keep")
        fits = self.period > 1 if self.treatment.reuses else self.period == 1
        require(fits, "hold and forecast need a period above 1, others period 1")


class NonFinite(Ablated, frozen=True, kw_only=True):
    """An ablation whose predictions are NaN or infinity; no plan makes it."""


class Cost(Record, frozen=True, kw_only=True):
    """Savings from removing one component: the full graph minus the graph specialised without it."""

    component: str
    saved_ms: Estimate
    """Milliseconds per denoiser call at the profile's batch size; the interval is over repetitions."""
    freed_bytes: int
    """Bytes of the weights that only the component needs: read by the full graph, not by the graph without it."""


class ImageSource(Record, frozen=True, kw_only=True):
    """The images that a model was measured on."""

    folder: str | None = None
    """Folder of the images; None for drawn images."""
    sha256: str
    """Hash of the files and of the seed of masks and drawn images."""


class Profile(Artifact, frozen=True, kw_only=True):
    """Damage of every treatment of each component at each noise level, and the component's cost on the target."""

    unetc: str
    model: ModelReference
    scheduler: str
    steps: int
    samples: int
    seed: int
    target: str
    timed_on: str | msgspec.UnsetType = msgspec.UNSET
    """Processor or GPU and libraries of the machines that measured; not in profiles of older versions of unetc."""
    threads: int
    batch: int
    """Batch size of the cost measurement."""
    sample_shape: tuple[int, int, int]
    """[channel, height, width] of one sample."""
    prompts: tuple[str, ...] = ()
    """Prompts of the samples, or labels of classes as numbers; empty for an unconditional model."""
    images: ImageSource | msgspec.UnsetType = msgspec.UNSET
    """Images of the samples; unset, and not in the JSON form, if the model takes none."""
    notes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Warnings about the conditions of the samples; unset, and not in the JSON form, if there are none."""
    used_prompts: int = 0
    """Number of prompts used, from the first: sample k had prompt k modulo this number. `verify` uses the others."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, dimensionless; 1 without guidance."""
    control_images: ControlMeasured | msgspec.UnsetType = msgspec.UNSET
    """Control images of the samples; not written without any, so that older profiles keep their bytes and hash."""
    components: tuple[Component, ...]
    bins: tuple[Bin, ...]
    full_ms: Estimate
    """Milliseconds per denoiser call of the original model."""
    full_bytes: int
    """Bytes of the weights that the full graph reads."""
    costs: tuple[Cost, ...]
    effects: tuple[Effect, ...]
    non_finite: tuple[NonFinite, ...] | msgspec.UnsetType = msgspec.UNSET
    """Ablations that end in NaN or infinity, which have no effect; not written without any, as above."""
    samplings: float
    """Effort of measuring the damage, in sampling runs of the full model: denoiser calls per sample / steps."""
    means: tuple[bytes, ...]
    """Branch means per bin, concatenated over the components: little-endian float32, [channels of all components]."""

    @property
    def control(self) -> ControlMeasured | None:
        """Control images of the samples; None if all ControlNet inputs, if there are any, were zero."""
        return None if isinstance(self.control_images, msgspec.UnsetType) else self.control_images

    @property
    def broken(self) -> tuple[NonFinite, ...]:
        """Ablations that end in NaN or infinity."""
        return () if isinstance(self.non_finite, msgspec.UnsetType) else self.non_finite

    def __post_init__(self) -> None:
        """Check that the parts refer to each other."""
        names = {component.name for component in self.components}
        require(len(names) == len(self.components), "component names must be unique")
        inner = {name for component in self.components for name in component.nested}
        require(inner <= names, f"a component has unknown ones nested in it: {sorted(inner - names)}")
        require(all(effect.component in names for effect in self.effects), "an effect names an unknown component")
        require(all(cost.component in names for cost in self.costs), "a cost names an unknown component")
        require(all(0 <= effect.bin < len(self.bins) for effect in self.effects), "an effect names an unknown bin")
        known = {effect.key for effect in self.effects}
        for one in self.broken:
            require(one.component in names, "an ablation that is not finite names an unknown component")
            require(0 <= one.bin < len(self.bins), "an ablation that is not finite names an unknown bin")
            require(one.key not in known, f"an ablation has an effect, and is not finite: {one}")
        width = 4 * sum(component.channels for component in without_guidance(self.components))
        require(len(self.means) == len(self.bins), "there must be one row of means per bin")
        require(all(len(row) == width for row in self.means), "a row of means has the wrong length")
        require(0 <= self.used_prompts <= len(self.prompts), "used_prompts must not exceed the number of prompts")
        require(bool(self.bins) and self.full_ms.mean > 0, "a profile needs bins and a positive time")
        require(all(one.steps >= 0 for one in self.bins), "a bin must not have a negative number of steps")
        require(any(one.steps for one in self.bins), "a profile needs a step in a bin")
        for left, right in pairwise(self.bins):
            require(left.high == right.low, "bins must follow each other without a gap")
        freed = [cost.freed_bytes for cost in self.costs]
        require(self.full_bytes > 0, "the weights of the full model must not be empty")
        require(all(0 <= own <= self.full_bytes for own in freed), "freed_bytes must lie between 0 and full_bytes")
