"""Numbers in options are plain ones, or refused by name before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import unetc
from unetc.arguments import real_number, whole_number
from unetc.artifacts.classes import Classes
from unetc.call import TIME_IDS
from unetc.class_labels import encode_labels
from unetc.conditions import Conditions, read_scale
from unetc.errors import (
    EngineBuildError,
    ModelError,
    PlanError,
    ProfileError,
    SessionError,
    UnetcError,
    WorkerError,
)
from unetc.nvidia.sizes import Range
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.batching.limits import BatchLimits
from unetc.runtime.batching.request import SampleRequest
from unetc.server.settings import BundleSource, ServerSettings

PLAN = unetc.PlanOptions(budget=0.2)

OPTIONS: dict[type[Any], tuple[dict[str, Any], type[UnetcError]]] = {
    unetc.AnalysisOptions: ({}, ProfileError),
    unetc.PlanOptions: ({"budget": 0.2}, PlanError),
    unetc.BuildOptions: ({"plan": PLAN}, PlanError),
    unetc.ParetoOptions: ({}, PlanError),
    unetc.QualityGate: ({"metric": "psnr", "bound": 30.0}, PlanError),
    unetc.RepairOptions: ({}, PlanError),
    unetc.CompileOptions: ({"target": "tensorrt-rtx"}, EngineBuildError),
    unetc.VerifyOptions: ({}, SessionError),
    unetc.Cluster: ({"address": "local"}, WorkerError),
    unetc.Lora: ({"path": Path("a.safetensors")}, ModelError),
    BatchLimits: ({}, SessionError),
    SampleRequest: ({}, SessionError),
    ServerSettings: ({"bundles": (BundleSource(path=Path("bundle")),)}, SessionError),
}
"""Options with the arguments that they need, and the error that refuses their numbers."""

NUMBERS = [
    (options, field.name, str(field.type))
    for options in OPTIONS
    for field in fields(options)
    if str(field.type).split(" | ")[0] in ("int", "float")
]


FLAGS = [(options, field.name) for options in OPTIONS for field in fields(options) if str(field.type) == "bool"]


@pytest.mark.parametrize(("options", "name"), FLAGS)
def test_flags_are_true_or_false(options: type[Any], name: str) -> None:
    given, error = OPTIONS[options]
    for other in ("no", 1, 0.0, None, []):
        with pytest.raises(error, match=rf"^{name} is .*, a {type(other).__name__}\. Expected True or False\.$"):
            options(**given | {name: other})
    for value in (False, np.False_, torch.tensor(False)):
        assert getattr(options(**given | {name: value}), name) is False


@pytest.mark.parametrize("name", ["components", "prompts", "labels"])
def test_lists_of_texts_are_tuples_of_them(name: str) -> None:
    for value in ("step", ["step"], ("step",), iter(["step"]), np.str_("step"), np.array(["step"])):
        got = getattr(unetc.AnalysisOptions(**{name: value}), name)
        assert got == ("step",)
        assert type(got[0]) is str
    for other in (1.5, None, [None], b"step", [True]):
        with pytest.raises(ProfileError, match=rf"^{name} is .* Expected (text|the number or the name of a class)\.$"):
            unetc.AnalysisOptions(**{name: other})


def test_labels_may_be_numbers() -> None:
    assert unetc.AnalysisOptions(labels=np.int64(3)).labels == (3,)  # type: ignore[arg-type]
    assert unetc.AnalysisOptions(labels=[np.int64(3), "cat"]).labels == (3, "cat")  # type: ignore[arg-type]


def test_every_kind_of_options_has_numbers() -> None:
    assert {options for options, _, _ in NUMBERS} == set(OPTIONS)


@pytest.mark.parametrize(("options", "name", "kind"), NUMBERS)
def test_other_values_are_refused_by_name(options: type[Any], name: str, kind: str) -> None:
    given, error = OPTIONS[options]
    others = [
        "3",
        True,
        np.True_,
        float("nan"),
        torch.tensor(float("nan")),
        [3, 4],
        *([] if "None" in kind else [None]),
    ]
    for other in others:
        with pytest.raises(error, match=f"^{name} is "):
            options(**{**given, name: other})


def test_numbers_of_numpy_and_torch_become_plain_ones() -> None:
    """Otherwise an analysis would fail when it writes its profile, after all its work."""
    options = unetc.AnalysisOptions(
        steps=np.int64(20),  # type: ignore[arg-type]
        samples=torch.tensor(4),  # type: ignore[arg-type]
        guidance_scale=np.float32(7.5),  # type: ignore[arg-type]
        time_limit_s=60,
    )
    numbers = (options.steps, options.samples, options.guidance_scale, options.time_limit_s)
    assert msgspec.json.encode(numbers) == b"[20,4,7.5,60.0]"
    with pytest.raises(FrozenInstanceError):
        options.steps = 3  # type: ignore[misc]


def test_budgets_of_a_ladder_are_numbers_too() -> None:
    ladder: Any = [np.float64(0.3), Fraction(2, 5)]
    assert unetc.BuildOptions(plan=PLAN, ladder=ladder).ladder == (0.3, 0.4)
    for other in ("0.3", None, True, float("nan")):
        with pytest.raises(PlanError, match=r"^budget is "):
            unetc.BuildOptions(plan=PLAN, ladder=(other,))  # type: ignore[arg-type]
    for alone in (0.3, "0.3"):
        with pytest.raises(PlanError, match=f"^ladder is {alone!r}, a .* Expected a tuple or a list"):
            unetc.BuildOptions(plan=PLAN, ladder=alone)  # type: ignore[arg-type]


def test_a_build_makes_no_negative_number_of_random_plans() -> None:
    assert unetc.BuildOptions(plan=PLAN, random_plans=0).random_plans == 0
    with pytest.raises(PlanError, match="random plans must be at least 0, got -1"):
        unetc.BuildOptions(plan=PLAN, random_plans=-1)


def test_an_infinite_scale_of_a_lora_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LoRA a\.safetensors must be a finite number, got inf"):
        unetc.Lora(path=Path("a.safetensors"), scale=10**400)


def test_one_size_of_an_engine_may_be_a_number() -> None:
    size: Any = 4
    assert Range.parse(size, 1) == Range(least=4, usual=4, most=4)
    for other in (True, 4.0, [1, 4]):
        with pytest.raises(EngineBuildError, match="cannot read the sizes"):
            Range.parse(other, 1)


@pytest.mark.parametrize("scale", [7.5, np.float32(7.5), np.array([7.5]), torch.tensor(7.5), torch.tensor([7.5])])
def test_a_guidance_scale_may_come_from_any_library(scale: Any) -> None:
    assert type(read_scale(scale)) is float
    conditions = Conditions(scale=scale, middle_scale=scale)
    assert (conditions.scale, conditions.middle_scale) == (7.5, 7.5)
    assert conditions.sha256() == Conditions(scale=7.5, middle_scale=7.5).sha256()


@pytest.mark.parametrize("scale", ["3", None, True, float("nan"), torch.tensor([3.0, 4.0]), torch.tensor(True)])
def test_another_guidance_scale_is_refused(scale: Any) -> None:
    refused: list[Callable[[], object]] = [
        lambda: read_scale(scale),
        lambda: Conditions(scale=scale),
        lambda: Conditions(middle_scale=scale),
    ]
    for call in refused:
        with pytest.raises(SessionError, match=r"^a guidance scale is .* Expected a number"):
            call()


@pytest.mark.parametrize("scale", [-1, 1000, float("inf"), 10**400, torch.tensor(float("inf"))])
def test_a_guidance_scale_out_of_range_is_refused(scale: Any) -> None:
    with pytest.raises(SessionError, match=r"a guidance scale lies in \[0, 1000\)"):
        read_scale(scale)


def test_the_guidance_scale_of_labels_is_checked_also_where_it_would_not_be_applied() -> None:
    for scale in ("3", float("nan"), True, -1):
        with pytest.raises(SessionError, match="a guidance scale"):
            encode_labels("the model", [4], Classes(count=10), scale)  # type: ignore[arg-type]


CROPPED = Conditions(own={TIME_IDS: np.zeros((1, 6), np.float32)})


def test_sizes_in_conditions_may_be_numbers_of_numpy() -> None:
    height: Any = np.int64(64)
    np.testing.assert_array_equal(CROPPED.with_sizes((height, 50), (3, 5)).own[TIME_IDS], [[64, 50, 3, 5, 64, 50]])


@pytest.mark.parametrize("height", ["64", True, None, 64.5])
def test_sizes_in_conditions_are_whole_numbers(height: Any) -> None:
    for call in (lambda: CROPPED.with_sizes((height, 50)), lambda: CROPPED.with_sizes((64, 50), target=(height, 50))):
        with pytest.raises(SessionError, match=r"a size or a crop is .* Expected a whole number"):
            call()


@pytest.mark.parametrize("threads", ["2", None, 2.0, True, float("nan")])
def test_threads_are_a_whole_number(threads: Any) -> None:
    with pytest.raises(SessionError, match=r"^threads is .* Expected a whole number"):
        open_backend("null", threads=threads)


def test_a_tensor_without_memory_is_no_number() -> None:
    for read in (whole_number, real_number):
        with pytest.raises(SessionError, match=r"^one is "):
            read("one", torch.tensor(3, device="meta"))


@pytest.mark.parametrize("size", [(512,), (512, 512, 3), ()])
def test_sizes_in_conditions_are_two_numbers(size: Any) -> None:
    for sizes in ((size,), ((4, 4), size), ((4, 4), (0, 0), size or (1,))):
        with pytest.raises(SessionError, match="Expected two whole numbers"):
            CROPPED.with_sizes(*sizes)
