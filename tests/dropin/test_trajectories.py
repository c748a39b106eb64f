"""Whose trajectory is it? Calls that take turns equal the same calls of drop-ins of their own (kind B)."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.dropin.runs import SIDE, STEPS, Engines, begin, diffusers, dropin_of, last, noise, run, words
from unetc.compiler.schedulers.classes import CLASSES, Family
from unetc.diffusers import BundleUNet
from unetc.diffusers.trajectories import LIVE, Place

FREE = "cross-attention"
"""A denoiser with prompts, for its conditions."""

ALTERNATING = [0, 1] * (STEPS // 2)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    return Engines(monkeypatch)


@pytest.fixture
def fresh(shared: Path) -> BundleUNet:
    return dropin_of(FREE, shared)


def alone(shared: Path, *values: Tensor, **options: object) -> list[Tensor]:
    """Run with a drop-in of its own."""
    return list(run(dropin_of(FREE, shared), *values, **options))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("numbers", [False, True], ids=["elements", "numbers"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_run_alternates_between_engines(fresh: BundleUNet, engines: Engines, scheduler: str, numbers: bool) -> None:
    last(run(fresh, noise(0), words(0), scheduler=scheduler, numbers=numbers))
    assert engines.take() == ALTERNATING


@pytest.mark.parametrize("numbers", [False, True], ids=["elements", "numbers"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_loop_may_write_over_its_samples_and_predictions(
    shared: Path, fresh: BundleUNet, engines: Engines, scheduler: str, numbers: bool
) -> None:
    timing, samples = begin(scheduler), noise(0)
    for timestep in timing.timesteps:
        with torch.no_grad():
            predicted = fresh(samples, timestep.item() if numbers else timestep, words(0)).sample
        samples.copy_(timing.step(predicted.clone(), timestep, samples.clone()).prev_sample)
        predicted.zero_()
    assert engines.take() == ALTERNATING
    assert_equal(samples, alone(shared, noise(0), words(0), scheduler=scheduler, numbers=numbers)[-1])


@pytest.mark.parametrize("numbers", [False, True], ids=["elements", "numbers"])
def test_sequential_guidance_follows_two_trajectories(  # B1
    shared: Path, fresh: BundleUNet, engines: Engines, numbers: bool
) -> None:
    """Each half of the guidance has its own branches, as in a batched call."""
    unconditional, prompt = words(0), words(1)
    sample = last(run(fresh, noise(0), unconditional, prompt, numbers=numbers))
    assert engines.take() == [engine for engine in ALTERNATING for _ in range(2)]

    class Batched:
        def __init__(self) -> None:
            self.unet = dropin_of(FREE, shared)

        def __call__(self, seen: Tensor, timestep: Tensor, both: Tensor) -> object:
            return self.unet(torch.cat([seen, seen]), timestep, both)

    batched, timing, expected = Batched(), begin("DDIMScheduler"), noise(0)
    for timestep in timing.timesteps:
        with torch.no_grad():
            negative, own = batched(expected, timestep, torch.cat([unconditional, prompt])).sample.chunk(2)
        expected = timing.step(negative + 3.0 * (own - negative), timestep, expected).prev_sample
    torch.testing.assert_close(sample, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("numbers", [False, True], ids=["elements", "numbers"])
def test_tiles_keep_their_own_branches(  # B1
    shared: Path, fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture, numbers: bool
) -> None:
    """Two tiles share the timesteps and the prompt; the samples prove which is which."""
    timing, tiles, prompt = begin("DDIMScheduler"), [noise(0), noise(1)], words(0)
    for timestep in timing.timesteps:
        given = timestep.item() if numbers else timestep
        for place, tile in enumerate(tiles):
            with torch.no_grad():
                predicted = fresh(tile, given, prompt).sample
            tiles[place] = timing.step(predicted, timestep, tile).prev_sample
    assert engines.take() == [engine for engine in ALTERNATING for _ in range(2)]
    for seed, tile in enumerate(tiles):
        assert_equal(tile, alone(shared, noise(seed), prompt)[-1])
    assert not caplog.records


def test_tiles_with_noise_reuse_nothing_and_say_so_once(
    shared: Path, fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    timing, tiles, prompt = begin("EulerAncestralDiscreteScheduler"), [noise(0), noise(1)], words(0)
    full, generator = dropin_of(FREE, shared, full_model=True), torch.Generator().manual_seed(99)
    with caplog.at_level(logging.WARNING, "unetc"):
        for timestep in timing.timesteps:
            for place, tile in enumerate(tiles):
                seen = timing.scale_model_input(tile, timestep)
                with torch.no_grad():
                    predicted = fresh(seen, timestep, prompt).sample
                    torch.testing.assert_close(predicted, full(seen, timestep, prompt).sample, rtol=0, atol=1e-5)
                timing._step_index = None  # each tile makes the same step
                tiles[place] = timing.step(predicted, timestep, tile, generator=generator).prev_sample
    assert set(engines.take()[::2]) == {0}
    assert [record.message for record in caplog.records if "nothing is reused" in record.message.lower()] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_cancelled_run_leaves_nothing_behind(  # B2
    shared: Path, fresh: BundleUNet, engines: Engines, done: int, same_noise: bool
) -> None:
    """Image to image of the same size and prompt begins at a lower timestep, perhaps with the same noise."""
    prompt, start = words(0), done + 1
    list(itertools.islice(run(fresh, noise(0), prompt), done))
    engines.take()
    image = 0.05 * noise(5) + noise(0 if same_noise else 1)
    actual = list(run(fresh, image, prompt, start=start))
    assert engines.take() == ALTERNATING[: STEPS - start]
    assert_equal(actual[-1], alone(shared, image, prompt, start=start)[-1])


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_noise_keeps_the_saving_where_its_size_proves_the_run(
    fresh: BundleUNet, engines: Engines, scheduler: str
) -> None:
    last(run(fresh, noise(0), words(0), scheduler=scheduler, steps=20))
    ran = engines.take()
    assert ran.count(1) >= 8


@pytest.mark.parametrize("timesteps", [[900, 700, 500, 300], [500, 500, 500, 500], [400, 300, 200, 100]])
def test_unrelated_samples_reuse_nothing(shared: Path, fresh: BundleUNet, timesteps: list[int]) -> None:
    """A validation loss walks through one tensor of timesteps with another sample each."""
    full, every = dropin_of(FREE, shared, full_model=True), torch.tensor(timesteps)
    levels = begin("DDIMScheduler").alphas_cumprod
    for seed, timestep in enumerate(every):
        image = noise(50 + seed).cumsum(-1).cumsum(-2) / 20
        sample = levels[timestep] ** 0.5 * image + (1 - levels[timestep]) ** 0.5 * noise(seed)
        with torch.no_grad():
            actual, expected = (unet(sample, timestep, words(0)).sample for unet in (fresh, full))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "done"),
    [
        *itertools.product(("DDIMScheduler", "EulerDiscreteScheduler"), (1, 2, 3)),
        ("EulerAncestralDiscreteScheduler", 1),
    ],
)
def test_a_run_may_take_over_the_timesteps_of_a_cancelled_one(  # B2
    shared: Path, fresh: BundleUNet, scheduler: str, done: int
) -> None:
    """A loop sets the timesteps once, cancels a run, and goes on from another image with the next element."""
    timing, sample = begin(scheduler), noise(0)
    with torch.no_grad():
        for timestep in timing.timesteps[:done]:
            predicted = fresh(timing.scale_model_input(sample, timestep), timestep, words(0)).sample
            sample = timing.step(predicted, timestep, sample).prev_sample
        taken = fresh(noise(9), timing.timesteps[done], words(0)).sample
        own = dropin_of(FREE, shared)
        assert_equal(taken, own(noise(9), timing.timesteps[done], words(0)).sample)


def test_clipped_predictions_are_a_proof_too(shared: Path, engines: Engines) -> None:
    """DDIM and DPM-Solver clip what they denoise, if samples are images."""
    unet = dropin_of("attention", shared)
    timing = diffusers.DDIMScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", clip_sample=True
    )
    timing.set_timesteps(STEPS)
    sample = noise(0, 2)
    for timestep in timing.timesteps:
        with torch.no_grad():
            predicted = unet(sample, timestep.item()).sample
        sample = timing.step(predicted, timestep, sample).prev_sample
    assert engines.take() == ALTERNATING


def test_too_many_trajectories_are_said_once(
    fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    timing, samples = begin("DDIMScheduler"), [noise(0)] * (LIVE + 1)
    with caplog.at_level(logging.WARNING, "unetc"), torch.no_grad():
        for timestep in timing.timesteps:
            for prompt, sample in enumerate(samples):
                predicted = fresh(sample, timestep, words(prompt)).sample
                samples[prompt] = timing.step(predicted, timestep, sample).prev_sample
    assert set(engines.take()) == {0}
    assert [f"more than {LIVE} trajectories" in record.message for record in caplog.records] == [True]


def test_noise_and_timesteps_as_numbers_reuse_nothing(
    shared: Path, fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "unetc"):
        for _ in range(2):
            actual = last(run(fresh, noise(0), words(0), scheduler="EulerAncestralDiscreteScheduler", numbers=True))
    assert set(engines.take()) == {0}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "scheduler.timesteps" in caplog.text
    full = dropin_of(FREE, shared, full_model=True)
    expected = last(run(full, noise(0), words(0), scheduler="EulerAncestralDiscreteScheduler"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_image_to_image_follows_text_to_image(shared: Path, fresh: BundleUNet) -> None:
    prompt = words(0)
    for start in (0, 3, 0, 1, 5):
        assert_equal(
            list(run(fresh, noise(2), prompt, start=start))[-1], alone(shared, noise(2), prompt, start=start)[-1]
        )


def kept(unet: BundleUNet) -> int:
    """Count the bytes of all branches that a drop-in keeps."""
    states = [one.rollout._cache.snapshot() for one in unet._trajectories._live]
    histories = [history for state in states for history in (*state.branches.values(), state.denoised)]
    to_array = unet._session.device.to_array
    return sum(to_array(branch).nbytes for history in histories for _, branch in history)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_finished_runs_keep_their_branches_until_the_next_one(
    shared: Path, fresh: BundleUNet, scheduler: str, prompts: int
) -> None:
    values = noise(0), *map(words, range(prompts))
    expected = alone(shared, *values, scheduler=scheduler)
    bytes_kept, most = [], []
    for _ in range(LIVE + 2):
        steps = run(fresh, *values, scheduler=scheduler)
        samples, kept_within = zip(*((sample, kept(fresh)) for sample in steps), strict=True)
        for one, wanted in zip(samples, expected, strict=True):
            assert_equal(one, wanted)
        bytes_kept.append(kept_within[-1])
        most.append(max(kept_within))
    assert bytes_kept[0] > 0
    assert set(bytes_kept) == {bytes_kept[0]}
    assert set(most) == {most[0]}


def test_a_tile_keeps_its_branches_while_another_one_is_finished(
    shared: Path, fresh: BundleUNet, engines: Engines
) -> None:
    timing, tiles = begin("DDIMScheduler"), [noise(0), noise(1)]
    for timestep in timing.timesteps:
        for place, tile in enumerate(tiles):
            with torch.no_grad():
                if place and timestep == timing.timesteps[-1]:
                    fresh(noise(2), begin("DDIMScheduler").timesteps[0], words(0))  # an image of another thread
                predicted = fresh(tile, timestep, words(0)).sample
            tiles[place] = timing.step(predicted, timestep, tile).prev_sample
    assert engines.take() == [*(engine for engine in ALTERNATING[:-1] for _ in range(2)), 1, 0, 1]
    assert_equal(tiles[1], alone(shared, noise(1), words(0))[-1])


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_second_calls_of_a_step_belong_to_its_run(
    shared: Path, fresh: BundleUNet, engines: Engines, scheduler: str
) -> None:
    """Heun calls twice at a timestep, KDPM2 between timesteps, PNDM twice at the second."""
    first = last(run(fresh, noise(0), words(0), scheduler=scheduler))
    ran = engines.take()
    assert ran == [0, 1] * (len(ran) // 2) + [0] * (len(ran) % 2)
    assert_equal(last(run(fresh, noise(0), words(0), scheduler=scheduler)), first)


def test_the_batch_is_part_of_the_trajectory(fresh: BundleUNet, engines: Engines) -> None:
    timing = begin("DDIMScheduler")
    with torch.no_grad():
        fresh(noise(0), timing.timesteps[0], words(0))
        fresh(torch.cat([noise(0)] * 2), timing.timesteps[1], torch.cat([words(0)] * 2))
    assert engines.take() == [0, 0]


def test_another_prompt_in_the_middle_begins_anew(fresh: BundleUNet, engines: Engines) -> None:
    timing, sample = begin("DDIMScheduler"), noise(0)
    for timestep, prompt in zip(timing.timesteps, (0, 0, 1, 1), strict=False):
        with torch.no_grad():
            predicted = fresh(sample, timestep, words(prompt)).sample
        sample = timing.step(predicted, timestep, sample).prev_sample
    assert engines.take() == [0, 1, 0, 1]


def test_threads_keep_their_own_branches(shared: Path, fresh: BundleUNet) -> None:
    results: dict[int, Tensor] = {}

    def sample(seed: int) -> None:
        results[seed] = last(run(fresh, noise(seed), words(0)))

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, sample_ in results.items():
        assert_equal(sample_, alone(shared, noise(seed), words(0))[-1])
    assert len(results) == 4


def test_a_copy_shares_no_trajectory(fresh: BundleUNet, engines: Engines) -> None:
    timing = begin("DDIMScheduler")
    with torch.no_grad():
        fresh(noise(0), timing.timesteps[0], words(0))
        copy.deepcopy(fresh)(noise(0), timing.timesteps[1], words(0))
        fresh.reset()
        fresh(noise(0), timing.timesteps[1], words(0))
    assert engines.take() == [0, 0, 0]


RUNS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "prompts": st.sampled_from([(0,), (1,), (0, 1)]),
        "scheduler": st.sampled_from(
            ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
        ),
        "start": st.integers(0, STEPS - 1),
        "numbers": st.booleans(),
        "cancelled": st.integers(1, 2 * STEPS),
    }
)


@settings(max_examples=25, deadline=None)
@given(runs=st.lists(RUNS, min_size=2, max_size=LIVE // 2), turns=st.randoms(use_true_random=False))
def test_runs_that_take_turns_equal_runs_alone(shared: Path, runs: list[dict[str, object]], turns: object) -> None:
    """The law of the drop-in: whatever else calls it, a trajectory's samples are those of a drop-in of its own."""

    def steps_of(unet: BundleUNet, one: dict[str, object]) -> object:
        options = {name: one[name] for name in ("scheduler", "start", "numbers")}
        steps = run(unet, noise(one["seed"]), *map(words, one["prompts"]), **options)
        return itertools.islice(steps, one["cancelled"])

    together = dropin_of(FREE, shared)
    running = {place: steps_of(together, one) for place, one in enumerate(runs)}
    results: dict[int, list[Tensor]] = {place: [] for place in running}
    while running:
        place = turns.choice(sorted(running))
        sample = next(running[place], None)
        if sample is None:
            del running[place]
        else:
            results[place].append(sample)
    for place, one in enumerate(runs):
        expected = list(steps_of(dropin_of(FREE, shared), one))
        for actual, wanted in zip(results[place], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


IN_FAMILIES = {
    family: sorted(
        name
        for name, row in CLASSES.items()
        if row.family == family and name != "KDPM2AncestralDiscreteScheduler"  # gives NaN with these betas
    )
    for family in Family
}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, str]:
    """Draw two schedulers of one family."""
    one = st.sampled_from(IN_FAMILIES[draw(st.sampled_from(Family))])
    return draw(one), draw(one)


