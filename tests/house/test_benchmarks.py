"""Benchmarks compare like with like, and say which of their figures are old, missing or missed."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench_budget
import bench_diffusers_tests
import bench_heart
import bench_quality
import bench_ray_serve
import bench_runtime
import bench_serve
import bench_terrain
import builds
import command_line
import numpy as np
import pytest
import result_file
import tables
from hypothesis import given
from hypothesis import strategies as st
from spread_out import spread_out

import unetc
from unetc.artifacts.profile import Profile
from unetc.runtime.bundle import Bundle


def heart_row(**controls: tuple[float, float]) -> dict[str, Any]:
    """Make a row of bench_heart; the plan takes 0.7 and does 0.02, a control its time and its damage."""
    contenders = {name: {"time": time, "damage": damage} for name, (time, damage) in controls.items()}
    older = {"time": 0.7, "damage": 0.05}
    plan = {"time": 0.7, "damage": 0.02}
    return {"regime": "m", "budget": 0.3, "plan": plan, "older": older, "controls": contenders, "asked": 1.0}


def heart_figures(**controls: tuple[float, float]) -> dict[str, float]:
    return {own["figure"].split(": ")[1]: own["value"] for own in bench_heart.figures([heart_row(**controls)])}


def test_the_best_peer_is_the_best_of_all_in_the_plans_time() -> None:
    found = heart_figures(random=(0.7, 1.0), other_solver=(0.72, 0.04), fewer_steps=(0.8, 0.01))
    assert found["damage / best peer"] == 0.5, "a slower control does not count"
    assert heart_figures(uniform=(0.5, 0.03), random=(0.7, 1.0))["damage / best peer"] == 0.02 / 0.03
    assert heart_figures(uniform=(0.5, 0.05), random=(0.7, 1.0))["damage / best peer"] == 0.02


def test_a_control_in_another_time_is_named_and_not_compared() -> None:
    found = heart_figures(chosen_steps=(0.5, 0.1))
    assert "damage / chosen_steps" not in found
    assert "damage / best peer" not in found
    assert found["no damage / chosen_steps, as the times differ; nearest time / the plan's"] == 0.5 / 0.7
    assert "goal" not in bench_heart.figures([heart_row(chosen_steps=(0.5, 0.1))])[1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the commands; return the files and folders that they have made."""
    found: list[str] = []

    def run(command: list[str], **_: object) -> None:
        path = Path(command[-1])
        path.write_text(json.dumps(command))
        found.append(path.name)

    monkeypatch.setattr(builds.subprocess, "run", run)
    return found


def test_files_are_made_again_by_other_options_sources_or_inputs(tmp_path: Path, made: list[str]) -> None:
    sources = tmp_path / "sources"
    (sources / "src").mkdir(parents=True)
    (sources / "src/one.py").touch()
    profile, bundle = tmp_path / "profile", tmp_path / "bundle"

    def make(samples: str, place: builds.Workplace) -> list[str]:
        place.make(profile, "analyze", "m", "--samples", samples)
        place.make(bundle, "build", "m", "--profile", str(profile))
        return [made.pop(0) for _ in [*made]]

    place = builds.Workplace(sources, tmp_path)
    assert make("8", place) == ["profile", "bundle"]
    assert make("8", place) == []
    assert make("4", place) == ["profile", "bundle"], "the bundle is made from the profile"
    (sources / "src/two.py").touch()
    builds.sources_sha256.cache_clear()
    assert make("4", place) == ["profile", "bundle"]
    place.make(profile, "analyze", "m", "--samples", "2")
    assert made == ["profile"]


def test_a_note_without_a_command_is_not_believed(tmp_path: Path, made: list[str]) -> None:
    (tmp_path / "profile").touch()
    (tmp_path / "profile.seconds").write_text("1.0")
    builds.Workplace(tmp_path, tmp_path).make(tmp_path / "profile", "analyze", "m")
    assert made == ["profile"]


