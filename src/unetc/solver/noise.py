"""Random normal numbers that depend on seed, sample and step, never on the batch.

Every sample of every step has its own Philox 4x64 stream: the key is (seed, sample index), and the top word of the
counter is 0 for the initial noise and step + 1 for the noise of a step. A stream is 2^192 blocks long, so no two ever
overlap. The normals are numpy's float32 ziggurat (`Generator.standard_normal`) over that stream, filled in C order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unetc.errors import SessionError

_WORD = 2**64


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
    return _noise(seed, indices, 0, shape)


def step_noise(seed: int, indices: Sequence[int], step: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw the fresh unit normal noise that a stochastic sampler adds in one step.

    Args:
        seed: Seed of the run, 0 <= seed < 2^64.
        indices: Index of each sample of the batch within the run, 0 <= index < 2^64.
        step: Step index, from 0.
        shape: (channel, height, width) of one sample.

    Returns:
        [batch, channel, height, width], mean 0, standard deviation 1; independent of `initial_noise` and other steps.

    Raises:
        SessionError: If seed, step or an index is out of range.
    """
    return _noise(seed, indices, step + 1, shape)


def _noise(seed: int, indices: Sequence[int], stream: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    for number in (seed, stream, *indices):
        if not 0 <= number < _WORD:
            raise SessionError(f"cannot draw noise for {number}. Seeds and indices are from 0 to 2^64 - 1.")
    noise = np.empty((len(indices), *shape), np.float32)
    for index, sample in zip(indices, noise, strict=True):
        key = np.array([seed, index], np.uint64)
        counter = np.array([0, 0, 0, stream], np.uint64)
        np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(out=sample, dtype=np.float32)
    return noise
