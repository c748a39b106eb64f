"""A ladder: several plans in one bundle, over one weights file, with shared engines and one session per level."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import unetc
import unetc.diffusers
from tests.command import run
from tests.search.sessions import session_of
from unetc.artifacts import Phase, Plan, Profile
from unetc.artifacts.plan import Prediction
from unetc.backend import Loader, Program, SerialisedGraph
from unetc.compiler import build as building
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.emissions import emitting, with_emissions
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search import bench as benches
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.repair import RepairOptions
from unetc.compiler.search.workbench import Workbench
from unetc.device import Device
from unetc.errors import ArtifactError, PlanError, QualityGateError, SessionError
from unetc.models.find import find_model
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.levels import largest_calls, limits_for, open_levels
from unetc.runtime.batching.limits import BatchLimits, CallRecord
from unetc.runtime.batching.request import SampleRequest
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.treatments import Treatment

STEPS = 4
LEVEL, OUTER, STEP = "level:up_blocks.0.upsamplers.0", "up_blocks.1.resnets.0", "step"
HOLD, FORECAST = Treatment.HOLD, Treatment.FORECAST
ENGINES = {
    0.2: [{}, {LEVEL: HOLD}],
    0.4: [{}, {LEVEL: HOLD}, {OUTER: FORECAST}],
    0.6: [{}, {STEP: HOLD}, {LEVEL: Treatment.DROP}],
}
"""Treatments of the engines by budget."""


def plan_for(profile: Profile, budget: float) -> Plan:
    treatments = ENGINES[budget]
    return Plan(
        unetc="0",
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=budget,
        max_engines=4,
        engines=with_emissions(treatments, profile.components),
        phases=(Phase(low=profile.bins[0].low, high=profile.bins[-1].high, cycle=tuple(range(len(treatments)))),),
        prediction=Prediction(time_ratio=1 - budget, relative_l2=0.1, memory=2.0),
    )


@dataclass
class Fits:
    """Fits handwritten plans in place of measured ones, which would depend on timing."""

    profile: Profile
    candidates: dict[float, Candidate] = field(default_factory=dict)
    workbench: Workbench | None = None

    def fit_plan(
        self,
        workbench: Workbench,
        options: PlanOptions,
        notes: list[str],
        *,
        correction: float,
        emits: Collection[str] = (),
    ) -> tuple[Candidate, float]:
        if options.budget not in ENGINES:
            raise PlanError("there is no such plan")
        self.workbench = workbench
        self.candidates[options.budget] = workbench.compile(emitting(plan_for(self.profile, options.budget), emits))
        return self.candidates[options.budget], correction


@pytest.fixture(scope="module")
def quick() -> Iterator[pytest.MonkeyPatch]:
    """Leave out what takes long: unused scheduler tables, and times that no test here looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unetc.compiler.prepare.STEP_COUNTS", (STEPS,))
        for name, value in {"ENGINE_ROUNDS": 1, "ENGINE_SECONDS": 0.0, "BATCH_ROUNDS": 1, "BATCH_SECONDS": 0.0}.items():
            patch.setattr(benches, name, value)
        patch.setattr(benches, "LONGEST_CALL_MS", 1e9)
        yield patch


@pytest.fixture(scope="module")
def fits(tiny_build: Path, quick: pytest.MonkeyPatch) -> Fits:
    fits = Fits(Profile.load(tiny_build / "profile.json"))
    quick.setattr("unetc.compiler.search.find_plan.fit_plan", fits.fit_plan)
    return fits


def options(quality_gate: str | None = None) -> BuildOptions:
    return BuildOptions(
        plan=PlanOptions(budget=0.2),
        ladder=(0.4, 0.6),
        steps=STEPS,
        repair=RepairOptions(evaluations=0, tune=False),
        controls=False,
        quality_gate=QualityGate.parse(quality_gate) if quality_gate else None,
    )


@dataclass
class Built:
    """The bundle, and everything that its build reported."""

    path: Path
    bundle: Bundle
    stages: list[str]


@pytest.fixture(scope="module")
def built(tiny_model: Path, cache: Path, fits: Fits, tmp_path_factory: pytest.TempPathFactory) -> Built:
    path, stages = tmp_path_factory.mktemp("ladder") / "bundle", list[str]()
    build(
        find_model(str(tiny_model)),
        fits.profile,
        path,
        options(),
        cache=cache,
        on_progress=lambda progress: stages.append(progress.stage),
    )
    return Built(path, Bundle.open(path), stages)