def test_all_rows_of_a_result_have_the_same_settings(tmp_path: Path) -> None:
    rows = [{"model": "a", "settings": {"rounds": 3}}, {"model": "b"}]
    (tmp_path / "x.json").write_text(json.dumps({"settings": {"rounds": 3}, "rows": rows}))
    (tmp_path / "y.json").write_text(json.dumps({"rows": [{"model": "a"}]}))
    (tmp_path / "z.json").write_text(json.dumps({"settings": {"rounds": 3}, "measured": {"a": {}, "b": {}}}))

    def read(name: str, *keys: str, again: str, **settings: int) -> dict[Any, Any]:
        return result_file.earlier(tmp_path, name, *keys, again=[*again], settings=settings)

    assert [*read("x", "model", again="a", rounds=3)] == ["a", "b"]
    assert [*read("z", again="a", rounds=3)] == ["a", "b"]
    assert [*read("y", "model", again="")] == ["a"]
    assert read("x", "model", again="ab", rounds=1) == {}
    assert read("none", "model", again="", rounds=1) == {}
    for name, keys in (("x", ("model",)), ("z", ())):
        with pytest.raises(SystemExit, match=r"has b with rounds 3, and this run has rounds 1\."):
            read(name, *keys, again="a", rounds=1)
    with pytest.raises(SystemExit, match="unknown settings"):
        read("y", "model", again="", rounds=1)


@pytest.mark.parametrize("name", ["costs", "engines", "heart", "quality", "serve", "terrain"])
def test_committed_results_can_be_resumed(name: str) -> None:
    folder = Path(result_file.__file__).parent / "results"
    result = json.loads((folder / f"{name}.json").read_text())
    keys = [key for key in ("regime", "model", "budget") if "rows" in result and key in result["rows"][0]]
    kept = result_file.earlier(folder, name, *keys, again=(), settings=result.get("settings"))
    assert len(kept) == len(result.get("rows", result.get("measured")))


def test_pictures_are_drawn_next_to_the_result(tmp_path: Path) -> None:
    root = Path(result_file.__file__).parents[1]
    assert result_file.picture_of(tmp_path, "terrain.png") == tmp_path / "terrain.png"
    assert result_file.picture_of(root / "benchmarks/../benchmarks/results", "a.png") == root / "docs/images" / "a.png"


