"""Sizes are parsed from options, and the shapes of an engine's inputs follow from them."""

from __future__ import annotations

import pytest

from unetc.compiler.tensorrt.shapes import resolve
from unetc.controlnet import MIDDLE, controlnet_inputs
from unetc.errors import EngineBuildError
from unetc.nvidia.sizes import Range, Sizes

SIGNATURE = {
    "sample": ("s48", 4, "s43", "s39"),
    "timestep": ("s48",),
    "encoder_hidden_states": ("s48", "s7", 12),
    "held.3": ("s48", 8, "((s43 - 1)//2) + 1", "2*((s39 - 1)//4) + 2"),
    "extrapolation.3": ("s48",),
}
ROWS = {"encoder_hidden_states": (6, 12), "not_an_input": (3,)}


def sizes(batch: str = "1,2,8", height: str = "16,32", width: str = "15") -> Sizes:
    return Sizes(batch=Range.parse(batch, own=4), height=Range.parse(height, own=64), width=Range.parse(width, own=16))


@pytest.mark.parametrize(
    ("text", "corners"),
    [("3", (3, 3, 3)), ("1,8", (1, 4, 8)), ("1,2", (1, 2, 2)), ("6,8", (6, 6, 8)), ("1,2,8", (1, 2, 8))],
)
def test_one_two_or_three_sizes_make_a_range(text: str, corners: tuple[int, ...]) -> None:
    assert Range.parse(text, own=4).corners() == corners
    assert Range.parse(str(Range.parse(text, own=4)), own=99).corners() == corners


def test_without_a_word_the_bundle_decides() -> None:
    assert Range.parse(None, own=4).corners() == (4, 4, 4)
    assert Range.parse(None, own=4, least=1).corners() == (1, 4, 4)


@pytest.mark.parametrize("text", ["", "0", "-1", "8,1", "1,2,3,4", "a", "1.5", "1,,2", "1,3,2", "9999999"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(EngineBuildError, match="expected N, LEAST,MOST or LEAST,USUAL,MOST"):
        Range.parse(text, own=4)


def test_every_input_follows_the_sample() -> None:
    assert resolve(SIGNATURE, sizes(), ROWS) == {
        "sample": ((1, 4, 16, 15), (2, 4, 32, 15), (8, 4, 32, 15)),
        "timestep": ((1,), (2,), (8,)),
        "encoder_hidden_states": ((1, 6, 12), (2, 6, 12), (8, 6, 12)),
        "held.3": ((1, 8, 8, 8), (2, 8, 16, 8), (8, 8, 16, 8)),
        "extrapolation.3": ((1,), (2,), (8,)),
    }


def test_the_batch_of_a_condition_may_have_a_name_of_its_own() -> None:
    signature = {**SIGNATURE, "time_ids": ("s27", 6)}  # as in Stable Diffusion XL
    assert resolve(signature, sizes(), {**ROWS, "time_ids": (6,)})["time_ids"] == ((1, 6), (2, 6), (8, 6))


def test_what_a_controlnet_adds_is_as_large_as_its_level() -> None:
    residuals = controlnet_inputs({"block_out_channels": (8, 16), "layers_per_block": 1})
    signature = {
        **SIGNATURE,
        **{one.name: ("s48", one.channels, f"h{i}", f"w{i}") for i, one in enumerate(residuals)},
        "held.4": ("s48", 16, "2*h2", "w4"),
    }
    shapes = resolve(signature, sizes(), ROWS, residuals)
    assert shapes[residuals[0].name] == ((1, 8, 16, 15), (2, 8, 32, 15), (8, 8, 32, 15))
    assert shapes[MIDDLE] == ((1, 16, 8, 8), (2, 16, 16, 8), (8, 16, 16, 8))
    assert shapes["held.4"] == ((1, 16, 16, 8), (2, 16, 32, 8), (8, 16, 32, 8))


def test_a_size_that_follows_from_nothing_is_named() -> None:
    with pytest.raises(EngineBuildError, match=r"cannot compute the size 's7' of input 'encoder_hidden_states'"):
        resolve(SIGNATURE, sizes(), {})


def test_a_size_that_the_graph_fixes_cannot_be_another() -> None:
    fixed = {"sample": ("batch", 4, 8, 8), "timestep": ("batch",)}
    assert resolve(fixed, sizes(height="8", width="8"), {})["sample"][0] == (1, 4, 8, 8)
    with pytest.raises(EngineBuildError, match="fixes a size of input 'sample' at 8, but 15 was requested"):
        resolve(fixed, sizes(height="8"), {})


@pytest.mark.parametrize(
    "text", ["__import__('os').abort()", "s43.real", "s43**s43", "[1][0]", "1 if s43 else 2", "(", "s43 // 0"]
)
def test_nothing_but_arithmetic_is_computed(text: str) -> None:
    with pytest.raises(EngineBuildError, match="cannot compute the size"):
        resolve({**SIGNATURE, "held.4": ("s48", text)}, sizes(), ROWS)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(EngineBuildError, match=r"held.4' would have a size of 0"):
        resolve({**SIGNATURE, "held.4": ("s48", "s43//64")}, sizes(), ROWS)
