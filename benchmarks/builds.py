"""Analyse, build and verify through the command line, and put plans next to their controls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import commit, sources_sha256
from result_file import absent

from unetc.environment import describe

VERIFIED_SEED = 2001
"""Seed that no build uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A model with a way to sample it."""

    model: str
    scheduler: str
    steps: int
    budgets: tuple[float, ...]
    guidance: float | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        return f"{self.model}, {self.scheduler} {self.steps}{guided}"

    @property
    def slug(self) -> str:
        """Name of files."""
        return self.name.replace(", ", "-").replace(" ", "-").replace("+", "p")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Options of the commands."""

    analysis: tuple[str, ...]
    """Options of analyze."""
    rounds: int
    """Batches that every contender samples in verify."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """The sources of a version, and a folder for the files that it makes.

    Finished files are read again if the same sources would make them with the same command from the same files.
    """

    sources: Path
    folder: Path

    def measure(self, regime: Regime, budget: float, effort: Effort, model: str | None = None) -> Mapping[str, Any]:
        """Analyse, build and verify.

        Args:
            regime: The regime.
            budget: Share of the time to save.
            effort: Options of the commands.
            model: The model's name for this version, if it is not the regime's.

        Returns:
            What verify found, and under `seconds` how long analyze and build took.
        """
        name = model or regime.model
        profile, bundle = self.folder / f"{regime.slug}.json", self.folder / f"{regime.slug}-{budget:g}"
        result = bundle.with_name(f"{bundle.name}.verification.json")
        guidance = () if regime.guidance is None else ("--guidance-scale", f"{regime.guidance:g}")
        sampling = ("--scheduler", regime.scheduler, "--steps", str(regime.steps))
        asked = ("--profile", str(profile), "--budget", f"{budget:g}", "--steps", str(regime.steps))
        checked = ("--rounds", str(effort.rounds), "--seed", str(VERIFIED_SEED))
        cache = ("--cache", str(self.folder / "cache"))
        seconds = {
            "analyze": self.make(profile, "analyze", name, *sampling, *effort.analysis, *guidance, *cache),
            "build": self.make(bundle, "build", name, *asked, *cache),
        }
        self.make(result, "verify", str(bundle), *checked)
        verified: dict[str, Any] = json.loads(result.read_text())
        named = verified["model"] | {"name": regime.model}  # not the path of a folder on this machine
        return verified | {"model": named, "seconds": seconds}

    def make(self, made: Path, *command: str) -> float:
        """Run a command that makes a file or a folder, unless it has; return how many seconds it took."""
        note = _note(made)
        inputs = {word: json.loads(_note(Path(word)).read_text()) for word in command if _note(Path(word)).exists()}
        asked = {
            "command": list(command),
            "sources": sources_sha256(self.sources, benchmarks=False),
            "inputs": {word: own["made"] for word, own in inputs.items()},
        }
        known = json.loads(note.read_text()) if note.exists() else {}
        if any(known.get(key) != value for key, value in asked.items()):
            note.unlink(missing_ok=True)
            environment = {**os.environ, "PYTHONPATH": str(self.sources / "src")}
            start = time.monotonic()
            subprocess.run([sys.executable, "-m", "unetc", *command, "-o", str(made)], check=True, env=environment)
            known = asked | {"made": uuid.uuid4().hex, "seconds": round(time.monotonic() - start, 1)}
            note.write_text(json.dumps(known))
        return float(known["seconds"])


def _note(made: Path) -> Path:
    """Name the note on how a file or a folder was made."""
    return made.with_name(f"{made.name}.made.json")


def measured(rows: Mapping[Any, dict[str, Any]], regimes: Sequence[Regime]) -> list[dict[str, Any]]:
    """List the rows that are there, by regime and budget, in the order of the regimes."""
    return [rows[one.name, budget] for one in regimes for budget in one.budgets if (one.name, budget) in rows]


def unmeasured(rows: Sequence[Mapping[str, Any]], regimes: Sequence[Regime]) -> dict[str, str]:
    """List the regimes and budgets that have no row."""
    named = [f"{one.name}, budget {budget:g}" for one in regimes for budget in one.budgets]
    return absent(named, [f"{one['regime']}, budget {one['budget']:g}" for one in rows])


def row(regime: Regime, budget: float, verified: Mapping[str, Any]) -> dict[str, Any]:
    """Put a plan and its controls side by side."""
    return {
        "regime": regime.name,
        "budget": budget,
        "commit": commit(),
        "environment": describe(),
        "plan": outcome(verified),
        "asked": (1 - verified["time_ratio"]) / budget,
        "controls": {name: outcome(one) for name, one in verified["controls"].items()},
        "loses_to": verified["loses_to"],
        "verification": verified,
    }


def outcome(verified: Mapping[str, Any]) -> dict[str, float]:
    """Return the time and the damage of a contender."""
    return {"time": verified["time_ratio"], "damage": verified["damage"]["relative_l2"]["mean"]}


def table(rows: Sequence[Mapping[str, Any]], first: Mapping[str, str]) -> dict[str, Any]:
    """Write all damages in one table, each with its time.

    Args:
        rows: Rows of `row`, perhaps with further outcomes.
        first: Keys of the outcomes that come before the controls, by the title of their column.
    """
    names = list(dict.fromkeys(name for one in rows for name in one["controls"]))
    lines = []
    for one in rows:
        outcomes = [*(one[key] for key in first.values()), *(one["controls"].get(name) for name in names)]
        shown = ["–" if own is None else f"{own['damage']:.4f} at {own['time']:.3f}" for own in outcomes]
        lines.append([one["regime"], one["budget"], one["commit"], *shown])
    return {
        "title": "relative L2 at time / full model",
        "columns": ["regime", "budget", "commit", *first, *names],
        "rows": lines,
    }
