"""Sample from a bundle: one loop over the steps, switching engines by noise level.

From the noise to the last sample everything stays on the backend's device, in one stream: samples and their history,
predictions, conditions and emitted branches. In each step one value comes back: whether the prediction was finite.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unetc.arguments import float_array, real_number, whole_number
from unetc.artifacts.manifest import FULL, BundleEngine, Control, Manifest, image_shape
from unetc.artifacts.plan import Plan, full_plan
from unetc.backend import Backend, Program
from unetc.call import EXTRA_CHANNELS, CallSignature
from unetc.class_labels import encode_labels
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.device import HOST, Array, Device, Tensor
from unetc.errors import ModelError, NonFiniteError, SessionError, ShapeMismatch
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.sampler.noise import initial_noise
from unetc.sampler.table import SchedulerTable, SchedulerTables

from .bundle import Bundle
from .decoder import Decoder
from .encoder import PIXELS, Encoder
from .engine_pool import EnginePool, LoadedLater
from .loaded_bundle import LoadedBundle
from .loop import Loop, Start, begin
from .rollout import EngineCall, NonFiniteSteps, Rollout, not_finite
from .text import TextEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """State after a step, for `on_step`."""

    index: int
    steps: int
    timestep: float
    engine: int
    """Index in the plan; 0 for the full model."""
    tensor: Tensor
    """Samples on the device, [batch, channel, height, width]; no later step writes into them."""
    device: Device

    @property
    def sample(self) -> Array:
        """A copy of the samples, [batch, channel, height, width]."""
        return self.device.to_array(self.tensor)


class Session:
    """Loaded engines and the plan that says which one runs when; `unetc.load` opens one."""

    def __init__(
        self,
        *,
        plan: Plan,
        full: Program,
        programs: Sequence[Program],
        scheduler: SchedulerTables,
        sample_shape: tuple[int, int, int],
        steps: int,
        exact: Program | None = None,
        predicted_channels: int | None = None,
        conditions: Conditions = UNCONDITIONAL,
        decoder: Decoder | None = None,
        encoder: Encoder | None = None,
        text: TextEncoder | None = None,
        device: Device = HOST,
        calls: CallSignature | None = None,
        tuned: SchedulerTable | None = None,
    ) -> None:
        """Put a session together.

        Args:
            plan: Which engine runs at which noise level.
            full: The full model.
            programs: One loaded engine per engine of the plan.
            scheduler: The scheduler for every number of steps.
            sample_shape: [channel, height, width] of one sample.
            steps: Default number of steps.
            exact: The full model in float32; None if `full` computes in float32.
            predicted_channels: Channels of the denoiser's prediction; by default the sample's.
            conditions: Default conditions: sample k gets row k, modulo their number.
            decoder: Turns samples into images; None if they are images.
            encoder: Turns images into samples, for image to image; None if they are samples, or there is none.
            text: Encodes prompts; None if there are only the conditions above.
            device: Where the programs compute.
            calls: The calls that the programs take; None accepts every call.
            tuned: The scheduler's table with rows tuned to the plan, for its number of steps; None without.
        """
        self.plan = plan
        self.scheduler = scheduler
        self.sample_shape = sample_shape
        self.steps = steps
        self.conditions = conditions
        self.calls = calls
        self.text = text
        """Encodes prompts; None for a bundle without text encoders."""
        self.tuned = tuned
        """Table with rows tuned to the plan; None without."""
        self._encoder = encoder
        self._predicted_channels = predicted_channels or sample_shape[0]
        self._decoder = decoder
        self._device = device
        self._non_finite_steps = NonFiniteSteps()
        self._full = full
        self._exact = exact
        self._programs = tuple(programs)
        streamed = any(isinstance(program, LoadedLater) for program in self._programs)
        self._pool = EnginePool(plan, self._programs, full, device, spare=exact) if streamed else None

    @classmethod
    def of(
        cls, bundle: Bundle, backend: Backend, *, control: Control | None = None, level: str | None = None
    ) -> Session:
        """Load the engines of a quality level.

        The full model is loaded when it is first needed, unless it is an engine of the plan anyway. A backend that
        loads engines later loads them for the phases that need them.

        Args:
            bundle: The bundle.
            backend: Runs the engines.
            control: A control of the bundle, to load in place of a quality level.
            level: Name of a quality level, or "full" for the full model alone; the default level when not given.

        Raises:
            SessionError: If there is no such level; the message lists the names.
        """
        return cls.over(LoadedBundle(bundle, backend), control=control, level=level)

    @classmethod
    def over(cls, loaded: LoadedBundle, *, control: Control | None = None, level: str | None = None) -> Session:
        """Open a session over programs that other sessions may share; other arguments as for `of`.

        Args:
            loaded: The bundle on its backend.
            control: A control of the bundle, to load in place of a quality level.
            level: Name of a quality level, or "full" for the full model alone; the default level when not given.

        Raises:
            SessionError: If there is no such level; the message lists the names.
        """
        bundle, manifest = loaded.bundle, loaded.bundle.manifest
        plan, engines, table = _choose(manifest, level) if control is None else _of_control(manifest, control)
        other = None if table is None else bundle.tables[table]
        programs = [loaded.program(engine) for engine in engines]  # first: the full model may be one of them
        session = cls(
            plan=plan or full_plan(manifest.plan),
            full=loaded.full,
            programs=programs,
            exact=loaded.exact,
            scheduler=bundle.scheduler,
            sample_shape=manifest.sample_shape,
            steps=manifest.steps,
            predicted_channels=manifest.predicted_channels,
            conditions=bundle.conditions,
            decoder=loaded.decoder,
            encoder=loaded.encoder,
            text=loaded.text,
            device=loaded.backend.device,
            calls=bundle.calls,
            tuned=None if plan is None or other is None else other.tables[0],
        )
        return session if plan is not None or other is None else session.along(other)

    def along(self, scheduler: SchedulerTables) -> Session:
        """Open a session over the same engines with another scheduler.

        Args:
            scheduler: The other scheduler; its first number of steps becomes the default.
        """
        other = copy.copy(self)
        other.scheduler, other.steps, other.tuned = scheduler, scheduler.counts[0], None
        return other

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[channel, height, width] of one image of the model's own size."""
        return image_shape(self.sample_shape, None if self._decoder is None else self._decoder.scale)

    @property
    def device(self) -> Device:
        """Where the engines compute."""
        return self._device

    @property
    def programs(self) -> tuple[Program, ...]:
        """One loaded engine per engine of the plan."""
        return self._programs

    @property
    def predicted_channels(self) -> int:
        """Channels of the denoiser's prediction."""
        return self._predicted_channels

    @property
    def full(self) -> Program:
        """The full model."""
        return self._full

    @property
    def non_finite_steps(self) -> int:
        """Number of steps so far that the full model repeated because an engine produced NaN or infinity."""
        return self._non_finite_steps.count

    def schedule(self, steps: int) -> tuple[int, ...]:
        """Return the engine of each step when sampling with a number of steps."""
        return self.plan.schedule(self.scheduler.table(steps).log_snr.tolist())

    def sample(
        self,
        batch: int = 1,
        *,
        seed: int = 0,
        steps: int | None = None,
        first_index: int = 0,
        noise: Array | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Array | None = None,
        strength: float = 1.0,
        conditions: Conditions | None = None,
        full_model: bool = False,
        latents: bool = False,
        on_step: Callable[[Step], None] | None = None,
    ) -> Array:
        """Sample from noise, or from an image with noise.

        Args:
            batch: Number of samples.
            seed: Seed of the noise; sample k of a seed is the same whatever the batch.
            steps: Number of steps; the bundle's default when not given. A few schedulers, such as heun, call the
                denoiser more than once per step.
            first_index: Index of the first sample within the seed.
            noise: Unit normal noise to start from, [batch, channel, height, width]; replaces batch, height and width.
            height: Height of the images in pixels; the model's own when not given.
            width: Width of the images in pixels; the model's own when not given.
            image: Samples to start from, as `encode` makes them of images, [batch, channel, height, width]; noise is
                added to them. Replaces batch, height and width.
            strength: Share of the steps that are made when starting from an image, in (0, 1]; as in diffusers, 1 makes
                all steps.
            conditions: One row per sample; the bundle's conditions when not given. SDXL's size numbers follow the size
                of the images, unless the user has chosen them.
            full_model: Run the full model at every step.
            latents: Return the samples without decoding them into images.
            on_step: Called after every step.

        Returns:
            Samples [batch, channel, height, width], float32, in the range the model was trained on (mostly -1 to 1).

        Raises:
            SessionError: If the bundle has no scheduler table for this number of steps, its scheduler cannot start
                from an image at this strength, an image is given where the bundle's conditions hold others, or an
                argument has another type.
            ShapeMismatch: If the noise or the image does not fit the model, or the conditions the noise.
            NonFiniteError: If the full model produces NaN or infinity, in place of an engine that did, or the decoder
                or the scheduler does.
        """
        start = self.start(
            batch,
            seed=seed,
            steps=steps,
            first_index=first_index,
            noise=noise,
            height=height,
            width=width,
            image=image,
            strength=strength,
            conditions=conditions,
            full_model=full_model,
        )
        with self._device.stream():
            sampled = self._denoise(start, self.rollout(full_model=full_model), on_step)
        return self.finish(sampled, latents=latents)

    def start(
        self,
        batch: int = 1,
        *,
        seed: int = 0,
        steps: int | None = None,
        first_index: int = 0,
        noise: Array | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Array | None = None,
        strength: float = 1.0,
        conditions: Conditions | None = None,
        full_model: bool = False,
    ) -> Start:
        """Check the arguments of `sample` and draw the noise; see there."""
        batch, seed = whole_number("batch", batch), whole_number("seed", seed)
        first_index = whole_number("first_index", first_index)
        height = None if height is None else whole_number("height", height)
        width = None if width is None else whole_number("width", width)
        noise = None if noise is None else float_array("noise", noise)
        image = None if image is None else float_array("image", image)
        strength = real_number("strength", strength)
        if not isinstance(conditions, Conditions | None):
            raise SessionError(
                f"conditions: got a {type(conditions).__name__}. Expected Conditions, as session.text.encode makes of "
                "prompts and session.encode_labels of classes."
            )
        table = self.scheduler.table(self.steps if steps is None else steps)
        if self.tuned is not None and table.count == self.tuned.count and image is None and not full_model:
            table = self.tuned
        if image is None and strength != 1:
            raise SessionError(f"strength is {strength:g}, and no image is given. Pass an image to start from.")
        if image is not None and conditions is None and EXTRA_CHANNELS in self.conditions.own:
            raise SessionError(
                "the bundle's conditions hold images of their own, and the given image would only replace the start. "
                "Pass conditions that hold the image, or use unetc.diffusers in the model's pipeline."
            )
        first = 0 if image is None else self.first_step(table, strength)
        if image is not None:
            batch, height, width = self._of_image(image, noise, height, width)
            table = table.starting_at(first)
        elif table.log_snr[0] > 0:  # one step of many schedulers: findings/one-step-starts-without-noise.sh
            _warn_of_start(table.steps, round(table.log_snr[0], 1))
        noise = self._noise(batch, seed, first_index, noise, height, width)
        if self.scheduler.one_size and noise.shape[2:] != self.sample_shape[1:]:
            raise ShapeMismatch(
                f"noise has shape {noise.shape}, but this scheduler's dynamic shift belongs to samples of "
                f"{' x '.join(map(str, self.sample_shape[1:]))}. Sample at that size, or build with a fixed shift."
            )
        indices = range(first_index, first_index + len(noise))
        conditions = self._checked(noise, self.conditions.take(indices) if conditions is None else conditions)
        return Start(
            table=table,
            noise=noise,
            image=image,
            first=first,
            conditions=replace(conditions, controlnet=self.conditions.controlnet),
            seed=seed,
            indices=indices,
            predicted_channels=self._predicted_channels,
        )

    def first_step(self, table: SchedulerTable, strength: float) -> int:
        """Return the row of a table at which sampling from an image begins.

        Args:
            table: A table of this session's scheduler.
            strength: Share of the steps that are made, in (0, 1].

        Raises:
            SessionError: If no step is made, or the first one needs results of the steps that are left out.
        """
        try:
            return table.first_step(strength)
        except SessionError as error:
            raise SessionError(f"{self.scheduler.name}: {error}") from error

    def encode(self, images: Array) -> Array:
        """Turn images, [batch, channel, height, width] in -1 to 1, into samples; they may be the same.

        Raises:
            SessionError: If the bundle has no encoder, or the images are not floats.
            ShapeMismatch: If the images do not fit it.
        """
        if self._encoder is not None:
            return self._encoder(images)
        if self._decoder is not None:
            raise SessionError("the bundle has no encoder for images. Build it again, from a model whose VAE has one.")
        return float_array("images", images, expected=PIXELS)

    def encode_labels(self, labels: Sequence[str | int], guidance_scale: float | None = None) -> Conditions:
        """Turn classes into conditions, for `sample`.

        Args:
            labels: One class per sample, by number or by name.
            guidance_scale: Scale of classifier-free guidance; the bundle's when not given.

        Raises:
            ModelError: If the model has no classes, a label is not one of them, or it cannot be guided.
            SessionError: If the scale is out of range.
        """
        classes = None if self.calls is None else self.calls.classes
        if classes is None:
            raise ModelError("the model has no classes, so it takes no labels. Omit them.")
        scale = self.conditions.scale if guidance_scale is None else guidance_scale
        return encode_labels("the model", labels, classes, scale)

    def _of_image(
        self, image: Array, noise: Array | None, height: int | None, width: int | None
    ) -> tuple[int, int | None, int | None]:
        """Check an image; return its number of samples, and its height and width in pixels if noise is to be drawn."""
        channels = self.sample_shape[0]
        if image.ndim != 4 or image.shape[1] != channels or min(image.shape) < 1:
            raise ShapeMismatch(f"the image has shape {image.shape}; expected [batch, {channels}, height, width].")
        if noise is not None and noise.shape != image.shape:
            raise ShapeMismatch(f"noise has shape {noise.shape}, and the image {image.shape}. Give both in one shape.")
        own = image.shape[2] * self._pixels, image.shape[3] * self._pixels
        if (height, width) not in ((None, None), own):
            raise ShapeMismatch(
                f"an image of {own[0]} x {own[1]} and another height or width are given. Give one of them."
            )
        return len(image), *((None, None) if noise is not None else own)

    def _noise(
        self, batch: int, seed: int, first: int, noise: Array | None, height: int | None, width: int | None
    ) -> Array:
        """Draw the noise, or check the given one."""
        channels, own_height, own_width = self.sample_shape
        if noise is not None:
            if noise.ndim != 4 or noise.shape[1] != channels or min(noise.shape) < 1:
                raise ShapeMismatch(f"noise has shape {noise.shape}; expected [batch, {channels}, height, width].")
            if (height, width) != (None, None):
                raise ShapeMismatch("noise and a height or width are given. Give one of them: noise has a size itself.")
            return noise
        if batch < 1:
            raise ShapeMismatch(f"cannot sample a batch of {batch}; expected at least 1.")
        sides = own_height if height is None else self._sample_side("height", height)
        across = own_width if width is None else self._sample_side("width", width)
        return initial_noise(seed, range(first, first + batch), (channels, sides, across))

    def _sample_side(self, name: str, pixels: int) -> int:
        """Compute a side of a sample from a side of the image."""
        if pixels < 1 or pixels % self._pixels:
            raise ShapeMismatch(f"cannot sample images of {name} {pixels}. Expected a multiple of {self._pixels}.")
        return pixels // self._pixels

    @property
    def _pixels(self) -> int:
        """Image pixels per sample pixel, along each side."""
        if self._decoder is None and self.conditions.size is not None:  # samples are latents of these images
            return self.conditions.size[0] // self.sample_shape[1]
        return 1 if self._decoder is None else self._decoder.scale

    def _checked(self, noise: Array, conditions: Conditions) -> Conditions:
        """Adapt conditions to the size of the samples, and refuse those that the engines cannot take."""
        if (rows := conditions.rows) not in (None, len(noise)):
            raise ShapeMismatch(f"conditions have {rows} rows; expected one for each of {len(noise)} samples.")
        _, _, height, width = noise.shape
        conditions = conditions.for_size(height * self._pixels, width * self._pixels)
        if self.calls is None:
            return conditions
        own, negative, middle = map(self.calls.read, (conditions.own, conditions.negative, conditions.middle))
        for values in filter(None, (negative, middle)):
            self.calls.check(noise, values)
        self.calls.check(noise, own)
        return replace(conditions, own=own, negative=negative, middle=middle)

    def rollout(self, *, full_model: bool = False) -> Rollout:
        """Begin a trajectory through the engines, or through the full model alone."""
        return Rollout(
            self._programs,
            self._full,
            exact=self._exact,
            predicted_channels=self._predicted_channels,
            plan=None if full_model else self.plan,
            device=self._device,
            non_finite_steps=self._non_finite_steps,
            pool=self._pool,
            prediction_type=self.scheduler.prediction_type,
        )

    def decode(self, sampled: Array) -> Array:
        """Turn samples into images, [batch, channel, height, width]; they may be the same."""
        return sampled if self._decoder is None else self._decoder(sampled)

    def finish(self, sampled: Array, *, latents: bool = False) -> Array:
        """Turn samples into images, and refuse those that no file of an image could hold.

        Args:
            sampled: Samples, [batch, channel, height, width].
            latents: Return the samples without decoding them.

        Raises:
            NonFiniteError: If they have NaN or infinity.
        """
        images = sampled if latents else self.decode(sampled)
        if np.isfinite(images).all():
            return images
        who = "the decoder" if np.isfinite(sampled).all() else "the scheduler"
        raise NonFiniteError(f"{who} produced NaN or infinity. Check that the noise and the weights are finite.")

    def _denoise(self, start: Start, rollout: Rollout, on_step: Callable[[Step], None] | None) -> Array:
        """Make all steps.

        If the loop allows it, the check for a finite prediction follows the call of the next engine, so that a GPU has
        work meanwhile. With `on_step`, and in the last step, it follows at once.
        """
        table, loop = start.table, begin(start, self._device, halves=rollout.halves)
        late = loop.runs_ahead and on_step is None
        step, call = start.first, None
        while step < table.steps:
            before, call = call, self._run(rollout, loop, start, step)
            if late and before is not None and not loop.is_finite(step - 1):
                step -= 1
                call = self._make_again(rollout, loop, step, before)
            else:
                loop.advance(step)
                if not (late and step < table.steps - 1) and not loop.is_finite(step):
                    call = self._make_again(rollout, loop, step, call)
            if on_step is not None:
                on_step(
                    Step(
                        index=step,
                        steps=table.steps,
                        timestep=call.timestep,
                        engine=call.engine,
                        tensor=loop.sample,
                        device=self._device,
                    )
                )
            step += 1
        return self._device.to_array(loop.sample)

    def _run(self, rollout: Rollout, loop: Loop, start: Start, step: int) -> EngineCall:
        """Call the engine of a step."""
        timestep, log_snr = start.table.timesteps.item(step), start.table.log_snr.item(step)
        return rollout.run(*loop.call(step), timestep, log_snr, paired=start.conditions.paired)

    def _make_again(self, rollout: Rollout, loop: Loop, step: int, failed: EngineCall) -> EngineCall:
        """Make a step with the full model."""
        call = rollout.run_again(failed, *loop.call(step))
        loop.advance(step)
        if not loop.is_finite(step):
            raise not_finite(failed, "and the full model")
        return call


