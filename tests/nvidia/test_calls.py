"""A call outside an engine's call ranges is refused, with the command that builds an engine for it."""

from __future__ import annotations

import msgspec
import pytest

from tests.nvidia.test_cache import KEY, record
from unetc.errors import SessionError, ShapeMismatch
from unetc.nvidia.cache import EngineRecord
from unetc.nvidia.call_ranges import check_call
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision

SIDE = Range(least=64, usual=64, most=96)
ENGINE = msgspec.structs.replace(
    record(
        msgspec.structs.replace(
            KEY, sizes=Sizes(batch=Range(least=2, usual=4, most=8), height=SIDE, width=SIDE), precision=Precision.FP16
        )
    ),
    shapes={
        "timestep": ((2,), (4,), (8,)),
        "sample": ((2, 4, 64, 64), (4, 4, 64, 64), (8, 4, 96, 96)),
        "encoder_hidden_states": ((2, 77, 16), (4, 77, 16), (8, 77, 16)),
    },
)


def call(engine: EngineRecord = ENGINE, batch: int = 2, height: int = 64, width: int = 96, tokens: int = 77) -> None:
    shapes = {"sample": (batch, 4, height, width), "timestep": (batch,), "held.3": (1, 2)}
    check_call(engine, shapes | {"encoder_hidden_states": (batch, tokens, 16)})


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 64, 64), (8, 96, 96), (3, 65, 80)])
def test_what_is_in_the_range_passes(batch: int, height: int, width: int) -> None:
    call(batch=batch, height=height, width=width)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ({"batch": 16}, "--batch 2,4,16 --height 64,64,96 --width 64,64,96"),
        ({"batch": 1}, "--batch 1,4,8 --height 64,64,96 --width 64,64,96"),
        ({"height": 128}, "--batch 2,4,8 --height 64,64,128 --width 64,64,96"),
        ({"width": 32}, "--batch 2,4,8 --height 64,64,96 --width 32,64,96"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_options_that_widen_it(size: dict[str, int], options: str) -> None:
    with pytest.raises(ShapeMismatch) as caught:
        call(**size)
    assert "takes sample of [2 to 8, 4, 64 to 96, 64 to 96], got [" in str(caught.value)
    assert f"`unetc compile BUNDLE --target tensorrt --precision fp16 {options}`" in str(caught.value)


def test_conditions_of_another_length_are_refused() -> None:
    with pytest.raises(SessionError, match=r"takes encoder_hidden_states of \[2 to 8, 77, 16\], got \[2, 78, 16\]"):
        call(tokens=78)


@pytest.mark.parametrize("size", [{"batch": 0}, {"batch": 2**20 + 1}, {"width": 0}])
def test_a_size_that_no_engine_takes_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(ShapeMismatch, match=r"got \[.*\]\. No engine takes such a sample: .* each of 1 to 1048576"):
        call(**size)


def test_a_sample_of_other_axes_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"got \[2, 4, 64\]\. No engine"):
        check_call(ENGINE, {"sample": (2, 4, 64)})
