"""Install the lowest and the highest releases that pyproject.toml allows, and run tests with both.

    python -m tests.house.bounds [lowest] [highest]    # make bounds; about ten minutes and 3 GB in a temporary folder

Each end of the bounds gets two fresh environments. `full` has the extras of `EXTRAS`: it runs `CHECKS` and builds a
bundle. `base` has what sampling needs: it samples from that bundle. All lower bounds are installed together, then all
upper ones; other packages come in their newest releases that fit. The versions go into bounds.json, and
test_bounds.py compares it with pyproject.toml. torch stays at `TORCH`: its bounds allow one minor release.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEEN = Path(__file__).with_suffix(".json")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

ENDS = {"lowest": "lowest-direct", "highest": "highest"}
"""Ends of the bounds, with the strategy of uv that resolves to them."""

EXTRAS = {"full": ("cpu", "compile", "report"), "base": ("cpu",)}
"""Environments, with their extras."""

TOOLS = ("hypothesis", "peft", "pytest", "pytest-xdist", "scikit-learn")
"""Packages of the extra dev that the checks need."""
COMPARED = ("torchmetrics",)
"""Packages that the checks compare results with, in any release."""

TORCH = "torch==2.13.0"
"""The release that was tried. With UV_FIND_LINKS=FOLDER, uv takes a build for the CPU alone from a folder."""

LORA, FOLDERS = "tests/ground/test_lora_strength.py::", "tests/ground/test_folders.py::"

CHECKS = (
    "tests/cli/test_groups.py",
    "tests/compiler/schedulers/test_every_class.py",
    "tests/dropin/test_refusals.py",
    "tests/e2e/test_stable_diffusion.py",
    f"{FOLDERS}test_a_flat_repository_is_read_as_diffusers_reads_it",
    f"{FOLDERS}test_only_the_weights_that_are_read_are_fetched",
    f"{FOLDERS}test_profiles_of_the_built_in_models_stay_valid",
    f"{FOLDERS}test_shards_are_read",
    f"{FOLDERS}test_weights_of_every_part_fit_its_configuration",
    f"{LORA}test_a_dora_of_peft_is_fused_as_in_peft",
    f"{LORA}test_alphas_come_from_the_configuration_of_peft",
    f"{LORA}test_any_ranks_alphas_scales_and_orders_follow_the_definition",
    "tests/ground/test_metrics.py",
    "tests/ground/test_records.py",
    "tests/ground/test_report.py",
    "tests/planner/test_same_plans.py",
)
"""Tests that use every library of the environment `full`.

They capture, plan, build, fuse LoRAs, encode prompts, draw and sample, and compare schedulers and pipelines with
diffusers.
"""

ANALYSIS = ("--steps", "4", "--samples", "2", "--bins", "2", "--batch", "2", "--threads", "1", "--screen-only")
"""Options of a short analysis."""

Versions = dict[str, str]


def bounds_of(environment: str) -> dict[str, str]:
    """List the packages of an environment with their bounds, as pyproject.toml has them."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    listed = [*PYPROJECT["project"]["dependencies"], *(line for extra in EXTRAS[environment] for line in extras[extra])]
    if environment == "full":
        listed += [line for line in extras["dev"] if name_of(line) in TOOLS]
    return {name_of(line): line.removeprefix(name_of(line)) for line in listed if not line.startswith("unetc[")}


def name_of(requirement: str) -> str:
    """Return the package of a requirement."""
    return re.split(r"[^\w.-]", requirement)[0]


def run(*command: str | Path, **environment: str) -> None:
    """Run a command in the clone; its output is shown."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env={**os.environ, **environment})


def resolve(uv: Path, environment: str, end: str, folder: Path) -> Path:
    """Write the versions of the listed packages at one end of their bounds, as constraints."""
    listed = [f"{name}{bounds}" for name, bounds in bounds_of(environment).items() if name != "torch"]
    asked, answer = folder / "requirements.in", folder / "constraints.txt"
    asked.write_text("\n".join([*listed, *([TORCH] if environment == "full" else [])]))
    python = ("--python-version", f"{sys.version_info.major}.{sys.version_info.minor}")
    run(uv, "pip", "compile", "--quiet", "--no-annotate", "--resolution", ENDS[end], *python, asked, "-o", answer)
    direct = [line for line in answer.read_text().splitlines() if name_of(line) in bounds_of(environment)]
    answer.write_text("\n".join(line for line in direct if not line.startswith("torch==")) + f"\n{TORCH}\n")
    return answer


def install(uv: Path, environment: str, end: str, folder: Path) -> Path:
    """Make a fresh environment at one end of the bounds.

    Returns:
        Its folder of programs.
    """
    folder.mkdir(parents=True)
    constraints = resolve(uv, environment, end, folder)
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    programs = folder / "venv/bin"
    tools = (*TOOLS, *COMPARED) if environment == "full" else ()
    package = f".[{','.join(EXTRAS[environment])}]"
    python = programs / "python"
    run(uv, "pip", "install", "--quiet", "--python", python, "-c", constraints, "-e", package, *tools)
    return programs


def versions_of(uv: Path, environment: str, programs: Path) -> Versions:
    """List the installed versions of the packages that have bounds."""
    listing = subprocess.run(
        [uv, "pip", "list", "--python", programs / "python", "--format=json"], check=True, capture_output=True
    ).stdout
    installed = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(listing)}
    return {name: installed[name].partition("+")[0] for name in sorted(bounds_of(environment))}


def check(end: str, folder: Path, uv: Path) -> Mapping[str, Any]:
    """Install one end of the bounds, then test, build and sample.

    Returns:
        Versions per environment, and seconds.
    """
    start = time.monotonic()
    profile, bundle, cache = folder / "profile.json", folder / "bundle", str(folder / "cache")
    full = install(uv, "full", end, folder / "full")
    path = f"{full}{os.pathsep}{os.environ['PATH']}"
    run(full / "python", "-m", "pytest", "-q", "-n", "2", "-m", "", "-W", "ignore", *CHECKS, PATH=path)
    run(full / "unetc", "analyze", "digits", *ANALYSIS, "-o", profile, UNETC_CACHE=cache)
    run(full / "unetc", "build", "digits", "--profile", profile, "--steps", "4", "-o", bundle, UNETC_CACHE=cache)
    base = install(uv, "base", end, folder / "base")
    run(base / "unetc", "build", "--help")
    run(base / "unetc", "sample", bundle, "-o", folder / "samples", UNETC_CACHE=cache)
    versions = {"full": versions_of(uv, "full", full), "base": versions_of(uv, "base", base)}
    return {"versions": versions, "seconds": round(time.monotonic() - start)}


def main() -> None:
    """Check the asked ends and write them into bounds.json, which keeps the other end of the same bounds and checks."""
    record: dict[str, Any] = {
        "command": "python -m tests.house.bounds",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        "bounds": bounds_of("full") | bounds_of("base"),
        "checks": list(CHECKS),
    }
    for end in sys.argv[1:] or ENDS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            venv.create(folder / "uv", with_pip=True)
            run(folder / "uv/bin/python", "-m", "pip", "install", "--quiet", "uv")
            seen = check(end, folder / end, folder / "uv/bin/uv")
        written = json.loads(SEEN.read_text())
        same = all(written[key] == record[key] for key in record)
        SEEN.write_text(json.dumps({**(written if same else record), end: seen}, indent=1) + "\n")


if __name__ == "__main__":
    main()
