"""README and pages: figures from committed results, links that lead somewhere, and a README that a stranger can use."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import unetc
from tests.house.prose import modules, pages
from unetc.models.pipelines import PIPELINES

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MOST_WORDS = 850
WRITTEN = {
    "labels.json",
    "model_index.json",
    "manifest.json",
    "profile.json",
    "plan.json",
    "gpu.json",
    "unetc-export.json",
    "adapter_config.json",
}
"""Files that pages name, and that users, commands or other libraries write."""


def words(text: str) -> list[str]:
    """List everything between blanks, tables and links included; code blocks and comments left out."""
    return re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL).split()


def test_the_readme_is_short() -> None:
    assert len(words(README.read_text())) <= MOST_WORDS


def test_the_first_example_stands_within_the_first_150_words() -> None:
    before, fence, _ = README.read_text().partition("```")
    assert fence
    assert len(words(before)) <= 150


@pytest.mark.parametrize("part", ["demo", "test"])
def test_the_setup_commands_are_one_line_each(part: str) -> None:
    (block,) = re.findall(rf"^<!-- ci: {part} -->\n```\w*\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert block.count("\n") == 1


@pytest.mark.parametrize("script", ["readme.py", "tables.py"])
def test_figures_are_those_of_the_committed_results(script: str) -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_tables_show_losing_plans_and_both_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")
    damages: list[dict[str, Any]] = [
        {"relative_l2": {"mean": x, "low": x, "high": x}, "psnr": {"mean": 40.0}, "ssim": {"mean": 0.9}}
        for x in (0.02, 0.01, 0.5, 0.3)
    ]
    controls = {
        name: {"time_ratio": 0.7, "damage": own, "description": f"{name} in words"}
        for name, own in (("steps_only", damages[1]), ("random", damages[2]))
    }
    converged = {"full": damages[3], "plan": damages[2], "controls": dict.fromkeys(controls, damages[2])}
    verified = {"budget": 0.27, "time_ratio": 0.73, "time_ratio_p90": 0.74, "damage": damages[0], "controls": controls}
    verified |= {"loses_to": ["steps_only"], "converged": converged, "disk_bytes": 1, "full_disk_bytes": 1}
    judged = {"same_digit_share": 1, "samples": 1, "confident_share_pruned": 1, "confident_share_full": 1}
    run = {"verification": verified, "classifier": judged}
    head, _, plan, steps, random, full = readme.table_of(run)
    assert head.endswith("| to converged |")
    assert plan.endswith("| 0.5000 |")
    assert "**steps_only in words**" in steps
    assert "**" not in random
    assert full.startswith("| the full model | 1.000 |")
    assert full.endswith("| 0.3000 |")
    assert "The plan does 2.000 × the damage of whole steps alone, in relative L2. It loses to `steps_only`." in (
        readme.reading_of(run)
    )
    *_, last = readme.table_of(run, short=True)
    assert last.startswith("| **whole steps alone** |")
    assert plan.startswith("| *the plan* |")
    late, *_ = readme.table_of({**run, "verification": verified | {"time_ratio": 0.74}})[2:]
    assert late.startswith("| *the plan* (missed its budget) |")


def test_short_tables_show_the_best_control_in_the_place_of_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")

    def shown(**controls: tuple[float, float]) -> set[str]:
        made = {
            name: {"time_ratio": time, "damage": {"relative_l2": {"mean": damage}}}
            for name, (time, damage) in controls.items()
        }
        found: set[str] = readme.shown_of({"time_ratio_p90": 0.74, "controls": made})
        return found

    assert shown(removal_only=(0.7, 0.1), steps_only=(0.7, 0.2), uniform=(0.8, 0.01)) == {"removal_only"}
    several = {"fewer_steps": (0.7, 0.3), "steps_only": (0.7, 0.2), "uniform": (0.74, 0.1), "random": (0.7, 1.0)}
    assert shown(**several) == {"steps_only", "uniform"}
    assert shown(fewer_steps=(0.7, 0.3), random=(0.7, 0.4)) == {"fewer_steps"}
    assert shown(fewer_steps=(0.8, 0.3)) == {"fewer_steps"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_file_exists(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "docs/targets.md"])
def test_only_pipelines_that_the_commands_take_read_as_supported(page: str) -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \|.*$", (ROOT / page).read_text(), re.MULTILINE)
    support = {name: answer for name, answer in rows if "Pipeline`" in name or "SD3, PixArt" in name}
    taken = {
        name for cell, answer in support.items() if answer == "yes" for name in re.findall(r"`(\w+Pipeline)`", cell)
    }
    assert taken == set(PIPELINES)
    (refused,) = (answer for cell, answer in support.items() if "SD3, PixArt" in cell)
    assert refused in ("no", "refused")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_code_that_a_page_names_exists(page: Path) -> None:
    files = [
        *modules("src", "runtime", "compiler", "analyzer", "tests", "benchmarks"),
        *ROOT.glob("benchmarks/**/*.json"),
        *ROOT.glob("tests/**/*.json"),
    ]
    named = re.findall(r"`([\w/.-]+\.(?:py|json))`", page.read_text())
    ours = [name for name in named if name not in WRITTEN and not name.startswith(("/", "."))]
    assert [name for name in ours if not any(str(path).endswith(f"/{name}") for path in files)] == []


def test_every_page_that_the_code_names_exists() -> None:
    named = {
        (match[0], str(path.relative_to(ROOT)))
        for path in modules("src", "runtime", "compiler", "analyzer", "tests", "benchmarks")
        for match in re.finditer(r"docs/[\w/-]+\.(?:md|svg|png)", path.read_text())
    }
    assert [(page, path) for page, path in sorted(named) if not (ROOT / page).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_python_lines_use_names_that_unetc_has(page: str) -> None:
    code = "".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))
    compile(code, page, "exec")
    used = set(re.findall(r"\bunetc\.(\w+)", code))
    assert used
    assert used - {"diffusers", "server"} <= set(unetc.__all__)


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_commands_print_what_the_readme_shows(command: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/planner/profiles/digits-ddim.json", tmp_path / "profile.json")
    found = re.search(rf"^\$ unetc ({command} .*)\n((?:.+\n)*?)```", README.read_text(), re.MULTILINE)
    assert found
    arguments, shown = found.groups()
    ran = subprocess.run(
        [sys.executable, "-m", "unetc", *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "112"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.rstrip() for line in ran.stdout.rstrip().split("\n")] == shown.rstrip().split("\n")
