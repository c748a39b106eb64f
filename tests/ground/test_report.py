"""The report shows the right figures, escapes markup and loads no other file."""

from __future__ import annotations

import io
import itertools
import re
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from unetc.artifacts.call_input import CallInput
from unetc.artifacts.manifest import BundleEngine, EnginePair, FileRecord, Level, Manifest, Measurement
from unetc.artifacts.pareto import Pareto, Point
from unetc.artifacts.plan import Assignment, Phase, Plan, Prediction
from unetc.artifacts.profile import STEP, Bin, Component, Cost, Damage, Effect, Estimate, ModelReference, Profile
from unetc.artifacts.verification import WHICH_FIGURE, ControlResult, Converged, EngineUse, Verification
from unetc.errors import ShapeMismatch
from unetc.report import charts, heatmap, pictures
from unetc.report import curve as charts_of_curve
from unetc.report.page import render
from unetc.sampler.table import SchedulerCount, SchedulerHeader
from unetc.treatments import Treatment

FAR = 1e30
"""Finite stand-in for infinity at the ends of the noise levels."""
MODEL = ModelReference(name="digits", sha256="ab" * 32, pipeline="DDPMPipeline", denoiser="UNet2DModel")


def estimate(mean: float, spread: float = 0.1) -> Estimate:
    return Estimate(mean=mean, low=mean * (1 - spread), high=mean * (1 + spread))


def damage(relative_l2: float) -> Damage:
    return Damage(
        relative_l2=estimate(relative_l2),
        psnr=estimate(-20 * np.log10(relative_l2 / 2), 0.02),
        ssim=estimate(1 - relative_l2, 0.001),
    )


