"""The kernel that makes one scheduler step, with guidance and noise, and checks that the prediction is finite."""

from __future__ import annotations

import triton
import triton.language as tl

from unetc.sampler.noise import ROUNDS

BLOCK = 512
"""Elements of a sample that one program makes."""
SCALARS = tl.constexpr(8)
"""Number of columns before the coefficients of samples and predictions. They are: the scale of the next input; p, q,
weight and clip of the denoised sample; the weight of the noise, and both bounds of its variance."""
_ROUNDS = tl.constexpr(ROUNDS)
LARGEST = tl.constexpr(3.4028234663852886e38)
"""Largest number of float32."""


@triton.jit(do_not_specialize=["step", "batch"])
def make_step(
    prediction,  # float32 [row, predicted channel, height, width], as the engine gives it
    samples,  # float32 [LAGS + 1, batch, channel, height, width], a ring: step i is at i modulo LAGS + 1
    predictions,  # float32 [LAGS, batch, channel, height, width], a ring too, after guidance
    seen,  # float32 [row, channel, height, width], written: the next step's input
    non_finite,  # float32 [step]: NaN is written where the prediction is not finite
    coefficients,  # float32 [step, SCALARS + 2 * LAGS]
    keys,  # int64 [1 + batch]: the seed, and the index of every sample within it
    step,
    guidance,  # guidance scale
    batch,
    elements,  # number of elements of one sample
    LAGS: tl.constexpr,
    GUIDED: tl.constexpr,
    LEARNED: tl.constexpr,  # whether the variance is predicted too
    NOISY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make one block of one sample; see `unetc.sampler.table.update`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    sample = tl.program_id(1).to(tl.int64)
    here = sample * elements + place
    slot = batch.to(tl.int64) * elements
    scalars = coefficients + step * (SCALARS + 2 * LAGS)
    sample_weights = scalars + SCALARS
    prediction_weights = sample_weights + LAGS

    row_elements = elements * 2 if LEARNED else elements
    own = prediction + (sample + batch if GUIDED else sample) * row_elements + place
    negative = prediction + sample * row_elements + place
    predicted = tl.load(own, mask=inside, other=0.0)
    is_finite = _is_finite(predicted)
    if GUIDED:
        away = tl.load(negative, mask=inside, other=0.0)
        is_finite &= _is_finite(away)
        predicted = away + guidance * (predicted - away)

    current = tl.load(samples + step % (LAGS + 1) * slot + here, mask=inside, other=0.0)
    following = tl.load(sample_weights) * current
    for lag in tl.static_range(1, LAGS):
        weight = tl.load(sample_weights + lag)
        if weight != 0.0:  # the first steps have no past
            past = samples + (step + LAGS + 1 - lag) % (LAGS + 1) * slot + here
            following += weight * tl.load(past, mask=inside, other=0.0)
    combined = tl.load(prediction_weights) * predicted
    for lag in tl.static_range(1, LAGS):
        weight = tl.load(prediction_weights + lag)
        if weight != 0.0:
            past = predictions + (step + LAGS - lag) % LAGS * slot + here
            combined += weight * tl.load(past, mask=inside, other=0.0)
    following += combined

    denoised = tl.load(scalars + 1) * current + tl.load(scalars + 2) * predicted
    clip = tl.load(scalars + 4)
    following += tl.load(scalars + 3) * tl.minimum(tl.maximum(denoised, -clip), clip)

    deviation = tl.load(scalars + 5)
    if LEARNED:
        variance = tl.load(own + elements, mask=inside, other=0.0)
        is_finite &= _is_finite(variance)
        if GUIDED:
            is_finite &= _is_finite(tl.load(negative + elements, mask=inside, other=0.0))
        share = 0.5 * variance + 0.5
        deviation = deviation * tl.exp(0.5 * (tl.load(scalars + 7) * share + tl.load(scalars + 6) * (1.0 - share)))
    if NOISY:
        following += deviation * _normal(tl.load(keys), tl.load(keys + 1 + sample), step, place)

    if tl.min(is_finite.to(tl.int32), axis=0) == 0:
        tl.store(non_finite + step, float("nan"))
    tl.store(samples + (step + 1) % (LAGS + 1) * slot + here, following, mask=inside)
    if LAGS > 1:
        tl.store(predictions + step % LAGS * slot + here, predicted, mask=inside)
    scaled = tl.load(scalars) * following
    tl.store(seen + here, scaled, mask=inside)
    if GUIDED:
        tl.store(seen + slot + here, scaled, mask=inside)


@triton.jit
def _is_finite(values):
    return tl.abs(values) <= LARGEST  # false for NaN


@triton.jit
def _normal(seed, index, step, place):
    """Draw a normal number for every element, as `unetc.sampler.noise.step_noise` does."""
    block = (place // 4).to(tl.uint32)
    nothing = tl.zeros_like(block)
    low = nothing + (index & 0xFFFFFFFF).to(tl.uint32)
    high = nothing + ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    words = tl.philox(seed, block, nothing + step.to(tl.uint32), low, high, _ROUNDS)
    lane = place % 4
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(_uniform(tl.where(lane < 2, words[0], words[2]))), 0.0))
    angle = 6.283185307179586 * _uniform(tl.where(lane < 2, words[1], words[3]))
    return radius * tl.where(lane % 2 == 0, tl.cos(angle), tl.sin(angle))


@triton.jit
def _uniform(words):
    return words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