def test_a_bundle_holds_every_level_with_its_measured_damage(built: Built) -> None:
    manifest = built.bundle.manifest
    assert [level.name for level in manifest.levels] == ["20%", "40%", "60%"]
    assert [level.plan.budget for level in manifest.levels] == [0.2, 0.4, 0.6]
    assert (manifest.plan, manifest.engines) == (manifest.levels[0].plan, manifest.levels[0].engines)
    losses = [level.measured.damage.relative_l2.mean for level in manifest.levels]
    assert all(loss > 0 for loss in losses)
    assert len({*losses}) == 3
    assert all(f"{name}: " in "\n".join(manifest.notes) for name in ("20%", "40%", "60%"))
    assert {"fitting the plan (60%)", "sharing engines", "timing batches"} <= {*built.stages}


def test_levels_share_engine_0_and_equal_engines(built: Built) -> None:
    low, middle, high = built.bundle.manifest.levels
    assert low.engines[0].graph == middle.engines[0].graph == high.engines[0].graph
    assert {level.plan.engines[0].emits for level in (low, middle, high)} == {(LEVEL, STEP, OUTER)}
    assert low.engines[1].graph == middle.engines[1].graph, "both hold the same level"
    assert low.plan.engines[1].emits == middle.plan.engines[1].emits == (OUTER,)
    assert len({engine.graph for engine in built.bundle.manifest.level_engines()}) == 6
    assert [name for name in built.bundle.graphs if name.startswith("engines/60/")]


def test_the_default_level_is_loaded_without_a_name(built: Built) -> None:
    default = unetc.load(built.path)
    assert default.plan == built.bundle.manifest.plan
    np.testing.assert_array_equal(default.sample(2), unetc.load(built.path, level="20%").sample(2))


def test_a_level_samples_as_its_plan_does_alone(built: Built, fits: Fits) -> None:
    for name, budget in {"20%": 0.2, "40%": 0.4, "60%": 0.6}.items():
        session = unetc.load(built.path, level=name)
        assert session.plan.budget == budget
        assert fits.workbench is not None
        alone = session_of(fits.workbench, fits.workbench.compile(plan_for(fits.profile, budget)))
        assert session.schedule(STEPS) == alone.schedule(STEPS)
        np.testing.assert_allclose(session.sample(2, seed=3), alone.sample(2, seed=3), atol=1e-5)


def test_the_full_model_is_a_level_of_every_bundle(built: Built, tiny_bundle: Path) -> None:
    for path in (built.path, tiny_bundle):
        full = unetc.load(path, level="full")
        np.testing.assert_array_equal(full.sample(2, seed=1), unetc.load(path).sample(2, seed=1, full_model=True))


def test_an_unknown_level_is_refused_with_the_known_ones(built: Built) -> None:
    with pytest.raises(SessionError, match=r"unknown quality level '50%'. This bundle has: full, 20%, 40%, 60%\."):
        unetc.load(built.path, level="50%")


class Counting:
    """A backend that counts loads."""

    def __init__(self) -> None:
        self._inner = open_backend("onnxruntime:cpu", threads=1)
        self.device: Device = self._inner.device
        self.loads: list[bytes] = []

    def open_weights(self, weights: bytes) -> Loader:
        self._loader = self._inner.open_weights(weights)
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        self.loads.append(graph.graph)
        return self._loader.load(graph)


def test_sessions_of_all_levels_share_their_programs(built: Built) -> None:
    counting = Counting()
    sessions = open_levels(built.bundle, counting)
    assert list(sessions) == ["full", "20%", "40%", "60%"]
    assert len(counting.loads) == len({*counting.loads}) == 6
    programs = {name: session.programs for name, session in sessions.items()}
    assert programs["20%"][0] is programs["40%"][0] is programs["60%"][0]
    assert programs["20%"][1] is programs["40%"][1]
    assert {id(session.full) for session in sessions.values()} == {id(programs["full"][0])}
    for name, session in sessions.items():
        np.testing.assert_array_equal(
            session.sample(2, seed=2), Session.of(built.bundle, Counting(), level=name).sample(2, seed=2)
        )
    assert len(counting.loads) == 6


def test_requests_of_different_levels_share_calls(built: Built) -> None:
    sessions, calls = open_levels(built.bundle, open_backend("onnxruntime:cpu", threads=1)), list[CallRecord]()
    largest = largest_calls(built.bundle, sessions)
    assert {*largest} == {program for session in sessions.values() for program in session.programs}
    batcher = Batcher(sessions, on_call=calls.append)
    try:
        tickets = {name: batcher.submit(SampleRequest(level=name, seed=4, count=2)) for name in sessions}
        for name, ticket in tickets.items():
            images = ticket.future.result(60).images
            np.testing.assert_allclose(images, sessions[name].sample(2, seed=4), atol=1e-4)
    finally:
        batcher.close()
    assert max(call.rollouts for call in calls) > 2