_Choice = tuple[Plan | None, tuple[BundleEngine, ...], str | None]
"""Plan, its engines, and the name of a schedule; no plan is the full model."""


@functools.cache  # a command opens many sessions; one warning is enough
def _warn_of_start(steps: int, log_snr: float) -> None:
    """Warn that a schedule begins at a noise level where nothing can be made of noise."""
    logger.warning(
        "sampling in %d step(s) begins at log-SNR %.1f, where images are nearly finished, so pure noise cannot become "
        "one. Use more steps, or a scheduler with timestep_spacing trailing.",
        steps,
        log_snr,
    )


def _choose(manifest: Manifest, level: str | None) -> _Choice:
    """Return the plan of a quality level, its engines and the schedule tuned to it.

    Raises:
        SessionError: If there is no such level.
    """
    if level == FULL:
        return None, (manifest.full,), None
    own = manifest.levels[0] if level is None else manifest.level(level)
    return own.plan, own.engines, own.tuned


def _of_control(manifest: Manifest, control: Control) -> _Choice:
    """Return what a control runs."""
    return control.plan, control.engines if control.plan else (manifest.full,), control.table


def load(
    path: str | Path,
    *,
    level: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    memory: Memory | str = Memory.FAST,
) -> Session:
    """Open a bundle for sampling.

    Args:
        path: The bundle's folder.
        level: Name of a quality level, such as "40%", or "full"; the level of the smallest budget when not given.
        target: Where to run; the target it was built for when not given.
        threads: Number of CPU threads; the number it was measured with when not given, 0 lets the backend choose.
        memory: "fast" or "low", see `Memory`.

    Raises:
        ArtifactError: If the bundle cannot be read or is damaged, or the target runs engines that were not compiled.
        SessionError: If the level, the target or the memory mode is unknown, or there is no GPU where the target needs
            one.
        MissingDependency: If the backend's library is not installed.
    """
    bundle = Bundle.open(Path(path))
    backend = backend_for(bundle.manifest, target=target, threads=threads, memory=memory)
    return Session.of(bundle, backend, level=level)


def backend_for(manifest: Manifest, *, target: str | None, threads: int | None, memory: Memory | str) -> Backend:
    """Open a backend for a bundle; arguments as for `load`.

    Raises:
        SessionError: If the target or the memory mode is unknown.
        MissingDependency: If the backend's library is not installed.
    """
    if memory not in tuple(Memory):
        raise SessionError(f"unknown memory mode {memory!r}. Expected one of: {', '.join(Memory)}.")
    return open_backend(
        target or manifest.target, threads=manifest.threads if threads is None else threads, memory=Memory(memory)
    )
