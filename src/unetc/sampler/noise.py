"""Normal random numbers that depend on seed, sample and step, but never on the batch.

All noise comes from Philox, a generator that computes its output from a counter. numpy draws the initial noise: every
sample has a separate Philox 4x64 stream, from which the ziggurat method draws float32 normals in C order. The noise of
a step may instead be drawn on a GPU, inside the kernel that computes the step, so its definition is simple enough for
both. The counter of Philox 4x32 holds the index of a block of four elements, the step and the sample. The Box-Muller
transform turns each output into four normals. CPU and GPU give the same numbers up to rounding in the logarithm, sine
and cosine.

Source:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", DOI 10.1145/2063384.2063405, for Philox.
    Box and Muller 1958, "A note on the generation of random normal deviates", DOI 10.1214/aoms/1177706645.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unetc.arguments import whole_number
from unetc.errors import SessionError

ROUNDS = 10
"""Number of Philox rounds."""
_WORD = 2**64
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw the unit normal noise from which sampling starts.

    Args:
        seed: Seed of the run, 0 <= seed < 2^64.
        indices: Index of each sample of the batch within the run, 0 <= index < 2^64.
        shape: (channel, height, width) of one sample.

    Returns:
        [batch, channel, height, width], mean 0, standard deviation 1. Row k depends only on seed and indices[k].

    Raises:
        SessionError: If the seed or an index is out of range.
    """
    require_words(seed, *indices)
    noise = np.empty((len(indices), *shape), np.float32)
    for index, sample in zip(indices, noise, strict=True):
        philox = np.random.Philox(key=np.array([seed, index], np.uint64))
        np.random.Generator(philox).standard_normal(out=sample, dtype=np.float32)
    return noise


def step_noise(seed: int, indices: Sequence[int], step: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw the fresh unit normal noise that a stochastic scheduler adds in one step.

    Args:
        seed: Seed of the run, 0 <= seed < 2^64.
        indices: Index of each sample of the batch within the run, 0 <= index < 2^64.
        step: Step index, 0 <= step < 2^32.
        shape: (channel, height, width) of one sample, with fewer than 2^34 elements.

    Returns:
        [batch, channel, height, width], mean 0, standard deviation 1; independent of `initial_noise` and other steps.
        In C order, elements 4k to 4k + 3 come from block k.

    Raises:
        SessionError: If the seed, the step or an index is out of range.
    """
    require_words(seed, *indices)
    if not 0 <= step < 2**32:
        raise SessionError(f"cannot draw noise for step {step}. Steps must lie between 0 and 2^32 - 1.")
    size = int(np.prod(shape))
    blocks = np.arange(-(-size // 4), dtype=np.uint64)
    samples = np.array(indices, np.uint64)[:, None]
    words = philox((seed % 2**32, seed >> 32), (blocks, np.uint64(step), samples & _LOW, samples >> _HALF))
    normals = np.stack([*_normals(*words[:2]), *_normals(*words[2:])], axis=-1)
    return np.ascontiguousarray(normals.reshape(len(indices), -1)[:, :size]).reshape(-1, *shape)


def philox(key: tuple[int, int], counter: tuple[NDArray[np.uint64] | np.uint64, ...]) -> tuple[NDArray[np.uint64], ...]:
    """Compute Philox 4x32 with ten rounds: four 32-bit words for each four-word counter.

    Args:
        key: Two words.
        counter: Arrays of the four words, with shapes that broadcast.

    Returns:
        Arrays of the four output words, in the broadcast shape.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _HALF) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) % 2**32, (k1 + _KEY_STEPS[1]) % 2**32
    return c0, c1, c2, c3


def _normals(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Turn every two 32-bit words into two normal numbers."""
    radius = np.sqrt(np.float32(-2) * np.log(_uniform(first)))
    angle = np.float32(2 * np.pi) * _uniform(second)
    return radius * np.cos(angle), radius * np.sin(angle)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Turn words into numbers above 0 and up to 1."""
    uniform: NDArray[np.float32] = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return uniform


def require_words(*numbers: int) -> None:
    """Refuse a seed or an index outside the range of the noise generator.

    Raises:
        SessionError: If a number is out of range, or not whole.
    """
    for number in numbers:
        whole_number("a seed or an index", number)
        if not 0 <= number < _WORD:
            raise SessionError(f"cannot draw noise for {number}. Seeds and indices must lie between 0 and 2^64 - 1.")