@pytest.mark.parametrize(
    ("times", "best"),
    [
        (((1, 5.0),), 1),
        (((1, 5.0), (2, 10.0), (4, 20.0)), 1),
        (((1, 5.0), (2, 6.0), (4, 12.0)), 2),
        (((1, 5.0), (2, 6.0), (4, 11.8)), 2),
        (((1, 5.0), (2, 6.0), (4, 11.0)), 4),
        (((1, 5.0), (2, 6.0), (4, 7.0), (8, 20.0)), 4),
    ],
)
def test_the_largest_call_is_the_smallest_one_that_saves_nearly_all(
    built: Built, times: tuple[tuple[int, float], ...], best: int
) -> None:
    full = msgspec.structs.replace(built.bundle.manifest.full, batch_ms=times)
    bundle = replace(built.bundle, manifest=msgspec.structs.replace(built.bundle.manifest, full=full))
    session = Session.of(bundle, open_backend("onnxruntime:cpu", threads=1), level="full")
    assert largest_calls(bundle, {"full": session}) == {session.full: best}


@pytest.mark.parametrize(("largest", "seats"), [(20, 20), (2, 4)])
def test_engines_that_take_little_time_give_no_seats(built: Built, largest: int, seats: int) -> None:
    """Their calls may be large, since that costs nothing."""
    short, long = ((1, 0.2), (64, 0.3)), ((1, 8.0), (largest, 5.0 * largest), (64, 400.0))
    manifest = built.bundle.manifest
    level = manifest.levels[0]
    times = [long, short]
    engines = tuple(msgspec.structs.replace(e, batch_ms=t) for e, t in zip(level.engines, times, strict=True))
    manifest = msgspec.structs.replace(manifest, levels=(msgspec.structs.replace(level, engines=engines),))
    bundle = replace(built.bundle, manifest=manifest)
    sessions = open_levels(built.bundle, open_backend("onnxruntime:cpu", threads=1))
    ours = {level.name: sessions[level.name]}
    assert list(largest_calls(bundle, ours).values()) == [largest, 64]
    assert limits_for(bundle, ours, queue=5) == BatchLimits(rows=largest, seats=seats, queue=5)


def test_every_engine_has_its_time_at_every_batch(built: Built) -> None:
    manifest = built.bundle.manifest
    assert manifest.batch == 2
    for engine in manifest.level_engines():
        assert [size for size, _ in engine.batch_ms] == [1, 2, 4, 8, 16, 32]
        assert all(ms > 0 for _, ms in engine.batch_ms)
    one, other = (level.engines[0].batch_ms for level in manifest.levels[:2])
    assert one == other, "a shared engine is timed once"


def test_large_batches_of_a_slow_model_are_not_timed(built: Built, fits: Fits, quick: pytest.MonkeyPatch) -> None:
    assert fits.workbench is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benches, "LONGEST_CALL_MS", 1e-9)
        times = fits.workbench.batch_ms([fits.candidates[0.2]])
    assert {tuple(size for size, _ in own) for own in times.values()} == {(1, 2)}


def test_a_level_that_fails_the_gate_is_named(
    tiny_model: Path, cache: Path, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "QUALITY_GATE_SEARCH_STEPS", 0)
    with pytest.raises(QualityGateError, match=r"^quality level 60%: the quality gate psnr>=100 fails at budget 0\.6,"):
        build(find_model(str(tiny_model)), fits.profile, tmp_path / "b", options("psnr>=100"), cache=cache)
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, Callable[[], object]] = {
    "the same budget twice": lambda: BuildOptions(plan=PlanOptions(budget=0.27), ladder=(0.27,)),
    "budgets of one name": lambda: BuildOptions(plan=PlanOptions(budget=0.27), ladder=(0.2701,)),
    "falling budgets": lambda: BuildOptions(plan=PlanOptions(budget=0.4), ladder=(0.27,)),
    "budgets that fall later": lambda: BuildOptions(plan=PlanOptions(budget=0.1), ladder=(0.4, 0.27)),
    "no saving": lambda: BuildOptions(plan=PlanOptions(budget=0.0), ladder=(0.27,)),
    "all time": lambda: BuildOptions(plan=PlanOptions(budget=0.27), ladder=(1.0,)),
    "no number": lambda: BuildOptions(plan=PlanOptions(budget=0.27), ladder=(float("nan"),)),
    "a bound that chooses a plan": lambda: BuildOptions(
        plan=PlanOptions(budget=0.27), ladder=(0.4,), at=QualityGate.parse("psnr>=30")
    ),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_budgets_that_make_no_ladder_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=r"got|given|budget is nan"):
        make()


