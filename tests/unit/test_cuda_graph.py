"""Modules that cannot be captured as CUDA graphs are called as they are: all that a machine without a GPU can see."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from unetc.runtime.backends.cuda_graph import CapturedModule, Pool
from unetc.runtime.backends.torch_device import Module

pytestmark = pytest.mark.without_gpu  # where there is one, everything here can be captured


class Modules:
    """Makes modules, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> Module:
        self.made += 1

        def double(tensor: Tensor) -> tuple[Tensor, ...]:
            return (2 * tensor,)

        return double


def test_what_cannot_be_captured_is_called_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    modules = Modules()
    captured = CapturedModule(modules, Pool(lock=threading.Lock(), memory=None))
    for value in (1.0, 3.0):
        (result,) = captured(torch.full((2,), value))
        assert result.tolist() == [2 * value] * 2
    assert modules.made == 1
    assert caplog.text.count("no CUDA graph could be captured") == 1


def test_every_shape_has_a_module_of_its_own_and_the_last_ones_are_kept() -> None:
    modules = Modules()
    captured = CapturedModule(modules, Pool(lock=threading.Lock(), memory=None))
    for size in (1, 2, 3, 4, 4, 3, 2, 1):
        captured(torch.ones(size))
    assert modules.made == 4
    captured(torch.ones(5))
    captured(torch.ones(2))
    assert modules.made == 5
    captured(torch.ones(1))
    assert modules.made == 6
