"""Random normal numbers that depend on seed, sample and step, never on the batch.

All noise comes from Philox, a generator that computes its output from a counter. The initial noise is made where the
call comes in: every sample has its own Philox 4x64 stream, of which numpy makes float32 normals by its ziggurat, filled
in C order. The noise of a step may be made on a GPU, inside of the kernel that makes the step, so it is of a form that
both can compute: the counter of Philox 4x32 holds the number of a block of four elements, the step and the sample, and
Box and Muller's transform makes four normals of its output. Both give the same numbers up to the rounding of
logarithm, sine and cosine.

Source:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", DOI 10.1145/2063384.2063405, for Philox.
    Box and Muller 1958, "A note on the generation of random normal deviates", DOI 10.1214/aoms/1177706645.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unetc.errors import SessionError

ROUNDS = 10
"""Of Philox."""
_WORD = 2**64
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw the unit normal noise that sampling starts from.

    Args:
        seed: Seed of the run, 0 <= seed < 2^64.
        indices: Index of each sample of the batch within the run, 0 <= index < 2^64.
        shape: (channel, height, width) of one sample.

    Returns:
        [batch, channel, height, width], mean 0, standard deviation 1. Row k depends on seed and indices[k] alone.

    Raises:
        SessionError: If seed or an index is out of range.
    """
    require_words(seed, *indices)
    noise = np.empty((len(indices), *shape), np.float32)
    for index, sample in zip(indices, noise, strict=True):
        philox = np.random.Philox(key=np.array([seed, index], np.uint64))
        np.random.Generator(philox).standard_normal(out=sample, dtype=np.float32)
    return noise


def step_noise(seed: int, indices: Sequence[int], step: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw the fresh unit normal noise that a stochastic sampler adds in one step.

    Args:
        seed: Seed of the run, 0 <= seed < 2^64.
        indices: Index of each sample of the batch within the run, 0 <= index < 2^64.
        step: Step index, 0 <= step < 2^32.
        shape: (channel, height, width) of one sample, of less than 2^34 elements.

    Returns:
        [batch, channel, height, width], mean 0, standard deviation 1; independent of `initial_noise` and other steps.
        In C order, elements 4k to 4k + 3 are made of the block k.

    Raises:
        SessionError: If seed, step or an index is out of range.
    """
    require_words(seed, *indices)
    if not 0 <= step < 2**32:
        raise SessionError(f"cannot draw noise for step {step}. Steps are from 0 to 2^32 - 1.")
    size = int(np.prod(shape))
    blocks = np.arange(-(-size // 4), dtype=np.uint64)
    samples = np.array(indices, np.uint64)[:, None]
    words = philox((seed % 2**32, seed >> 32), (blocks, np.uint64(step), samples & _LOW, samples >> _HALF))
    normals = np.stack([*_normals(*words[:2]), *_normals(*words[2:])], axis=-1)
    return np.ascontiguousarray(normals.reshape(len(indices), -1)[:, :size]).reshape(-1, *shape)


def philox(key: tuple[int, int], counter: tuple[NDArray[np.uint64] | np.uint64, ...]) -> tuple[NDArray[np.uint64], ...]:
    """Compute four words of 32 bits for each counter of four, by Philox 4x32 with ten rounds.

    Args:
        key: Two words.
        counter: Four words each, of shapes that broadcast.

    Returns:
        Four arrays of that shape.
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
    """Make two normal numbers of every two words of 32 bits."""
    radius = np.sqrt(np.float32(-2) * np.log(_uniform(first)))
    angle = np.float32(2 * np.pi) * _uniform(second)
    return radius * np.cos(angle), radius * np.sin(angle)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Make numbers above 0 and up to 1."""
    uniform: NDArray[np.float32] = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return uniform


def require_words(*numbers: int) -> None:
    """Refuse a seed or an index that noise cannot be drawn for.

    Raises:
        SessionError: If one is out of range.
    """
    for number in numbers:
        if not 0 <= number < _WORD:
            raise SessionError(f"cannot draw noise for {number}. Seeds and indices are from 0 to 2^64 - 1.")