def test_a_plan_and_several_budgets_are_refused(tiny_model: Path, cache: Path, fits: Fits, tmp_path: Path) -> None:
    model, plan = find_model(str(tiny_model)), plan_for(fits.profile, 0.2)
    with pytest.raises(PlanError, match="one plan is given, and 3 budgets"):
        build(model, fits.profile, tmp_path / "b", options(), cache=cache, plan=plan)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", "0.27,much"), 2, "cannot read the budget '0.27,much'"),
        (("--budget", "0.27,"), 2, "cannot read the budget '0.27,'"),
        (("--budget", "0.27,0.27"), 1, "got 0.27, 0.27"),
        (("--budget", "0.4,0.27"), 1, "got 0.4, 0.27"),
        (("--budget", "0,0.27"), 1, "got 0, 0.27"),
        (("--budget", "0.27,1.5"), 1, "got 1.5"),
        (("--budget", "0.27,0.4", "--at", "psnr>=30"), 2, "--at gives one plan"),
        (("--budget", "0.27,0.4", "--plan", "plan.json"), 2, "--plan gives one plan"),
        (("--budget", "0.27,0.4", "--speedup", "1.3"), 2, "give one of them"),
    ],
)
def test_the_command_refuses_bad_budgets_at_once(
    tiny_model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    refused = run("build", tiny_model, "-o", tmp_path / "bundle", *arguments)
    assert refused.code == code
    assert message in " ".join(refused.err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_the_command_builds_a_ladder(
    tiny_model: Path, tiny_build: Path, cache: Path, fits: Fits, tmp_path: Path
) -> None:
    made = run(
        *("build", tiny_model, "--profile", tiny_build / "profile.json", "--budget", "0.2,0.6", "--steps", STEPS),
        *("--repair", 0, "--no-controls", "--cache", cache, "-o", tmp_path / "bundle", "--json"),
    ).json
    assert [level["name"] for level in made["levels"]] == ["20%", "60%"]
    assert made["budget"] == 0.2


def test_commands_take_a_level(built: Built, tmp_path: Path) -> None:
    pictures = {name: tmp_path / f"{name}.png" for name in ("20%", "60%", "full", "default")}
    for name, path in pictures.items():
        chosen = () if name == "default" else ("--level", name)
        assert run("sample", built.path, "-o", path, "--batch", 2, *chosen, "--json").json["shape"][0] == 2
    contents = {name: path.read_bytes() for name, path in pictures.items()}
    assert contents["default"] == contents["20%"]
    assert len({*contents.values()}) == 3
    assert "full, 20%, 40%, 60%" in run("sample", built.path, "--level", "27%").error
    verified = run("verify", built.path, "--level", "60%", "--rounds", 1, "--json").json
    assert verified["budget"] == 0.6
    assert list(verified["controls"]) == [], "a bundle without a control has no schedule of fewer steps"
    assert "Expected one of: 20%, 40%, 60%" in run("verify", built.path, "--level", "full").error


def test_a_drop_in_keeps_its_level_when_it_is_saved(built: Built, tmp_path: Path) -> None:
    unet = unetc.diffusers.load(built.path, level="60%")
    assert unet._session.plan.budget == 0.6
    unet.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path)
    assert again._session.plan == unet._session.plan != unetc.diffusers.load(built.path)._session.plan
    with pytest.raises(SessionError, match="unknown quality level"):
        unetc.diffusers.load(built.path, level="1%")


def test_the_ladder_is_shown(built: Built) -> None:
    facts = run("inspect", built.path, "--json").json
    assert [level["name"] for level in facts["levels"]] == ["20%", "40%", "60%"]
    assert facts["levels"][0]["engines"] == facts["engines"]
    assert all(level["saves"] == 1 - level["measured"]["time_ratio"] for level in facts["levels"])
    assert [size for size, _ in facts["full"]["batch_ms"]] == [1, 2, 4, 8, 16, 32]
    shown = run("inspect", built.path).out
    assert "quality levels" in shown
    assert all(name in shown for name in ("20%", "40%", "60%", "engines/60/"))


def test_the_report_lists_the_ladder(built: Built, tmp_path: Path) -> None:
    result = unetc.verify(built.path, unetc.VerifyOptions(rounds=1))
    unetc.write_report(built.path, tmp_path / "report.html", verification=result)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Quality levels</h2>" in page
    assert all(f"<td>{name}</td>" in page for name in ("20%", "40%", "60%"))


def test_the_report_of_another_level_names_the_one_it_shows(built: Built, tmp_path: Path) -> None:
    fastest = unetc.verify(built.path, unetc.VerifyOptions(rounds=1, level="60%"))
    with pytest.raises(ArtifactError) as caught:
        unetc.write_report(built.path, tmp_path / "report.html", verification=fastest)
    assert "the verification is of the quality level 60%, and the report shows 20%" in str(caught.value)
    assert f"Run `unetc verify {built.path} --level 20% -o FILE`" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
