"""Profile: what an analysis measured about one model on one target."""

from __future__ import annotations

from typing import Literal

from unetc.treatments import Treatment

from .record import Artifact, Record, finite, require

STEP = "step"
"""Name of the component that is the whole denoiser call."""


class ModelReference(Record, frozen=True, kw_only=True):
    """Which model an artifact belongs to."""

    name: str
    """What the user typed: a built-in name, a folder or a Hub id."""
    sha256: str
    """Hash of the denoiser's configuration, its weights and the scheduler's configuration."""
    pipeline: str
    """Class of the pipeline."""
    denoiser: str
    """Class of the denoiser."""
    controlnet: bool = False
    """Whether its graph has inputs for the residuals of a ControlNet; decides the hash too."""
    loras: tuple[str, ...] = ()
    """What is fused into it, as path and scale, in order; contents and scales decide the hash too."""

    @property
    def title(self) -> str:
        """Its name, and what is fused into it."""
        return " + ".join((self.name, *self.loras))


class Component(Record, frozen=True, kw_only=True):
    """A place in the graph where a branch joins the trunk; the denoiser call itself, `step`, joins the scheduler."""

    name: str
    kind: Literal["residual", "skip", "level", "step"]
    owner: str
    """Path of the module that owns the join."""
    index: int
    """Row of the component in the gate input."""
    channels: int
    """Width of the branch."""
    axis: int
    """Axis of the channels in the branch."""
    nested: tuple[str, ...]
    """Components that are only computed for this one's branch; they go with it."""
    offset: int
    """Where the means of the component start in the concatenated means."""

    @property
    def rank(self) -> int:
        """Number of axes of the branch: channels come second in images and last in token sequences."""
        return 4 if self.axis == 1 else 3


class Bin(Record, frozen=True, kw_only=True):
    """A range of noise levels, in log-SNR, low inclusive and high exclusive; the outer bins are open-ended."""

    low: float
    high: float
    steps: int
    """Number of steps of the analysed schedule that lie in the bin."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(finite(self.low, self.high) and self.low < self.high, f"a bin must not be empty, got {self}")


class Estimate(Record, frozen=True, kw_only=True):
    """A mean with its 95 % confidence interval (Student t over samples)."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check that the interval encloses the mean."""
        require(finite(self.mean, self.low, self.high), f"an estimate must be finite, got {self}")
        require(self.low <= self.mean <= self.high, f"an interval must enclose its mean, got {self}")


class Damage(Record, frozen=True, kw_only=True):
    """How far the final output is from the original model's, at the same noise."""

    relative_l2: Estimate
    """Norm of the difference / norm of the original, per sample, dimensionless."""
    psnr: Estimate
    """Peak signal-to-noise ratio in dB over the value range 2; capped at 100 dB."""
    ssim: Estimate
    """Structural similarity, 1 = same."""


class Effect(Record, frozen=True, kw_only=True):
    """What the final output loses when one component has one treatment in one bin, all else kept."""

    component: str
    treatment: Treatment
    period: int
    """One step of so many computes the component all the same; 1 if none does."""
    bin: int
    measured: bool
    """Whether the ablation reached the final output; if not, the damage is estimated from its local error."""
    relative_l2: Estimate
    """Norm of the difference / norm of the original, per sample, dimensionless."""

    def __post_init__(self) -> None:
        """Check that a period belongs to a treatment that refreshes."""
        require(self.treatment is not Treatment.KEEP, "an effect is of a treatment that changes something")
        require((self.period > 1) == self.treatment.reuses, "what is held or forecast has a period above 1, others 1")


class Cost(Record, frozen=True, kw_only=True):
    """What removing one component saves: full graph minus the graph specialised without it."""

    component: str
    saved_ms: Estimate
    """Milliseconds per denoiser call at the profile's batch; the interval is over repetitions."""
    freed_bytes: int
    """Bytes of the weights that the full graph reads and the one without the component does not."""


class Profile(Artifact, frozen=True, kw_only=True):
    """Damage of every component at every noise level, and its cost on the target."""

    unetc: str
    model: ModelReference
    scheduler: str
    steps: int
    samples: int
    seed: int
    target: str
    threads: int
    batch: int
    """Batch of the cost measurement."""
    sample_shape: tuple[int, int, int]
    """[channel, height, width] of one sample."""
    prompts: tuple[str, ...] = ()
    """What samples are conditioned on, in words; empty if on nothing."""
    used_prompts: int = 0
    """The first so many were used: sample k had prompt k, modulo this number. The others are for `verify`."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance, dimensionless; 1 if there is none."""
    components: tuple[Component, ...]
    bins: tuple[Bin, ...]
    full_ms: Estimate
    """Milliseconds per denoiser call of the original model."""
    full_bytes: int
    """Bytes of the weights that the full graph reads."""
    costs: tuple[Cost, ...]
    effects: tuple[Effect, ...]
    samplings: float
    """What the damages have cost: denoiser calls per sample / steps, that is, in sampling runs of the full model."""
    means: tuple[bytes, ...]
    """Per bin, the concatenated branch means of all components: little-endian float32, [channel of all components]."""

    def __post_init__(self) -> None:
        """Check that the parts refer to each other."""
        names = {component.name for component in self.components}
        require(len(names) == len(self.components), "component names must be unique")
        require(all(effect.component in names for effect in self.effects), "an effect names an unknown component")
        require(all(cost.component in names for cost in self.costs), "a cost names an unknown component")
        require(all(0 <= effect.bin < len(self.bins) for effect in self.effects), "an effect names an unknown bin")
        width = 4 * sum(component.channels for component in self.components)
        require(len(self.means) == len(self.bins), "there must be one row of means per bin")
        require(all(len(row) == width for row in self.means), "a row of means has the wrong length")
        require(0 <= self.used_prompts <= len(self.prompts), "no more prompts can be used than there are")
        require(bool(self.bins) and self.full_ms.mean > 0, "a profile needs bins and a positive time")
        freed = [cost.freed_bytes for cost in self.costs]
        require(self.full_bytes > 0, "a full model has weights")
        require(all(0 <= own <= self.full_bytes for own in freed), "a removal frees between none and all of the bytes")

    def bin_of(self, log_snr: float) -> int:
        """Find the bin of a noise level; the outer bins reach to infinity."""
        return sum(1 for bin in self.bins[1:] if log_snr >= bin.low)