def make_profile(count: int = 6, bins: int = 4, seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    kinds = ("residual", "skip", "level")
    components = tuple(
        Component(
            name=f"{kinds[i % 3]}:up_blocks.{i // 8}.resnets.{i % 8}",
            kind=kinds[i % 3],  # type: ignore[arg-type]
            owner=f"up_blocks.{i // 8}",
            index=i,
            channels=1,
            axis=1,
            nested=(f"residual:up_blocks.{i // 8}.resnets.{i % 8 + 1}",) if i == 2 < count - 1 else (),
            offset=i,
        )
        for i in range(count)
    )
    borders = [-FAR, *np.linspace(-6, 6, bins - 1), FAR]
    return Profile(
        unetc="0.1.0",
        model=MODEL,
        scheduler="ddim",
        steps=20,
        samples=8,
        seed=1,
        target="onnxruntime-cpu",
        threads=2,
        batch=4,
        sample_shape=(1, 32, 32),
        components=components,
        bins=tuple(Bin(low=low, high=high, steps=20 // bins) for low, high in itertools.pairwise(borders)),
        full_ms=estimate(12.5, 0.02),
        full_bytes=1,
        costs=tuple(
            Cost(component=c.name, saved_ms=estimate(float(rng.uniform(0.1, 1))), freed_bytes=0) for c in components
        ),
        effects=tuple(
            Effect(
                component=c.name,
                treatment=treatment,
                period=2 if treatment.reuses else 1,
                bin=b,
                measured=True,
                relative_l2=estimate(float(rng.uniform(0.001, 0.5))),
            )
            for c in components
            for b in range(bins)
            for treatment in (Treatment.DROP, Treatment.MEAN, Treatment.HOLD, Treatment.FORECAST)
        ),
        samplings=17.25,
        means=(b"\0" * 4 * count,) * bins,
    )


def make_plan(profile: Profile) -> Plan:
    """Build a plan with three phases: the full model, two alternating engines, and a pruned engine."""
    names = [component.name for component in profile.components]
    return Plan(
        unetc="0.1.0",
        model=profile.model,
        profile_sha256="cd" * 32,
        budget=0.2,
        max_engines=2,
        engines=(
            Assignment(treatments={}, emits=(names[2],)),
            Assignment(treatments={names[0]: Treatment.DROP, names[1]: Treatment.MEAN}),
            Assignment(treatments={names[2]: Treatment.HOLD}),
        ),
        phases=(
            Phase(low=-FAR, high=-6.0, cycle=(0,)),
            Phase(low=-6.0, high=0.0, cycle=(0, 2)),
            Phase(low=0.0, high=FAR, cycle=(1,)),
        ),
        prediction=Prediction(time_ratio=0.78, relative_l2=0.06, memory=2.0),
    )


def make_manifest(profile: Profile, notes: tuple[str, ...] = ("exchanged 2 components",)) -> Manifest:
    plan = make_plan(profile)
    engines = tuple(
        BundleEngine(graph=f"graphs/{i}.onnx", unused_weights=(), treatments=engine.treatments, step_ms=ms)
        for i, (engine, ms) in enumerate(zip(plan.engines, (12.5, 8.0, 6.0), strict=True))
    )
    paths = ["weights.bin", "profile.json", "scheduler.safetensors", *(engine.graph for engine in engines)]
    return Manifest(
        unetc="0.1.0",
        model=profile.model,
        target="onnxruntime-cpu",
        threads=2,
        sample_shape=(1, 32, 32),
        denoiser_config={},
        inputs=(CallInput(name="sample", axes=(1, "height", "width")),),
        predicted_channels=1,
        batch=4,
        steps=20,
        weights="weights.bin",
        profile="profile.json",
        scheduler=SchedulerHeader(
            name="ddim", columns=(), clip=None, counts=(SchedulerCount(steps=20, start=0, initial_scale=1.0),)
        ),
        scheduler_file="scheduler.safetensors",
        full=engines[0],
        levels=(
            Level(
                name="20%",
                plan=plan,
                engines=engines,
                measured=Measurement(time_ratio=0.77, damage=damage(0.04)),
                evaluated=(),
            ),
        ),
        controls=(),
        pairs=(EnginePair(engines=(1, 2), alone=(0.03, 0.04), together=0.0625),),
        used_seeds=(1, 2),
        notes=notes,
        files=tuple(FileRecord(path=path, bytes=1, sha256="0" * 64) for path in paths),
    )


def control(time_ratio: float, relative_l2: float) -> ControlResult:
    return ControlResult(time_ratio=time_ratio, damage=damage(relative_l2), description=f"rule {relative_l2}")


CONTROLS = {"fewer_steps": control(0.75, 0.09), "uniform": control(0.76, 0.05), "random": control(0.75, 0.2)}


def make_verification(
    model: ModelReference = MODEL, controls: dict[str, ControlResult] = CONTROLS, seed: int = 9
) -> Verification:
    return Verification(
        unetc="0.1.0",
        model=model,
        plan_sha256="0" * 64,
        target="onnxruntime-cpu",
        threads=2,
        environment={"cpu": "Xeon", "onnxruntime": "1.30"},
        budget=0.2,
        scheduler="ddim",
        steps=20,
        samples=16,
        seed=seed,
        rounds=9,
        full_ms=260.0,
        time_ratio=0.76,
        time_ratio_p10=0.75,
        time_ratio_p90=0.77,
        damage=damage(0.04),
        controls=controls,
        engines=(
            EngineUse(step_ms=12.5, steps=8, removed=0),
            EngineUse(step_ms=8.0, steps=8, removed=2),
            EngineUse(step_ms=6.0, steps=4, removed=2),
        ),
        disk_bytes=40_000_000,
        full_disk_bytes=25_000_000,
    )


def make_samples(seed: int, channels: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (3, channels, 8, 8)).astype(np.float32)


def page(
    profile: Profile | None = None, verification: Verification | None = None, manifest: Manifest | None = None
) -> str:
    profile = profile or make_profile()
    manifest = manifest or make_manifest(profile)
    log_snr = np.linspace(-9, 9, 20)
    full = make_samples(0)
    return render(
        profile=profile,
        manifest=manifest,
        verification=verification or make_verification(),
        full=full,
        pruned=full + 0.01 * make_samples(1),
        log_snr=log_snr,
        schedule=manifest.plan.schedule(log_snr.tolist()),
    )


@pytest.fixture(scope="module")
def default_page() -> str:
    return page()


class Page(HTMLParser):
    """Collects the addresses that a page would load, and the text of its table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", ""))

    def handle_data(self, data: str) -> None:
        if self.rows:
            rank, text = self.rows[-1]
            self.rows[-1] = (rank, text + data)


def test_page_loads_nothing(default_page: str) -> None:
    parsed = Page(default_page)
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed"}
    assert parsed.loads
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in parsed.loads)
    assert not re.search(r"url\((?!#)|@import", default_page)


def test_page_names_every_control_engine_and_note(default_page: str) -> None:
    for control in CONTROLS.values():
        assert control.description in default_page
    for engine in range(3):
        assert f"engine&nbsp;{engine}" in default_page
    assert "exchanged 2 components" in default_page
    assert MODEL.sha256 in default_page


def test_headline_figures_come_from_the_verification(default_page: str) -> None:
    assert '<dd class="figure">24 %</dd>' in default_page
    assert '<dd class="figure">0.0400</dd>' in default_page
    assert '<dd class="figure">0.444 ×</dd>' in default_page, "damage compared with fewer steps: 0.04 / 0.09"


def test_markup_in_names_and_notes_is_text() -> None:
    attack = "<script>alert('$x_1$')</script>"
    profile, manifest = make_profile(), make_manifest(make_profile(), notes=(attack,))
    model = msgspec.structs.replace(MODEL, name=attack, pipeline=attack, denoiser=attack)
    renamed = msgspec.structs.replace(profile.components[0], name=attack)
    text = page(
        msgspec.structs.replace(profile, components=(renamed, *profile.components[1:]), effects=(), costs=()),
        make_verification(model, {attack: control(0.7, 0.01)}),
        msgspec.structs.replace(manifest, model=model),
    )
    assert "script" not in Page(text).tags
    assert "<h1>&lt;script&gt;alert(&#39;$x_1$&#39;)&lt;/script&gt;</h1>" in text
    assert "&lt;script&gt;alert('$x_1$')&lt;/script&gt;" in text, (
        "the chart must show the name as plain text, not as a formula"
    )


def test_only_controls_that_beat_the_plan_are_red() -> None:
    verification = make_verification(controls=CONTROLS | {"early": control(0.755, 0.03), "slow": control(0.9, 0.01)})
    assert verification.beaten_by() == ("early",)
    text = page(verification=verification)
    rank = {row.split()[0]: rank for rank, row in Page(text).rows if rank in {"better", "other"}}
    assert rank == {"early": "better", "slow": "other", "fewer_steps": "other", "uniform": "other", "random": "other"}
    colours = re.findall(r'fill: (#\w+)"[^>]*>(\w+)  [\d.]+</text>', charts.controls(verification, ("early",)))
    assert [name for colour, name in colours if colour == charts.BETTER] == ["early"]
    assert len(colours) == 6, "every control and the plan must have a label"
    assert "This plan loses: a simpler rule does less damage in no more time: early." in " ".join(text.split())


def test_control_within_the_spread_of_timings_counts_as_no_slower() -> None:
    assert make_verification(controls={"near": control(0.77, 0.03)}).beaten_by() == ("near",)
    assert make_verification(controls={"slower": control(0.771, 0.03)}).beaten_by() == ()


def test_steps_that_the_full_model_made_again_are_told(default_page: str) -> None:
    text = page(verification=msgspec.structs.replace(make_verification(), non_finite_steps=3))
    assert "Engines of the plan gave NaN or infinity in 3 of 200 steps." in " ".join(text.split())
    assert "NaN" not in default_page


def test_page_without_losing_control_accuses_nobody(default_page: str) -> None:
    assert "This plan loses" not in default_page
    assert 'class="better"' not in default_page


def test_distances_to_the_converged_trajectory_are_told_apart(default_page: str) -> None:
    assert "converged" not in default_page
    distances = {name: damage(0.1 + i / 100) for i, name in enumerate(CONTROLS)}
    converged = Converged(
        scheduler="ddim", steps=500, samples=3, full=damage(0.3), plan=damage(0.25), controls=distances
    )
    text = page(verification=msgspec.structs.replace(make_verification(), converged=converged))
    words = " ".join(text.split())
    assert "takes 500 steps of ddim" in words
    assert "own distance to it is 0.300" in words
    assert WHICH_FIGURE in words
    rows = {row.split()[0]: row for rank, row in Page(text).rows if rank in {"plan", "better", "other"}}
    assert "0.250" in rows["plan"]
    assert "0.120" in rows["random"]


def test_reused_seed_is_admitted() -> None:
    assert "already used seed 2" in page(verification=make_verification(seed=2))


def test_removed_cells_match_the_plan() -> None:
    profile = make_profile()
    names = [component.name for component in profile.components]
    cells = heatmap.removed_cells(profile, make_plan(profile))
    found = {(names.index(c.component), c.bin): (c.treatment, c.named, c.always) for c in cells}
    assert found == {
        (2, 1): (Treatment.HOLD, True, False),
        (3, 1): (Treatment.HOLD, False, False),
        (0, 2): (Treatment.DROP, True, True),
        (1, 2): (Treatment.MEAN, True, True),
        (0, 3): (Treatment.DROP, True, True),
        (1, 3): (Treatment.MEAN, True, True),
    }


def test_holding_the_step_removes_every_component() -> None:
    profile = with_step(make_profile(count=3))
    plan = make_plan(profile)
    full = Assignment(treatments={}, emits=(STEP,))
    held = Assignment(treatments={STEP: Treatment.HOLD})
    plan = msgspec.structs.replace(plan, engines=(full, plan.engines[1], held))
    cells = [cell for cell in heatmap.removed_cells(profile, plan) if cell.bin == 1]
    assert {cell.component: cell.named for cell in cells} == {
        component.name: component.name == STEP for component in profile.components
    }
    assert len(cells) == 4
    assert not any(cell.always for cell in cells)
    assert {cell.treatment for cell in cells} == {Treatment.HOLD}
    manifest = make_manifest(profile)
    level = msgspec.structs.replace(manifest.levels[0], plan=plan)
    assert STEP in page(profile, manifest=msgspec.structs.replace(manifest, levels=(level,)))


def with_step(profile: Profile) -> Profile:
    """Add the component `step`, in which all others are nested."""
    names = tuple(component.name for component in profile.components)
    step = msgspec.structs.replace(
        profile.components[0], name=STEP, kind="step", owner="", index=len(names), nested=names, offset=len(names)
    )
    return msgspec.structs.replace(
        profile, components=(*profile.components, step), means=tuple(row + b"\0" * 4 for row in profile.means)
    )


def test_phase_applies_to_the_bins_whose_centre_it_holds() -> None:
    profile = make_profile()
    plan = make_plan(profile)
    phases = (Phase(low=-FAR, high=2.9, cycle=(0,)), Phase(low=2.9, high=FAR, cycle=(1,)))
    cells = heatmap.removed_cells(profile, msgspec.structs.replace(plan, phases=phases))
    assert {cell.bin for cell in cells} == {2, 3}, "bin 2 extends from 0 to 6"
    phases = (Phase(low=-FAR, high=3.1, cycle=(0,)), Phase(low=3.1, high=FAR, cycle=(1,)))
    cells = heatmap.removed_cells(profile, msgspec.structs.replace(plan, phases=phases))
    assert {cell.bin for cell in cells} == {3}


def test_heatmap_draws_one_frame_per_run_of_cells_treated_alike() -> None:
    profile = make_profile()
    plan = make_plan(profile)
    letters = re.findall(">([A-Z])</text>", heatmap.draw(profile, plan))
    assert sorted(letters) == ["D", "H", "M"], "drop and mean cover two bins each"


def letters_of(profile: Profile) -> list[str]:
    """Read the letters in the cells that the plan keeps."""
    return re.findall(">([a-z])</text>", heatmap.draw(profile, full_plan(profile)))


def full_plan(profile: Profile) -> Plan:
    plan = make_plan(profile)
    return msgspec.structs.replace(plan, engines=plan.engines[:1], phases=(Phase(low=-FAR, high=FAR, cycle=(0,)),))


@pytest.mark.parametrize("treatment", [Treatment.DROP, Treatment.MEAN, Treatment.HOLD, Treatment.FORECAST])
def test_a_cell_shows_the_least_harmful_treatment(treatment: Treatment) -> None:
    profile = make_profile(count=3)
    least = tuple(
        msgspec.structs.replace(effect, relative_l2=estimate(1e-4)) if effect.treatment is treatment else effect
        for effect in profile.effects
    )
    assert letters_of(msgspec.structs.replace(profile, effects=least)) == [treatment.value[0]] * 3 * 4


def test_only_measured_cells_have_a_letter() -> None:
    profile = make_profile(count=3)
    some = tuple(msgspec.structs.replace(effect, measured=effect.bin == 2) for effect in profile.effects)
    assert len(letters_of(profile)) == 3 * 4
    assert len(letters_of(msgspec.structs.replace(profile, effects=some))) == 3


def test_the_page_says_how_damages_add_up() -> None:
    profile = make_profile()
    manifest = make_manifest(profile)
    with_pairs = " ".join(page(profile, manifest=manifest).split())
    assert "Do damages add up?" in with_pairs
    assert ["1 and 2", "0.0300, 0.0400", "0.0625", "1.25"] in [
        [cell.strip() for cell in re.findall("<td[^>]*>([^<]*)</td>", row)]
        for row in re.findall("<tr>(.*?)</tr>", with_pairs)
    ]
    assert "Do damages add up?" not in page(profile, manifest=msgspec.structs.replace(manifest, pairs=()))


def test_the_page_shows_the_effort_of_the_analysis(default_page: str) -> None:
    assert "measuring the damage took 17.2 sampling runs of the full model" in " ".join(default_page.split())


def test_the_curve_marks_the_best_plans_and_shows_all() -> None:
    plan = make_plan(make_profile())
    places = [(0.5, 0.2), (0.6, 0.1), (0.55, 0.3), (0.9, 0.05), (0.95, 0.4)]
    points = tuple(Point(budget=0.1, time_ratio=t, damage=damage(d), plan=plan) for t, d in places)
    curve = Pareto(
        unetc="0.1.0",
        model=MODEL,
        profile_sha256="cd" * 32,
        target="onnxruntime-cpu",
        environment={},
        steps=20,
        samples=8,
        seed=1,
        points=points,
    )
    drawn = charts_of_curve.draw(curve)
    assert drawn.startswith("<svg ")
    assert "digits, 20 steps, onnxruntime-cpu: 5 plans, 8 samples" in drawn
    labels = re.findall(r">(\d+) dB</text>", drawn)
    assert sorted(map(int, labels)) == sorted(round(point.damage.psnr.mean) for point in curve.front())
    assert len(labels) == 3


def test_large_model_stays_light_and_complete() -> None:
    profile = make_profile(count=150, bins=8)
    text = page(profile)
    assert len(text) < 3_000_000
    for component in profile.components:
        assert component.name in text


def test_one_component_in_one_bin_without_measurement_is_drawn() -> None:
    profile = msgspec.structs.replace(make_profile(count=3, bins=2), effects=(), costs=())
    assert heatmap.draw(profile, make_plan(profile)).startswith("<svg ")


def test_heavy_chart_becomes_a_picture() -> None:
    figure = Figure((1, 1))
    assert charts.inline(figure, "a & b").startswith('<svg role="img" aria-label="a &amp; b"')
    assert charts.inline(figure, "a & b", limit=10).startswith('<img alt="a &amp; b" src="data:image/png;base64,')


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.03125, "0.0312"), (-3.14159, "−3.14"), (1612.4, "1612"), (99.96, "100.0"), (1e-7, "1e−07")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_pixels_are_rounded_and_clipped() -> None:
    samples = np.array([-2, -1, -1 + 1 / 255, 0.999, 1, 7], np.float32).reshape(1, 1, 2, 3)
    assert pictures.to_pixels(samples).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert pictures.to_pixels(np.full((1, 1, 1, 1), -1 + 1.02 / 255)).item() == 1
    levels = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16) / 127.5 - 1
    assert pictures.to_pixels(levels).ravel().tolist() == list(range(256))


def test_pixels_follow_the_channels() -> None:
    colour = make_samples(0, channels=3)
    assert pictures.to_pixels(make_samples(0)).shape == (3, 8, 8)
    assert pictures.to_pixels(colour).shape == (3, 8, 8, 3)
    assert pictures.to_pixels(colour)[1, 2, 3, 0] == np.rint((colour[1, 0, 2, 3] + 1) * 127.5)


def test_latents_show_their_first_channel_over_the_full_range() -> None:
    latents = 5 * make_samples(0, channels=4)
    visible = pictures.to_visible(latents)
    assert visible.shape == (3, 1, 8, 8)
    assert np.abs(visible).max() == pytest.approx(1)
    assert not pictures.to_visible(np.zeros((1, 4, 2, 2))).any()


@pytest.mark.parametrize(
    ("shape", "columns", "scale", "size"),
    [
        ((4, 1, 32, 32), None, None, (2 * 128 + pictures.GAP, 2 * 128 + pictures.GAP)),
        ((5, 3, 8, 8), 3, 2, (3 * 16 + 2 * pictures.GAP, 2 * 16 + pictures.GAP)),
        ((1, 3, 8, 16), 4, None, (128, 64)),
        ((2, 1, 256, 200), 1, None, (200, 2 * 256 + pictures.GAP)),
    ],
)
def test_grid_has_the_size_of_its_pictures_and_gaps(
    shape: tuple[int, ...], columns: int | None, scale: int | None, size: tuple[int, int]
) -> None:
    assert pictures.grid(np.zeros(shape), columns, scale).size == size


def test_grid_enlarges_pixels_without_blending() -> None:
    sheet = np.asarray(pictures.grid(make_samples(0), columns=3, scale=4))
    assert np.array_equal(sheet[::4, :32:4], pictures.to_pixels(make_samples(0))[0])
    assert np.array_equal(sheet[::4], sheet[3::4])


def test_grid_refuses_samples_that_are_not_a_batch() -> None:
    with pytest.raises(ShapeMismatch, match="Expected"):
        pictures.grid(np.zeros((1, 8, 8)))
    with pytest.raises(ShapeMismatch, match="no sample"):
        pictures.grid(np.zeros((0, 1, 8, 8)))


def test_png_holds_the_picture() -> None:
    picture = pictures.grid(make_samples(0))
    data = pictures.png_bytes(picture)
    assert data.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))
