"""Write the card of a reference model: its figures as `card.json`, and a README with a table of them."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path


def machine() -> str:
    """Describe the machine a model was trained on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, no GPU, shared with other work"


def write_card(text: str, command: str, figures: dict[str, object], folder: Path) -> None:
    """Write the card.

    Args:
        text: Introduction of the README, before its table.
        command: Command that regenerates the model.
        figures: Name and value of each row.
        folder: The model folder.
    """
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_in_words(value)} |" for name, value in figures.items())
    (folder / "card.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "README.md").write_text(
        f"{text}\n\n| figure | value |\n|---|---|\n{rows}\n\nRegenerate: `{command}`. Figures also in `card.json`.\n"
    )


def _in_words(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    ends = " · " if any(isinstance(inner, dict) for inner in value.values()) else ", "
    return ends.join(f"{name.replace('_', ' ')}: {_in_words(inner)}" for name, inner in value.items())