BENCHMARKS = sorted(Path(result_file.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda one: one.stem)
def test_every_benchmark_writes_its_result_and_pictures_where_it_is_told(path: Path) -> None:
    source = path.read_text()
    code = source.replace(ast.get_docstring(ast.parse(source), clean=False) or "", "")
    assert "    add_results(parser)\n" in code
    for elsewhere in ('"--results"', '/ "results', '"results/', "docs/images", "IMAGES"):
        assert elsewhere not in code


def test_a_result_and_its_picture_make_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "results"
    result_file.picture_of(folder, "a.svg").write_text("<svg/>")
    result_file.write(folder, "a", {"budgets": {"0.5": 1}})
    assert sorted(one.name for one in folder.iterdir()) == ["a.json", "a.svg"]
    assert capsys.readouterr().out == "", "a result without figures and tables prints none"
    result_file.write(folder, "a", {"figures": [1], "tables": [2]})
    assert json.loads(capsys.readouterr().out) == [1]


@pytest.fixture
def committed() -> Iterator[None]:
    """Check that neither the committed results nor the pictures of pages change."""

    def state() -> dict[Path, int]:
        return {one: one.stat().st_mtime_ns for one in (*result_file.RESULTS.iterdir(), *result_file.IMAGES.iterdir())}

    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("committed")
def test_a_run_with_its_own_results_leaves_the_committed_ones(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(budget: float, work: Path, results: Path) -> dict[str, object]:
        session = unetc.load(tiny_bundle)
        profile = Profile.from_json(Bundle.open(tiny_bundle).profile, "the bundle's profile")
        bench_budget.draw(session, profile, 5, results)
        return {"work": str(work)}

    monkeypatch.setattr(bench_budget, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_budget.py", "--work", "w", "--results", str(tmp_path / "own")])
    bench_budget.main()
    assert sorted(one.name for one in (tmp_path / "own").iterdir()) == ["budget.json", "damage.svg", "samples.png"]
    result = json.loads((tmp_path / "own/budget.json").read_text())
    assert result["budgets"] == {"0.27": {"work": "w"}, "0.5": {"work": "w"}}
    assert result["command"].startswith("python benchmarks/bench_budget.py --work w --results ")


def test_only_chooses_cases_and_refuses_a_beginning_of_none(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command_line.add_only(parser)
    names = ["digits, 20", "digits, 20", "digits, 50", "terrain"]
    assert command_line.chosen(parser, parser.parse_args([]).only, names) == ["digits, 20", "digits, 50", "terrain"]
    assert command_line.chosen(parser, "digits", names) == ["digits, 20", "digits, 50"]
    with pytest.raises(SystemExit):
        command_line.chosen(parser, "digit ", names)
    assert "no case begins with 'digit '; the cases are: digits, 20; digits, 50; terrain" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path(result_file.__file__).parent.glob("bench_*.py")), ids=lambda one: one.stem)
def test_every_benchmark_with_only_shares_the_option(path: Path) -> None:
    text = path.read_text()
    assert '"--only"' not in text
    assert ("add_only(" in text) == ("chosen(" in text)


def test_intervals_of_a_mean_of_groups_hold_it_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_quality, "frechet_distance", lambda own, _: own.mean())
    rng, tries = np.random.default_rng(0), 2000
    held = 0
    for _ in range(tries):
        drawn = rng.standard_normal((bench_quality.GROUPS, 1))
        found = bench_quality.judge(drawn, np.zeros_like(drawn), drawn)["more_than_full"]
        held += found["low"] <= 0 <= found["high"]
    assert held / tries == pytest.approx(0.95, abs=0.012), "1.96 standard errors would hold it in 92 % of the tries"


def ladder_figures(ladder: dict[str, Any]) -> dict[str, Any]:
    contenders = dict.fromkeys(("unetc", "serial", "whole", "diffusers"), 1.0)
    case = {"capacity": contenders, "latency": {"serial": contenders, "whole": contenders}, "ladder": ladder}
    case["engines_alone"] = {"images_per_s": 1.0, "p95": {"a": 1.0}, "p95_serial": {"a": 1.0}}
    rows = bench_serve.figures({"m": case})
    return {str(row["figure"]).partition("capacity")[2]: row for row in rows if "full model" in str(row["figure"])}


def test_the_ladder_is_compared_with_a_server_that_may_refuse() -> None:
    answers = [
        bench_serve.Answer(seconds=2.0, status=200, level="27%", relative_l2=0.1),
        bench_serve.Answer(seconds=0.01, status=429),
    ]
    one = bench_serve.of_ladder(answers)
    assert one == {"refused": 1, "p95_s": 2.0, "mean_relative_l2": 0.1, "levels": {"27%": 1.0}}
    found = ladder_figures({"queue": 32, "target_s": 4.0, "with": one | {"refused": 0}, "without": one})
    assert found[", queue of 32: refused, with the ladder"]["value"] == 0
    assert found[", queue of 32: refused, without the ladder"]["value"] == 1
    assert found[": p95 with the ladder / target"]["value"] == 0.5


def test_nothing_is_measured_with_no_replica_to_kill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_ray_serve.py", "--bundle", "b", "--kills", "0"])
    with pytest.raises(SystemExit):
        bench_ray_serve.main()
    assert "--kills: expected a whole number of at least 1, got '0'" in capsys.readouterr().err


def ray_serve_measured(overload: dict[str, Any]) -> dict[str, Any]:
    kill = {"recovered_s": 5.0, "longest_silence_s": 0.5, "statuses": {200: 9, 503: 1}, "lost": 0}
    return {"throughput": {"plain": [2.0], "ray": [1.9]}, "kills": [kill], "overload": overload}


def test_an_overload_that_refuses_nothing_says_what_is_not_measured() -> None:
    refusing = bench_ray_serve.of_crowd({200: 3, 429: 1}, 0, [0.5], [1.0, 2.0, 3.0])
    calm = bench_ray_serve.of_crowd({200: 1}, 0, [], [1.0])
    assert (refusing["refused_p95_s"], refusing["images_per_s"]) == (0.5, 1.5)
    assert (calm["refused_p95_s"], calm["images_per_s"]) == (None, None)
    full, short = (bench_ray_serve.record_of(ray_serve_measured(own), {}) for own in (refusing, calm))
    values = {str(row["figure"]): row["value"] for row in short["figures"]}
    assert values["overload: refused with 429 / all answers"] == 0
    missing = {str(row["figure"]) for row in full["figures"]} - values.keys()
    assert (missing, full["absent"]) == ({bench_ray_serve.REFUSAL}, {})
    page = tables.section("ray_serve", short | {"command": "c", "environment": {"cores": "2"}})
    assert f"Not measured: {bench_ray_serve.REFUSAL}: nothing was refused" in page


def test_a_folder_without_tests_of_diffusers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_diffusers_tests.py", str(tmp_path / "missing")])
    with pytest.raises(SystemExit):
        bench_diffusers_tests.main()
    assert "missing has no folder tests/pipelines; expected a checkout of diffusers" in capsys.readouterr().err


def test_additivity_is_judged_by_the_random_engines() -> None:
    ratios = {"level:a": 1.0, "random 1": 1.2, "level:b": 0.97, "level:c": 1.01, "random 2": 1.1}
    rows = [[name, 1, 1.0, 1.0, ratio, 0.9, 1.3] for name, ratio in ratios.items()]
    assert [own["value"] for own in bench_runtime.additivity(rows)] == [pytest.approx(1.15), 1.2, 0.97]


@pytest.mark.parametrize("name", ["costs", "engines", "heart", "quality", "terrain"])
def test_pages_say_which_cases_have_no_row(name: str) -> None:
    record_of = importlib.import_module(f"bench_{name}").record_of
    result = json.loads((result_file.RESULTS / f"{name}.json").read_text())
    settings = (result["settings"],) if name == "heart" else ()
    absent = record_of(result["rows"], *settings)["absent"]
    assert result["absent"] == absent
    fewer = record_of(result["rows"][1:], *settings)["absent"]
    (left_out,) = fewer.keys() - absent.keys()
    assert f"{left_out}: no row yet" in tables.section(name, result | {"absent": fewer})


def test_a_plan_without_a_control_in_its_time_has_a_figure_without_a_goal() -> None:
    row = heart_row(uniform=(0.77, 0.01), random=(0.5, 1.0)) | {"verification": {"seconds": {}}}
    assert bench_terrain.figures([row]) == [
        {"figure": "m, budget 0.3: no control in the plan's time; nearest time / the plan's", "value": 0.77 / 0.7}
    ]


@pytest.mark.parametrize(
    ("time", "damage", "counts"),
    [
        (0.73, 0.05, True),
        (0.67, 0.05, True),
        (0.74, 0.01, False),
        (0.66, 0.05, False),
        (0.66, 0.03, True),
        (0.5, 0.03, True),
    ],
)
def test_all_benchmarks_have_one_rule_for_a_control_in_the_plans_time(time: float, damage: float, counts: bool) -> None:
    row = heart_row(chosen_steps=(time, damage)) | {"verification": {"seconds": {}}}
    own = bench_terrain.figures([row])[0]
    assert ("goal" in own) == ("damage / chosen_steps" in heart_figures(chosen_steps=(time, damage))) == counts
    assert own["value"] == (0.02 / damage if counts else time / 0.7)


@given(st.lists(st.integers(0, 100).map(lambda height: height / 100), max_size=12))
def test_names_in_a_picture_do_not_overlap_and_stay_near_their_points(heights: list[float]) -> None:
    heights.sort(reverse=True)
    placed = spread_out(heights, 0.05)
    assert len(placed) == len(heights)
    assert all(upper - lower >= 0.05 - 1e-9 for upper, lower in pairwise(placed))
    assert sum(placed) == pytest.approx(sum(heights))
    if all(upper - lower >= 0.05 for upper, lower in pairwise(heights)):
        assert placed == pytest.approx(heights)
