"""The command line does the whole way, fails in one line, and prints JSON that programs can read."""

from __future__ import annotations

import errno
import html.parser
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import unetc
from tests.command import ALONE, Result, run, run_alone
from unetc.artifacts import (
    Assignment,
    Estimate,
    Manifest,
    ModelReference,
    Phase,
    Plan,
    Prediction,
    Profile,
    Treatment,
    Verification,
)
from unetc.artifacts.pareto import Pareto
from unetc.cli.diagnosis import Finding
from unetc.compiler.search.pareto import ParetoOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.models.find import ModelSource, find_model
from unetc.models.model import Model

COMMANDS = ("analyze", "plan", "build", "pareto", "sample", "compile", "verify", "report", "inspect", "doctor", "demo")
LIMITS = ("--budget", "0.2", "--max-engines", "2", "--max-memory", "2.5")
SMALL = ("--steps", "4", "--samples", "2", "--bins", "2", "--batch", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, offline."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with one wrong bit in its weights."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))
    weights = bytearray((bundle / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(weights)
    return bundle


@dataclass(frozen=True)
class Way:
    """Output of every command of the whole way, and the folder that they worked in."""

    folder: Path
    results: dict[str, Result]


@pytest.fixture(scope="module")
def way(tiny_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """Go the whole way once, from the model to the report."""
    folder = tmp_path_factory.mktemp("way")
    bundle = folder / "bundle"
    commands: dict[str, tuple[object, ...]] = {
        "analyze": (tiny_model, *SMALL, "--cache", cache, "-o", folder / "profile.json"),
        "plan": (folder / "profile.json", *LIMITS, "-o", folder / "plan.json"),
        "build": (
            *(tiny_model, "--profile", folder / "profile.json", "--plan", folder / "plan.json"),
            *("--steps", 4, "--repair", 4, "--cache", cache, "-o", bundle),
        ),
        "pareto": (
            *(tiny_model, "--profile", folder / "profile.json", "--budgets", 2, "--steps", 4, "--planner", "exact"),
            *("--cache", cache, "-o", folder / "pareto.json"),
        ),
        "inspect": (bundle,),
        "sample": (bundle, "--batch", 5, "--seed", 3, "--steps", 7, "-o", folder / "samples.png"),
        "verify": (bundle, "--rounds", 3, "-o", folder / "verification.json"),
        "report": (bundle, "--verification", folder / "verification.json", "-o", folder / "report.html"),
    }
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        coarse = partial(ParetoOptions, repair=RepairOptions(evaluations=3))  # the command line has no say in it
        patch.setattr("unetc.compiler.search.pareto.ParetoOptions", coarse)
        for command, arguments in commands.items():
            results[command] = run(command, *arguments, "--json")
            assert results[command].code == 0, results[command].err
    return Way(folder, results)


def test_every_step_of_the_way_prints_json(way: Way) -> None:
    for command, result in way.results.items():
        assert isinstance(result.json, dict), command
        assert "Traceback" not in result.err


def test_the_profile_names_every_component_with_cost_and_damage(way: Way) -> None:
    facts, profile = way.results["analyze"].json, Profile.load(way.folder / "profile.json")
    assert facts["profile"] == str(way.folder / "profile.json")
    assert facts["target"] == profile.target == "onnxruntime:cpu"
    assert [entry["name"] for entry in facts["components"]] == [component.name for component in profile.components]
    assert len(profile.components) == 19
    for entry in facts["components"]:
        assert len(entry["least_relative_l2"]) == 2
        assert all(value > 0 for value in entry["least_relative_l2"])
    assert {entry["name"] for entry in facts["components"]} >= {"step", "level:up_blocks.0.upsamplers.0"}


def test_the_ranking_is_printed_for_people_and_programs(way: Way) -> None:
    profile = way.folder / "profile.json"
    ranking = way.results["analyze"].json["ranking"]
    assert (ranking["by"], len(ranking["overall"]), len(ranking["bins"])) == ("worth", 10, 2)
    assert run("inspect", profile, "--json").json["ranking"] == ranking
    everything = run("inspect", profile, "--json", "--top", 0, "--by", "damage", "--bin", 2).json["ranking"]
    assert (len(everything["overall"]), [own["bin"] for own in everything["bins"]]) == (19, [2])
    useful = [own["relative_l2"] for own in everything["overall"] if own["saving"] > 0]
    assert useful == sorted(useful)
    for own in everything["bins"][0]["components"]:
        assert own["worth"] == (pytest.approx(own["saving"] / own["relative_l2"]) if own["saving"] > 0 else 0)
    shown = " ".join(run("inspect", profile, "--top", 4).out.split())
    assert [shown.count(word) for word in ("over all noise levels", "-∞ to", "to ∞")] == [1, 1, 1]
    assert shown.index(ranking["overall"][0]["component"]) < shown.index(ranking["overall"][3]["component"])
    alone = run("inspect", profile, "--top", 1, "--bin", 2, "--by", "saving").out
    assert "components by time saved at log-SNR" in " ".join(alone.split())
    assert "there is no noise level 3. Expected 1, the noisiest, to 2" in run("inspect", profile, "--bin", 3).error
    assert run("inspect", profile, "--by", "magic").code == 2


def test_the_plan_is_printed_and_saved_and_the_same_again(way: Way) -> None:
    made = Plan.load(way.folder / "plan.json")
    assert way.results["plan"].json["budget"] == made.budget == 0.2
    assert made.profile_sha256 == Profile.load(way.folder / "profile.json").sha256()
    assert 1 <= len(made.engines) - 1 <= 2
    assert made.prediction.time_ratio <= 0.8 + 1e-6
    assert made.prediction.memory <= 2.5 + 1e-6
    shown = " ".join(run("plan", way.folder / "profile.json", *LIMITS, "-o", "shown.json").out.split())
    assert f"saves {100 * (1 - made.prediction.time_ratio):.1f}".removesuffix(".0") in shown
    assert "asked to save 20 %" in shown
    assert f"(time ratio {made.prediction.time_ratio:.3f})" in shown
    for name in ("again.json", "and-again.json"):
        run_alone("plan", way.folder / "profile.json", *LIMITS, "-o", name)
        assert Path(name).read_bytes() == (way.folder / "plan.json").read_bytes()


def test_a_speedup_is_another_way_to_give_a_budget(way: Way) -> None:
    plan = ("plan", way.folder / "profile.json", "--max-engines", 2)
    facts = run(*plan, "--speedup", 1.25, "--json").json
    assert facts["budget"] == pytest.approx(0.2)
    assert run(*plan, "--speedup", 1, "--json").json["budget"] == 0
    for wrong in (0.9, 0, -1, "inf", "nan"):
        assert "at least 1 and finite; got" in run(*plan, "--speedup", wrong).error
    for command in (plan, ("build", "digits"), ("demo",)):
        both = run(*command, "--speedup", 1.25, "--budget", 0.2)
        assert (both.code, "give one of them" in both.err) == (2, True)


def test_a_phase_shows_the_components_of_every_engine_of_its_cycle(tmp_path: Path) -> None:
    low, high = 0.0, 1.0
    engines = (Assignment(treatments={}, emits=("step",)), Assignment(treatments={"step": Treatment.FORECAST}))
    cycles = {"full → engine 1": (0, 1), "engine 1 → full": (1, 0), "engine 1": (1,), "full": (0,)}
    for runs, cycle in cycles.items():
        Plan(
            unetc="0",
            model=ModelReference(name="m", sha256="0" * 64, pipeline="P", denoiser="U"),
            profile_sha256="0" * 64,
            budget=0.2,
            max_engines=1,
            engines=engines,
            phases=(Phase(low=low, high=high, cycle=cycle),),
            prediction=Prediction(time_ratio=0.5, relative_l2=0.1, memory=1.0),
        ).save(tmp_path / "plan.json")
        row = run("inspect", tmp_path / "plan.json").out.splitlines()[-2]
        treated = {(0,): "nothing", (1,): "step (forecast)"}.get(cycle, "engine 1: step (forecast)")
        assert [cell.strip() for cell in row.split("│")[1:-1]] == ["-∞ to ∞", runs, treated]


def test_the_bundle_holds_the_plan_as_it_was_given(way: Way) -> None:
    manifest = unetc.Bundle.open(way.folder / "bundle").manifest
    assert manifest.plan == Plan.load(way.folder / "plan.json")
    assert manifest.steps == 4
    facts = way.results["build"].json
    assert facts["bundle"] == str(way.folder / "bundle")
    assert facts["measured"]["time_ratio"] > 0
    assert facts["measured"]["damage"]["relative_l2"]["mean"] > 0
    assert way.results["inspect"].json == {**facts, "compiled": []}
    files = [path for path in (way.folder / "bundle").rglob("*") if path.is_file()]
    unlisted = sum((way.folder / "bundle" / name).stat().st_size for name in ("manifest.json", "manifest.sha256"))
    assert facts["bytes"] == sum(path.stat().st_size for path in files) - unlisted


def test_the_curve_is_saved_with_its_picture(way: Way) -> None:
    facts, curve = way.results["pareto"].json, Pareto.load(way.folder / "pareto.json")
    assert facts["sampled"] == len(curve.points) >= 2
    assert [point["time_ratio"] for point in facts["front"]] == [point.time_ratio for point in curve.front()]
    assert (way.folder / "pareto.svg").read_text().startswith("<svg")


@pytest.mark.nightly
def test_the_fastest_plan_that_passes_is_built(
    way: Way, tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = partial(ParetoOptions, budgets=2, repair=RepairOptions(evaluations=3))  # the command line has no say in it
    monkeypatch.setattr("unetc.compiler.build.ParetoOptions", coarse)
    profile = way.folder / "profile.json"
    common = (tiny_model, "--profile", profile, "--steps", 4, "--cache", cache, "--no-controls", "-o", "fast")
    facts = run("build", *common, "--at", "relative-l2<=0.9", "--json").json
    manifest = unetc.Bundle.open(Path("fast")).manifest
    assert facts["budget"] == manifest.plan.budget > 0
    refused = run("build", *common, "--at", "psnr>=99")
    assert "no point of the curve passes" in refused.error
    assert run("build", *common, "--at", "psnr>=30", "--plan", way.folder / "plan.json").code == 2


def test_the_samples_are_the_sessions(way: Way) -> None:
    facts = way.results["sample"].json
    assert facts["shape"] == [5, 1, 16, 16]
    assert facts["seconds"] > 0
    assert facts["non_finite_steps"] == 0
    with Image.open(way.folder / "samples.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=np.int64)
    session = unetc.load(way.folder / "bundle")
    expected = ((session.sample(5, seed=3, steps=7)[:, 0] + 1) * 127.5).round()
    np.testing.assert_array_equal(pixels[:128:8, :128:8], expected[0])  # enlarged 8 times, in the upper left corner


def test_a_bundle_samples_and_verifies_on_another_target(tiny_bundle: Path) -> None:
    options = ("--batch", 2, "--seed", 3)
    run("sample", tiny_bundle, *options, "-o", "own.png")
    assert run("sample", tiny_bundle, *options, "-o", "torch.png", "--target", "torch:cpu").code == 0
    with Image.open("own.png") as own, Image.open("torch.png") as other:
        difference = np.abs(np.asarray(own, dtype=np.int64) - np.asarray(other, dtype=np.int64))
    assert difference.max() <= 1  # of 255; rounding may fall to either side
    verified = run("verify", tiny_bundle, "--target", "torch:cpu", "--rounds", 1, "--batch", 1, "--json").json
    assert verified["target"] == "torch:cpu"
    assert "no backend for target 'tpu'" in run("sample", tiny_bundle, "--target", "tpu").error


@pytest.mark.nightly
def test_a_model_is_analysed_and_built_on_another_target(tiny_model: Path, cache: Path) -> None:
    options = (
        "--target",
        "torch:cpu",
        "--threads",
        1,
        "--steps",
        4,
        "--samples",
        2,
        "--bins",
        2,
        "--batch",
        2,
        "--cache",
        cache,
    )
    run("analyze", tiny_model, *options, "-o", "torch.json")
    assert Profile.load(Path("torch.json")).target == "torch:cpu"
    common = ("--profile", "torch.json", "--steps", 4, "--cache", cache, "--no-controls", "--repair", 2)
    facts = run("build", tiny_model, *common, "--budget", 0.2, "-o", "on-torch", "--json").json
    assert facts["target"] == unetc.Bundle.open(Path("on-torch")).manifest.target == "torch:cpu"
    assert run("sample", "on-torch", "--batch", 2).code == 0


def test_the_verification_says_time_damage_controls_engines_and_size(way: Way) -> None:
    printed = way.results["verify"].json
    assert json.loads((way.folder / "verification.json").read_bytes()) == printed
    result = Verification.load(way.folder / "verification.json")
    manifest = unetc.Bundle.open(way.folder / "bundle").manifest
    assert result.plan_sha256 == manifest.plan.sha256()
    assert printed["time_ratio_p10"] <= printed["time_ratio"] <= printed["time_ratio_p90"]
    made = {"random" if control.name.startswith("random-") else control.name for control in manifest.controls}
    assert made | {"fewer_steps"} == {*printed["controls"]}
    plans = {"steps_only", "chosen_steps", "removal_only", "uniform"}
    assert {*printed["controls"]} <= {"fewer_steps", "other_solver", "random", "deep-hold", *plans}
    assert printed["loses_to"] == list(result.beaten_by())
    assert {*printed["converged"]["controls"]} == {*printed["controls"]}
    damages = [printed["damage"], *(control["damage"] for control in printed["controls"].values())]
    for damage in damages:
        assert {*damage} == {"relative_l2", "psnr", "ssim"}
        for estimate in damage.values():
            # not strictly: where the plan saves no time, "fewer steps" is the full model and its damage none
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    assert printed["damage"]["relative_l2"]["mean"] > 0
    assert len(printed["engines"]) == len(manifest.engines)
    assert sum(engine["steps"] for engine in printed["engines"]) == printed["steps"] == 4
    assert [engine["removed"] for engine in printed["engines"]] == [len(e.treatments) for e in manifest.engines]
    assert printed["samples"] == 3 * 2
    assert printed["seed"] not in manifest.used_seeds
    assert printed["full_disk_bytes"] < printed["disk_bytes"] < 2 * printed["full_disk_bytes"]
    assert {"python", "onnxruntime", "cores"} <= {*printed["environment"]}


def test_the_report_is_one_page_that_loads_nothing(way: Way) -> None:
    page = (way.folder / "report.html").read_text()
    assert way.results["report"].json == {
        "output": str(way.folder / "report.html"),
        "bytes": (way.folder / "report.html").stat().st_size,
    }
    addresses: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            addresses.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Reader().feed(page)
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "mid_block.attentions.0" in page
    assert "The most redundant components" in page


def test_people_get_tables_and_the_names_of_what_was_written(way: Way, cache: Path, tiny_model: Path) -> None:
    bundle = way.folder / "bundle"
    for path, words in (
        ("profile.json", "over all noise levels"),
        ("plan.json", "log-SNR"),
        ("verification.json", "fewer steps"),
        ("bundle", "engines/full.onnx"),
        ("bundle/manifest.json", "engines/full.onnx"),
    ):
        shown = run("inspect", way.folder / path)
        assert shown.code == 0, shown.err
        assert words in " ".join(shown.out.split())
    for written, arguments in (
        ("plan.json", ("plan", way.folder / "profile.json", "--budget", "0.1")),
        ("samples.png", ("sample", bundle, "--batch", 1)),
        ("profile.json", ("analyze", tiny_model, *SMALL, "--cache", cache)),
    ):
        result = run(*arguments)
        assert (result.code, Path(written).is_file()) == (0, True), result.err
        assert f"wrote {written}" in result.out
        assert not result.out.startswith("{")


def test_an_analysis_is_continued_from_the_cache(way: Way, cache: Path, tiny_model: Path) -> None:
    result = run("analyze", tiny_model, *SMALL, "--cache", cache, "-o", "again.json", "--json")
    assert result.code == 0
    assert Path("again.json").read_bytes() == (way.folder / "profile.json").read_bytes()


def test_sampling_options_reach_the_session(tiny_bundle: Path) -> None:
    def sample(*options: object) -> bytes:
        result = run("sample", tiny_bundle, "--batch", 2, "-o", "out.png", *options)
        assert result.code == 0, result.err
        return Path("out.png").read_bytes()

    plain = sample()
    assert sample("--seed", 0, "--steps", 4, "--threads", 1) == plain
    for options in (("--seed", 1), ("--steps", 20), ("--full-model",)):
        assert sample(*options) != plain
    assert run("sample", tiny_bundle, "--memory", "low").code == 0


def test_sampling_needs_neither_torch_nor_any_other_compile_time_library(tiny_bundle: Path, tmp_path: Path) -> None:
    blocked = ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "matplotlib", "jinja2")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {(*blocked, 'filelock', 'huggingface_hub')}:\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    python_path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    result = run_alone("sample", tiny_bundle, "--batch", 2, "-o", "light.png", "--json", PYTHONPATH=python_path)
    assert result.json["shape"] == [2, 1, 16, 16]
    run("sample", tiny_bundle, "--batch", 2, "-o", "heavy.png")
    assert Path("light.png").read_bytes() == Path("heavy.png").read_bytes()
    assert run_alone("inspect", tiny_bundle, "--json", PYTHONPATH=python_path).code == 0
    refused = run_alone("verify", tiny_bundle, PYTHONPATH=python_path)
    assert "pip install 'unetc[compile]'" in refused.error
    assert "pip install 'unetc[compile]'" in run_alone("build", "digits", PYTHONPATH=python_path).error


def test_help_lists_every_command_and_every_command_has_help() -> None:
    overview = run("--help")
    assert overview.code == 0
    for command in COMMANDS:
        assert command in overview.out
        for flag in ("--help", "-h"):
            shown = run(command, flag)
            assert shown.code == 0
            assert f"unetc {command}" in shown.out
            assert "--json" in shown.out
    assert run("--version").out.strip() == unetc.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("paint",),
        ("analyze",),
        ("plan", "profile.json", "--budget", "much"),
        ("plan", "profile.json", "--max-engines", "0"),
        ("plan", "profile.json", "--max-memory", "0.9"),
        ("build", "digits", "--colour", "red"),
        ("analyze", "digits", "--steps", "0"),
        ("analyze", "digits", "--seed", "-1"),
        ("analyze", "digits", "--time-limit", "0"),
        ("analyze", "digits", "--exhaustive", "--screen-only"),
        ("sample", "bundle", "--batch", "0"),
        ("sample", "bundle", "--threads", "0"),
        ("verify", "bundle", "--rounds", "0"),
        ("verify", "a", "b"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Usage: unetc" in result.out + result.err
    assert "Traceback" not in result.err


def wrong_pipeline(tiny_model: Path) -> Path:
    """Copy a model and call it something that unetc does not know."""
    folder = Path(shutil.copytree(tiny_model, "wrong"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    return folder


def other_model(tiny_model: Path) -> Path:
    """Copy a model and change one weight."""
    folder = Path(shutil.copytree(tiny_model, "other"))
    (weights,) = (folder / "unet").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return folder


def without_variance(tiny_model: Path) -> Path:
    """Copy a model and give it a scheduler that asks it for a variance."""
    folder = Path(shutil.copytree(tiny_model, "other"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "learned_range"}))
    return folder


def cheap(profile: Path) -> Path:
    """Copy a profile and say that removing a component saves next to nothing."""
    known = Profile.load(profile)
    nothing = Estimate(low=0.0, mean=known.full_ms.mean / 1000, high=1.0)
    costs = tuple(msgspec.structs.replace(cost, saved_ms=nothing) for cost in known.costs)
    msgspec.structs.replace(known, costs=costs).save(Path("cheap.json"))
    return Path("cheap.json")


FAILURES: dict[str, tuple[Callable[[Any], tuple[object, ...]], str]] = {
    "unknown model": (lambda at: ("build", "nonsense"), "no model 'nonsense'"),
    "unknown Hub id": (lambda at: ("analyze", "nobody/nothing"), "cannot get 'nobody/nothing' from the Hub"),
    "folder that is no model": (lambda at: ("analyze", at.empty), "no model_index.json"),
    "variant to analyse": (lambda at: ("analyze", at.model, "--variant", "fp8"), "in the variant 'fp8'"),
    "variant to build": (lambda at: ("build", at.model, "--variant", "fp8"), "in the variant 'fp8'"),
    "variant of a curve": (lambda at: ("pareto", at.model, "--variant", "fp8"), "in the variant 'fp8'"),
    "another pipeline": (lambda at: ("analyze", wrong_pipeline(at.model)), "KandinskyPipeline; supported"),
    "no checkpoint": (lambda at: ("analyze", "glide:base", "--cache", at.cache), "Pass it with --weights"),
    "LoRA for a model without prompts": (
        lambda at: ("analyze", "digits", "--lora", "style.safetensors:0.8"),
        "digits is a DDPMPipeline; a LoRA is supported with",
    ),
    "LoRA of another format": (lambda at: ("build", at.model, "--lora", "style.pt"), "Other formats can run code"),
    "LoRA with no scale": (
        lambda at: ("pareto", at.model, "--lora", "style.safetensors:big"),
        "must be a finite number, got 'big'",
    ),
    "unknown scheduler": (
        lambda at: ("analyze", at.model, "--scheduler", "magic", "--cache", at.cache),
        "unknown scheduler 'magic'",
    ),
    "scheduler that needs a variance, analyze": (
        lambda at: ("analyze", without_variance(at.model), "--scheduler", "ddpm", "--cache", at.cache),
        "needs a predicted variance of its noise, but other predicts only",
    ),
    "scheduler that needs a variance, build": (
        lambda at: ("build", without_variance(at.model), "--scheduler", "ddpm", "--cache", at.cache),
        "needs a predicted variance of its noise, but other predicts only",
    ),
    "scheduler that needs a variance, pareto": (
        lambda at: ("pareto", without_variance(at.model), "--scheduler", "ddpm", "--cache", at.cache),
        "needs a predicted variance of its noise, but other predicts only",
    ),
    "unknown target": (
        lambda at: ("analyze", at.model, "--target", "cuda", "--cache", at.cache),
        "no backend for target 'cuda'",
    ),
    "budget of more than all": (lambda at: ("build", at.model, "--budget", "1.5"), "got 1.5"),
    "budget of more than all, plan": (lambda at: ("plan", at.profile, "--budget", "1.5"), "got 1.5"),
    "negative budget": (lambda at: ("demo", "--budget", "-0.1"), "got -0.1"),
    "budget that nothing meets": (
        lambda at: ("plan", cheap(at.profile), "--budget", "0.2"),
        "Ask for a smaller budget",
    ),
    "unknown planner": (lambda at: ("build", at.model, "--planner", "slow"), "unknown planner 'slow'"),
    "unknown planner, pareto": (lambda at: ("pareto", at.model, "--planner", "slow"), "unknown planner 'slow'"),
    "unknown noise level": (lambda at: ("analyze", at.model, "--bin", 9), "there is no noise level 9"),
    "noise level beyond the calls of two a step": (
        lambda at: ("analyze", at.model, "--scheduler", "dpm2", "--steps", 3, "--bin", 6),
        "there is no noise level 6. Expected 1, the noisiest, to 5",
    ),
    "speedup below 1": (lambda at: ("demo", "--speedup", "0.5"), "got 0.5"),
    "unknown gate": (lambda at: ("build", at.model, "--quality-gate", "fid<=3"), "cannot read the quality gate"),
    "profile of another model": (
        lambda at: ("build", other_model(at.model), "--profile", at.profile, "--cache", at.cache),
        "the profile is of",
    ),
    "plan of another profile": (
        lambda at: (
            *("build", at.model, "--profile", at.way.folder / "profile.json", "--cache", at.cache),
            *("--plan", at.build / "plan.json"),
        ),
        "the plan was made from another profile",
    ),
    "plan of another model": (
        lambda at: ("build", other_model(at.model), "--plan", at.build / "plan.json", "--cache", at.cache / "other"),
        "the plan is of",
    ),
    "missing profile": (lambda at: ("plan", "missing.json"), "cannot read missing.json"),
    "missing plan": (lambda at: ("build", at.model, "--plan", "missing.json"), "cannot read missing.json"),
    "plan in place of a profile": (lambda at: ("plan", at.build / "plan.json"), "is not a valid profile"),
    "damaged bundle, sample": (lambda at: ("sample", at.damaged), "weights.safetensors"),
    "damaged bundle, verify": (lambda at: ("verify", at.damaged), "weights.safetensors"),
    "damaged bundle, report": (lambda at: ("report", at.damaged), "weights.safetensors"),
    "damaged bundle, inspect": (lambda at: ("inspect", at.damaged), "weights.safetensors"),
    "missing bundle": (lambda at: ("sample", "missing"), "missing is not a bundle folder"),
    "bundle name that is too long": (lambda at: ("sample", "x" * 300), "is not a bundle folder"),
    "nothing to inspect": (lambda at: ("inspect", "missing"), "cannot read missing"),
    "something else to inspect": (lambda at: ("inspect", at.model / "model_index.json"), "is not a bundle, profile"),
    "unknown number of steps": (lambda at: ("sample", at.bundle, "--steps", 101), "Nearest: 100 or 150"),
    "unknown memory": (lambda at: ("sample", at.bundle, "--memory", "huge"), "unknown memory mode 'huge'"),
    "used seed": (lambda at: ("verify", at.bundle, "--seed", "1"), "seed 1 was used"),
    "seed of the profile": (lambda at: ("verify", at.bundle, "--seed", "0"), "seed 0 was used"),
    "verification of another bundle": (
        lambda at: ("report", at.bundle, "--verification", at.way.folder / "verification.json"),
        "the verification is of another bundle",
    ),
    "missing verification": (lambda at: ("report", at.bundle, "--verification", "v.json"), "cannot read v.json"),
    "unwritable profile": (lambda at: ("analyze", "digits", "-o", at.file / "profile.json"), "cannot write"),
    "unwritable plan": (lambda at: ("plan", at.profile, "-o", at.file / "plan.json"), "cannot write"),
    "unwritable bundle": (lambda at: ("build", "digits", "-o", at.file / "bundle"), "cannot write"),
    "unwritable cache": (lambda at: ("analyze", at.model, "--cache", at.file / "cache"), "cannot write the cache"),
    "unwritable picture": (lambda at: ("sample", at.bundle, "-o", at.file / "out.png"), "cannot write"),
    "unwritable verification": (lambda at: ("verify", at.bundle, "-o", at.file / "v.json"), "cannot write"),
    "unwritable report": (lambda at: ("report", at.bundle, "-o", at.file / "r.html"), "cannot write"),
    "a folder in place of a picture": (lambda at: ("sample", at.bundle, "-o", at.empty), "it is a folder"),
    "a bundle over something else": (lambda at: ("build", at.model, "-o", at.model), "is not a bundle; it is not"),
}


@dataclass(frozen=True)
class Places:
    """Where the things are that commands fail on."""

    model: Path
    build: Path
    cache: Path
    way: Way
    damaged: Path
    empty: Path
    file: Path

    @property
    def bundle(self) -> Path:
        """A bundle that is whole."""
        return self.build / "bundle"

    @property
    def profile(self) -> Path:
        """The profile of the model."""
        return self.build / "profile.json"


@pytest.fixture
def places(tiny_model: Path, tiny_build: Path, cache: Path, way: Way, damaged: Path, tmp_path: Path) -> Places:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    return Places(tiny_model, tiny_build, cache, way, damaged, tmp_path / "empty", tmp_path / "file")


@pytest.mark.parametrize(("make", "words"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["", "json"])
def test_a_failure_is_one_line_and_exits_with_1(
    places: Places, make: Callable[[Places], tuple[object, ...]], words: str, as_json: tuple[str, ...]
) -> None:
    assert words in run(*make(places), *as_json).error
    assert places.file.read_text() == "mine"
    assert list(places.empty.iterdir()) == []
    left = {path.name for path in Path().iterdir()} - {"wrong", "other", "cheap.json"}
    assert left == set()


def test_an_unwritable_place_is_noticed_before_the_work(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("worked first")

    for function in ("analyzer.analysis.analyze", "runtime.session.Session.sample", "runtime.bundle.Bundle.open"):
        monkeypatch.setattr(f"unetc.{function}", work)
    for command, subject in (("analyze", places.model), ("build", places.model), ("sample", places.bundle)):
        assert "cannot write" in run(command, subject, "-o", places.file / "out").error
    for command in ("verify", "report"):
        assert "cannot write" in run(command, places.bundle, "-o", places.file / "out").error


def test_a_failure_in_a_process_of_its_own_is_the_same(places: Places) -> None:
    assert "weights.safetensors" in run_alone("sample", places.damaged).error
    assert "got 1.5" in run_alone("plan", places.profile, "--budget", "1.5").error
    assert run_alone("paint").code == 2


def test_a_bug_shows_its_traceback(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("unetc.runtime.session.Session.of", break_down)
    with pytest.raises(ZeroDivisionError):
        run("sample", tiny_bundle)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt; processes that a shell without job control starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_one_line_and_exits_with_130(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("unetc.runtime.session.Session.of", interrupt)
    result = run("sample", tiny_bundle)
    assert result.code == 130
    assert result.err.splitlines()[1:] == ["unetc: interrupted; run the same command again to continue."]


def test_a_command_that_is_terminated_leaves_no_temporary_files(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [*ALONE, "sample", tiny_bundle, "--memory", "low", "--batch", "1000000"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )
    assert process.stderr is not None
    with process, process.stderr as said:
        while "sampling" not in said.readline():
            assert process.poll() is None
        assert len(list((tmp_path / "temporary").glob(".unetc-private.*"))) == 1
        process.terminate()
        assert said.read().splitlines()[-1:] == ["unetc: interrupted; run the same command again to continue."]
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert list((tmp_path / "temporary").glob(".unetc-private.*")) == []
    assert not Path("samples.png").exists()


def test_the_doctor_finds_what_is_needed() -> None:
    findings = {finding["name"]: finding for finding in run("doctor", "--json").json["findings"]}
    assert findings["target onnxruntime:cpu"]["works"]
    assert "onnxruntime" in findings["target onnxruntime:cpu"]["detail"]
    assert findings["target torch:cpu"]["works"]
    gpu = findings["target torch:cuda"]
    assert gpu["works"] or "NVIDIA GPU" in gpu["detail"]
    assert not gpu["needed"]
    assert all(finding["works"] for finding in findings.values() if finding["needed"])
    assert "GiB of memory free" in findings["machine"]["detail"]
    assert findings["NVIDIA GPU"]["works"] or "nvidia-smi" in findings["NVIDIA GPU"]["detail"]
    for options, heading in (((), "help"), (("-v",), "detail")):
        shown = run("doctor", *options)
        assert (shown.code, "works" in shown.out) == (0, True)
        assert all(word in shown.out for word in ("part", "state", heading))
    assert "onnxruntime 1" in shown.out


def test_the_doctor_names_one_command_for_each_missing_part_in_a_line() -> None:
    missing = "target x needs y (No module named 'y'): pip install 'unetc[x]'"
    other = "target x needs Z, and onnxruntime has A. Swap: pip uninstall a; pip install 'unetc[gpu]'"
    no_gpu = "target torch:cuda needs an NVIDIA GPU, and torch finds none. Install its driver."
    shorts = [
        Finding(name="target x", works=False, needed=False, detail=detail).short for detail in (missing, other, no_gpu)
    ]
    assert shorts == [
        "pip install 'unetc[x]'",
        "pip uninstall a; pip install 'unetc[gpu]'",
        "needs an NVIDIA GPU, and torch finds none",
    ]
    findings = run("doctor", "--json").json["findings"]
    shown = [line for line in run("doctor").out.splitlines() if line.startswith("│")]
    assert len(shown) == len(findings)
    assert all(finding["detail"] for finding in findings)
    assert [finding["help"] for finding in findings if finding["works"]] == [""] * sum(f["works"] for f in findings)


def test_the_doctor_quotes_libraries_that_are_installed_but_broken(tmp_path: Path) -> None:
    broken = {
        "torch": "OSError('libcublas.so.13: cannot open shared object file')",
        "onnxruntime": "RuntimeError('no such instruction')",
        "tensorrt_rtx": "RuntimeError('no driver')",
        "scipy": "AttributeError('a part of numpy is gone')",
    }
    for name, error in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {error}")
    python_path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    result = run_alone("doctor", "--json", PYTHONPATH=python_path)
    findings = {finding["name"]: finding for finding in json.loads(result.out)["findings"]}
    assert (result.code, "Traceback" in result.err) == (1, False)
    for name, reason in {
        "target onnxruntime:cpu": "onnxruntime (no such instruction): pip install 'unetc[cpu]'",
        "target torch:cpu": "(libcublas.so.13: cannot open shared object file): pip install 'unetc[torch]'",
        "compile for tensorrt-rtx": "tensorrt_rtx (no driver): pip install 'unetc[rtx]'",
        "analyze, plan, build, verify": "scipy (a part of numpy is gone)",
    }.items():
        assert not findings[name]["works"]
        assert reason in findings[name]["detail"]


def test_python_runs_the_package() -> None:
    done = subprocess.run([sys.executable, "-m", "unetc", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == unetc.__version__


@pytest.mark.parametrize(
    "arguments", [["--version"], ["inspect", "{bundle}"], ["inspect", "{bundle}", "--json"]], ids=str
)
def test_output_to_a_full_disk_is_an_error(arguments: list[str], tiny_bundle: Path) -> None:
    with open("/dev/full", "w") as disk:
        command = [*ALONE, *(text.format(bundle=tiny_bundle) for text in arguments)]
        done = subprocess.run(command, stdout=disk, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == f"unetc: cannot write the output: {os.strerror(errno.ENOSPC)}. Make room, and run it again.\n"
    assert done.returncode == 1


def test_output_that_cannot_be_written_as_it_is_ends_no_command(tiny_bundle: Path) -> None:
    """A daemon starts commands with a closed stdout, and not every terminal knows the sign of a product."""
    command = [*ALONE, "inspect", tiny_bundle]
    ascii_only = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True
    )
    assert b"?" in ascii_only.stdout
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        shell = f"{shlex.join(map(str, command))} {closed}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_manifests_are_read_back_as_they_are_printed(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle / "manifest.json")
    printed = run("inspect", tiny_bundle, "--json").json
    assert printed["measured"]["time_ratio"] == manifest.measured.time_ratio
    assert (printed["full"]["graph"], printed["full"]["step_ms"]) == (manifest.full.graph, manifest.full.step_ms)
    assert [engine["graph"] for engine in printed["engines"]] == [engine.graph for engine in manifest.engines]


def test_options_that_would_be_ignored_or_exhaust_the_machine_are_refused(tiny_bundle: Path) -> None:
    alone = run("sample", tiny_bundle, "--strength", 0.5)
    assert (alone.code, "belongs to --image" in alone.err) == (2, True)
    for strength in (0, 1.5, "nan"):
        refused = run("sample", tiny_bundle, "--image", "missing.png", "--strength", strength)
        assert (refused.code, "Expected a number above 0 and up to 1" in refused.err) == (2, True)
    for command in ("sample", "serve"):
        assert run(command, tiny_bundle, "--threads", 100_000).code == 2
    with pytest.raises(unetc.errors.SessionError, match="cannot run with 100000 CPU threads"):
        unetc.load(tiny_bundle, threads=100_000)


def test_bad_input_is_refused_before_engines_are_loaded(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetc.runtime.session.Session.of", None)
    assert "cannot read missing.png" in run("sample", tiny_bundle, "--image", "missing.png").error
    assert "takes no prompts" in run("sample", tiny_bundle, "--prompt", "a seven").error


@pytest.mark.parametrize(
    ("scheduler", "steps", "bin"), [("dpm2", 3, 5), ("pndm", 4, 8), ("dpm2", 9, 8), ("ddim", 3, 3), ("ddim", 9, 8)]
)
def test_every_noise_level_that_an_analysis_will_have_is_accepted(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, steps: int, bin: int
) -> None:
    """A scheduler may make more calls than steps, and noise levels are cut by calls."""
    opened: list[object] = []

    def open_once(source: ModelSource) -> Model:
        opened.append(source)
        return find_model(source)

    def analyze(*_: object, **__: object) -> None:
        raise unetc.UnetcError("the work begins")

    monkeypatch.setattr("unetc.models.find.find_model", open_once)
    monkeypatch.setattr("unetc.analyzer.analyze.analyze_model", analyze)
    command = ("analyze", tiny_model, "--scheduler", scheduler, "--steps", steps, "--bin")
    assert "the work begins" in run(*command, bin).error
    assert len(opened) == 1, "opening hashes the weights"
    assert f"there is no noise level {bin + 1}. Expected 1, the noisiest, to {bin}" in run(*command, bin + 1).error
    assert len(opened) == (1 if steps >= 8 else 2), "a model with a call in each noise level need not be opened"


@pytest.mark.parametrize("gate", ["--quality-gate", "--at"])
def test_an_empty_gate_is_refused(tiny_model: Path, gate: str) -> None:
    assert "cannot read the quality gate ''" in run("build", tiny_model, gate, "").error


@pytest.mark.parametrize("output", ["curve.svg", "."])
def test_a_curve_needs_a_place_of_its_own(tiny_model: Path, output: str) -> None:
    refused = run("pareto", tiny_model, "-o", output)
    assert refused.code != 0
    assert ("is the name of the picture" if output == "curve.svg" else "it is a folder") in refused.err


def test_a_guidance_scale_is_refused_where_there_is_no_guidance(tiny_model: Path, cache: Path) -> None:
    refused = run("analyze", tiny_model, *SMALL, "--guidance-scale", 3, "--cache", cache)
    assert "has no guidance, so it takes no guidance scale" in refused.error