@functools.cache
def sampled_alone(shared: Path, scheduler: str, prompts: int, *, numbers: bool) -> Tensor:
    unet = dropin_of(FREE, shared, CLASSES[scheduler].family)
    return last(run(unet, noise(0), *map(words, range(prompts)), scheduler=scheduler, numbers=numbers))


@settings(max_examples=20, deadline=None)
@given(pair=pairs(), prompts=st.sampled_from([1, 2]), numbers=st.booleans())
@example(pair=("DEISMultistepScheduler", "LMSDiscreteScheduler"), prompts=1, numbers=True)
@example(pair=("DEISMultistepScheduler", "LMSDiscreteScheduler"), prompts=2, numbers=True)
@example(pair=("DPMSolverMultistepScheduler", "DEISMultistepScheduler"), prompts=1, numbers=True)
@example(pair=("EulerDiscreteScheduler", "LMSDiscreteScheduler"), prompts=1, numbers=False)
@example(pair=("DDIMScheduler", "DDPMScheduler"), prompts=1, numbers=False)
@example(pair=("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), prompts=1, numbers=True)
@example(pair=("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), prompts=1, numbers=True)
@example(pair=("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"), prompts=1, numbers=False)
def test_two_schedulers_take_turns_from_the_same_noise(
    shared: Path, pair: tuple[str, str], prompts: int, numbers: bool
) -> None:
    """They have their first calls in common, so one trajectory explains calls of the other; savings stay too."""
    unet, results = dropin_of(FREE, shared, CLASSES[pair[0]].family), dict[int, Tensor]()
    running = [run(unet, noise(0), *map(words, range(prompts)), scheduler=one, numbers=numbers) for one in pair]
    for turn in itertools.zip_longest(*running):
        results.update({place: sample for place, sample in enumerate(turn) if sample is not None})
    for place, scheduler in enumerate(pair):
        expected = sampled_alone(shared, scheduler, prompts, numbers=numbers)
        torch.testing.assert_close(results[place], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("same_noise", [False, True])
def test_runs_with_noise_of_their_own_take_turns(  # B1
    shared: Path, fresh: BundleUNet, scheduler: str, same_noise: bool
) -> None:
    """Each run has its own generator, so turns do not change what it draws."""
    seeds = (0, 0) if same_noise else (0, 1)
    options = {"scheduler": scheduler, "steps": 10}
    running = [
        run(fresh, noise(seed), words(0), generator=place, **options)  # another generator each
        for place, seed in enumerate(seeds)
    ]
    *_, together = zip(*running, strict=True)
    for place, seed in enumerate(seeds):
        assert_equal(together[place], alone(shared, noise(seed), words(0), generator=place, **options)[-1])


def test_a_prompt_that_changes_continues_no_run_from_the_same_noise(shared: Path) -> None:
    """Only the other run has the prompt of the second call, and the samples come from a call with the first prompt."""
    unet, timing = dropin_of(FREE, shared), begin("DDIMScheduler")
    full = dropin_of(FREE, shared, full_model=True)

    def step(sample: Tensor, place: int, prompt: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            predicted = unet(sample, timing.timesteps[place].item(), words(prompt)).sample
        return predicted, timing.step(predicted, timing.timesteps[place], sample).prev_sample

    _, changed = step(noise(0), 0, 0)
    _, other = step(noise(0), 0, 1)
    for place in range(1, 3):  # the other run would reuse branches in its next call
        _, other = step(other, place, 1)
    predicted, _ = step(changed, 3, 1)
    with torch.no_grad():
        expected = full(changed, timing.timesteps[3].item(), words(1)).sample
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)


def test_a_run_that_made_room_continues_no_other_from_the_same_noise(shared: Path) -> None:
    """Other prompts take the room of the first run; the second one begins equally and goes on alone."""
    unet, full = dropin_of(FREE, shared), dropin_of(FREE, shared, full_model=True)
    timing = begin("DDIMScheduler")

    def call(sample: Tensor, timestep: float, prompt: int = 0) -> Tensor:
        with torch.no_grad():
            predicted: Tensor = unet(sample, timestep, words(prompt)).sample
        return predicted

    starts = timing.timesteps[0].item()
    made_room = 0.7 * noise(0) + 0.4 * call(noise(0), starts)
    stays = noise(0)
    for timestep in timing.timesteps[:3]:
        predicted = call(stays, timestep.item())
        if timestep == starts:
            for other in range(1, LIVE):
                call(noise(other), starts, other)
        stays = timing.step(predicted, timestep, stays).prev_sample
    later = timing.timesteps[2].item() - 20
    predicted = call(made_room, later)
    with torch.no_grad():
        expected = full(made_room, later, words(0)).sample
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)


MASK = torch.zeros(1, 1, SIDE, SIDE)
MASK[..., :5, 3:] = 1


def inpaint(
    unet: BundleUNet,
    image: Tensor,
    *prompts: Tensor,
    scheduler: str = "DDIMScheduler",
    start: int = 0,
    mask: Tensor = MASK,
    batched: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Sample as pipelines of diffusers inpaint with a UNet of 4 channels: paste the noised original at every step."""
    timing, fixed, image = begin(scheduler), noise(77).to(dtype), image.to(dtype)
    timing.set_begin_index(start) if hasattr(timing, "set_begin_index") else None
    timesteps = timing.timesteps[start:]
    sample = timing.add_noise(image, fixed, timesteps[:1]) if start else fixed * timing.init_noise_sigma
    for place, timestep in enumerate(timesteps):
        seen = timing.scale_model_input(sample, timestep)
        with torch.no_grad():
            if batched:
                predictions = unet(torch.cat([seen] * len(prompts)), timestep, torch.cat(prompts)).sample.chunk(2)
            else:
                predictions = [unet(seen, timestep, prompt).sample for prompt in prompts]
        predicted = predictions[0] + 3.0 * (predictions[-1] - predictions[0])
        sample = timing.step(predicted, timestep, sample).prev_sample
        original = image
        if place + 1 < len(timesteps):
            original = timing.add_noise(image, fixed, timesteps[place + 1 : place + 2])
        sample = ((1 - mask) * original + mask * sample).to(dtype)
        yield sample


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("guidance", ["none", "batched", "sequential"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_inpainting_keeps_its_saving_but_for_one_step(
    shared: Path,
    fresh: BundleUNet,
    engines: Engines,
    caplog: pytest.LogCaptureFixture,
    scheduler: str,
    guidance: str,
    start: int,
) -> None:
    """Nothing explains the first paste; all later ones are explained by two earlier samples."""
    prompts = (words(0),) if guidance == "none" else (words(0), words(1))
    options = {"scheduler": scheduler, "batched": guidance == "batched", "start": start}
    sample = last(inpaint(fresh, 0.5 * noise(5), *prompts, **options))
    calls = 2 if guidance == "sequential" else 1
    assert engines.take() == [engine for engine in [0, *ALTERNATING][: STEPS - start] for _ in range(calls)]
    assert not caplog.records
    assert_equal(last(inpaint(fresh, 0.5 * noise(5), *prompts, **options)), sample)


def test_inpainting_in_half_precision_keeps_its_saving(fresh: BundleUNet, engines: Engines) -> None:
    last(inpaint(fresh, 0.5 * noise(5), words(0), words(1), batched=True, dtype=torch.float16))
    assert engines.take() == [0, *ALTERNATING][:STEPS]


def test_inpainting_in_bfloat16_loses_savings_and_says_so_once(
    fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    last(inpaint(fresh, 0.5 * noise(5), words(0), words(1), batched=True, dtype=torch.bfloat16))
    assert engines.take()[:2] == [0, 0]
    assert len(caplog.records) == 1


def test_inpainting_follows_a_mask_that_changes(fresh: BundleUNet, engines: Engines) -> None:
    """Differential diffusion has another mask at every step."""
    timing, fixed, image = begin("DDIMScheduler"), noise(77), 0.5 * noise(5)
    sample = fixed
    for place, timestep in enumerate(timing.timesteps):
        with torch.no_grad():
            predicted = fresh(sample, timestep, words(0)).sample
        sample = timing.step(predicted, timestep, sample).prev_sample
        if place + 1 < STEPS:
            mask = torch.zeros(1, 1, SIDE, SIDE)
            mask[..., : 3 + place, :] = 1
            original = timing.add_noise(image, fixed, timing.timesteps[place + 1 : place + 2])
            sample = (1 - mask) * original + mask * sample
    ran = engines.take()
    assert ran[:2] == [0, 0]
    assert 1 in ran


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_cancelled_inpainting_leaves_nothing_behind(shared: Path, fresh: BundleUNet, done: int) -> None:
    prompt, image = words(0), 0.5 * noise(5)
    for other, mask in ((image, 1 - MASK), (0.5 * noise(6), MASK), (image, MASK)):
        list(itertools.islice(inpaint(fresh, image, prompt), done))
        for start in (done, done + 1):
            actual = list(inpaint(fresh, other, prompt, start=start, mask=mask))
            expected = list(inpaint(dropin_of(FREE, shared), other, prompt, start=start, mask=mask))
            for one, wanted in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", range(1, SIDE))
def test_a_collage_of_two_trajectories_continues_neither(
    fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture, width: int
) -> None:
    timing, samples = begin("DDIMScheduler"), [noise(0), noise(1)]
    for timestep in timing.timesteps[:3]:
        for place, sample in enumerate(samples):
            with torch.no_grad():
                predicted = fresh(sample, timestep, words(0)).sample
            samples[place] = timing.step(predicted, timestep, sample).prev_sample
    engines.take()
    left, right = samples
    with torch.no_grad():
        fresh(torch.cat([left[..., :width], right[..., width:]], dim=-1), timing.timesteps[3], words(0))
    assert engines.take() == [0]


def test_embeddings_that_change_every_step_are_said_once(
    shared: Path, fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    """Branches of other embeddings are not used."""
    full, timing, sample = dropin_of(FREE, shared, full_model=True), begin("DDIMScheduler"), noise(0)
    for place, timestep in enumerate(timing.timesteps):
        prompt = words(0) + 0.01 * place
        with torch.no_grad():
            predicted = fresh(sample, timestep, prompt).sample
            torch.testing.assert_close(predicted, full(sample, timestep, prompt).sample, rtol=0, atol=1e-5)
        sample = timing.step(predicted, timestep, sample).prev_sample
    assert set(engines.take()[::2]) == {0}
    assert ["conditions differ from the last step's" in record.message for record in caplog.records] == [True]


def test_a_prompt_that_changes_once_is_not_said(fresh: BundleUNet, caplog: pytest.LogCaptureFixture) -> None:
    for change in range(1, STEPS):
        timing, sample = begin("DDIMScheduler"), noise(change)
        for place, timestep in enumerate(timing.timesteps):
            with torch.no_grad():
                predicted = fresh(sample, timestep, words(int(place >= change))).sample
            sample = timing.step(predicted, timestep, sample).prev_sample
    assert not caplog.records


FRESH_TENSORS = {
    "copies of all timesteps": lambda every, place: every.clone()[place],
    "another type": lambda every, place: every.float()[place],
    "one timestep for each of a batch": lambda every, place: torch.stack([every[place]] * 3)[1],
    "the batch as a whole": lambda every, place: every[place].repeat(2),
}


@pytest.mark.parametrize("kind", FRESH_TENSORS)
def test_fresh_tensors_of_timesteps_keep_the_saving(
    fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    timing, sample, prompts = begin("DDIMScheduler"), torch.cat([noise(0), noise(1)]), torch.cat([words(0), words(1)])
    for place, timestep in enumerate(timing.timesteps):
        with torch.no_grad():
            predicted = fresh(sample, FRESH_TENSORS[kind](timing.timesteps, place), prompts).sample
        sample = timing.step(predicted, timestep, sample).prev_sample
    assert engines.take() == ALTERNATING
    assert not caplog.records


def test_other_tensors_at_every_step_are_said_once(
    fresh: BundleUNet, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    """Small tensors with other elements could be the timesteps of other runs."""
    timing, sample = begin("DDIMScheduler"), noise(0)
    for timestep in timing.timesteps:
        with torch.no_grad():
            predicted = fresh(sample, torch.stack([timestep, timestep - 1])[0], words(0)).sample
        sample = timing.step(predicted, timestep, sample).prev_sample
    assert set(engines.take()) == {0}
    assert ["in another tensor than the last one" in record.message for record in caplog.records] == [True]


def test_a_place_is_an_element_of_a_larger_tensor() -> None:
    timesteps = torch.tensor([9.0, 5.0, 1.0])
    places = [Place.of(timestep) for timestep in timesteps]
    assert [place and place.index for place in places] == [0, 1, 2]
    assert [place and place.is_last for place in places] == [False, False, True]
    assert len({place.run for place in places if place}) == 1
    expanded = Place.of(timesteps[1].expand(4))
    assert expanded is not None
    assert expanded.index == 1
    assert Place.of(5.0) is None
    assert Place.of(torch.tensor(5.0)) is None
    assert Place.of(torch.full((4,), 5.0)) is None
