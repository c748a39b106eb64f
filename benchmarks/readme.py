"""Write the figures of README.md and docs/ from the committed results.

python benchmarks/readme.py          # rewrites the blocks between the markers
python benchmarks/readme.py --check  # exits 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import table, tables_of

ROOT = Path(__file__).parents[1]

Writer = Callable[[dict[str, Any]], str]
"""Turns a result into Markdown."""

BUDGET = "0.27"
"""The budget that README.md shows."""
COMPARED = {
    "fewer_steps": "fewer steps",
    "chosen_steps": "chosen steps",
    "steps_only": "whole steps alone",
    "other_solver": "another scheduler",
    "deep-hold": "DeepCache's rule",
}
"""Controls that README.md shows and a reading compares with, in words."""
OTHERS = {
    "removal_only": "only drop and mean",
    "uniform": "one treatment everywhere",
    "random": "random treatments",
}
"""The other controls; README.md shows one of them in the place of the worst where it is the best."""
SAVED = 0.98
"""Least time saved / time asked for that meets a budget; two measurements differ by more than the rest."""


def one_budget(result: dict[str, Any]) -> str:
    """Write the table of the main budget, with short names of the controls that matter most."""
    return "\n".join([setting(result), "", *table_of(result["budgets"][BUDGET], short=True)])


def budgets(result: dict[str, Any]) -> str:
    """Write one table per budget, each with a short reading."""
    lines = [f"{setting(result)} A control that beats the plan is bold.", ""]
    for run in result["budgets"].values():
        lines += [*table_of(run), "", reading_of(run), ""]
    return "\n".join(lines[:-1])


def terrain(result: dict[str, Any]) -> str:
    """Write the main budget of `terrain`, with short names of the controls."""
    first = result["rows"][0]
    how = f"`terrain`, {sampling_of(first['verification'])}, measured in the same way:"
    return "\n".join([how, "", *table_of(first, short=True)])


def every_terrain(result: dict[str, Any]) -> str:
    """Write all rows of `terrain`, each with all controls."""
    lines = [f"{setting_of(result['rows'][0]['verification'], '`terrain`')} A control that beats the plan is bold."]
    for row in result["rows"]:
        lines += ["", f"{row['regime']}:", "", *table_of(row)]
    return "\n".join(lines)


def quality(result: dict[str, Any]) -> str:
    """Write the distances to real images, a table for every regime and budget."""
    settings = result["settings"]
    lines = [f"{settings['samples']} samples of each contender, guidance {settings['guidance_scale']:g}."]
    for row in result["rows"]:
        rows = [
            [
                name,
                f"{own['time']:.3f}",
                f"{own['distance']['mean']:.2f}",
                f"{own['more_than_full']['low']:+.2f} to {own['more_than_full']['high']:+.2f}"
                if name != "full"
                else "",
                percent(own["right"]),
            ]
            for name, own in row["contenders"].items()
        ]
        columns = ["contender", "time", "distance", "more than the full model", "right class"]
        lines += ["", f"{row['regime']}, budget {row['budget']:g}:", "", table(columns, rows)]
    return "\n".join(lines)


def setting(result: dict[str, Any]) -> str:
    """Describe how the budgets were measured."""
    return setting_of(result["budgets"][BUDGET]["verification"], "`digits`")


def setting_of(verified: Mapping[str, Any], model: str) -> str:
    """Describe a verification."""
    threads = f"{verified['threads']} thread{'s' if verified['threads'] > 1 else ''}"
    return (
        f"{model}, {sampling_of(verified)} on new seeds, `{verified['target']}`, {threads} "
        f"({verified['environment']['processor']}). "
        "Times are relative to the full model. Damage is measured at the same noise, with 95 % intervals."
    )


def sampling_of(verified: Mapping[str, Any]) -> str:
    """Describe the scheduler and the samples of a verification."""
    return f"{verified['scheduler'].upper()} with {verified['steps']} steps, {verified['samples']} samples"


def table_of(run: dict[str, Any], *, short: bool = False) -> list[str]:
    """Write the table of one budget: all controls and distances, or in short."""
    verified = run["verification"]
    converged = None if short else verified.get("converged")
    missed = " (missed its budget)" if 1 - verified["time_ratio"] < SAVED * verified["budget"] else ""
    rows = [(f"*the plan*{missed}", verified["time_ratio"], verified["damage"], False, converged and converged["plan"])]
    shown = shown_of(verified) if short else verified["controls"]
    for name, control in verified["controls"].items():
        if name not in shown:
            continue
        less = damage_of(control) < damage_of(verified) and control["time_ratio"] <= verified["time_ratio_p90"]
        distance = converged and converged["controls"][name]
        words = (COMPARED | OTHERS)[name] if short else control["description"]
        rows.append((words, control["time_ratio"], control["damage"], less, distance))
    head = [f"budget {verified['budget']:g}", "time", "saves", "relative L2", "PSNR dB", "SSIM"]
    if converged:
        head.append("to converged")
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name, ratio, damage, beats, distance in rows:
        l2 = damage["relative_l2"]
        cells = [
            name,
            f"{ratio:.3f}",
            percent(1 - ratio),
            f"{l2['mean']:.4f} ({l2['low']:.4f}–{l2['high']:.4f})",
            f"{damage['psnr']['mean']:.1f}",
            f"{damage['ssim']['mean']:.3f}",
        ]
        if distance:
            cells.append(f"{distance['relative_l2']['mean']:.4f}")
        lines.append("| " + " | ".join(f"**{cell}**" if beats else cell for cell in cells) + " |")
    if converged:
        cells = ["the full model", "1.000", percent(0), "0", "", "", f"{converged['full']['relative_l2']['mean']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def shown_of(verified: Mapping[str, Any]) -> set[str]:
    """Choose the controls of a short table: the best of those in no more time than the plan's upper end is one."""
    controls = verified["controls"]
    shown = {name for name in COMPARED if name in controls}
    fair = [name for name, own in controls.items() if own["time_ratio"] <= verified["time_ratio_p90"]]
    best = {min(fair, key=lambda name: damage_of(controls[name]))} if fair else set()
    worst = {max(shown, key=lambda name: damage_of(controls[name]))} if shown and not best <= shown else set()
    return shown - worst | best


def damage_of(contender: Mapping[str, Any]) -> float:
    """Read the relative L2 of a plan or a control."""
    value: float = contender["damage"]["relative_l2"]["mean"]
    return value


def listed(parts: Sequence[str]) -> str:
    """Join parts of a sentence."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.1f} %"


def reading_of(run: dict[str, Any]) -> str:
    """Say in sentences how the plan compares."""
    verified, judged = run["verification"], run["classifier"]
    controls = verified["controls"]
    against = [
        f"{damage_of(verified) / damage_of(controls[name]):.3f} × the damage of {words}"
        for name, words in COMPARED.items()
        if name in controls and damage_of(controls[name]) > 0
    ]
    disk = verified["disk_bytes"] / verified["full_disk_bytes"]
    losing = verified.get("loses_to")
    loses = f" It loses to {', '.join(f'`{name}`' for name in losing)}." if losing else ""
    return (
        f"The plan does {listed(against)}, in relative L2.{loses} The digit classifier sees the same digit in "
        f"{percent(judged['same_digit_share'])} of {judged['samples']} samples. It is confident in "
        f"{percent(judged['confident_share_pruned'])} of them, and in {percent(judged['confident_share_full'])} for "
        f"the full model. All engines together take {disk:.3f} × the disk space of the full model."
    )


def peers(result: dict[str, Any]) -> str:
    """Write the contenders at the time of DeepCache, with a short reading."""
    settings, (first, *_), (full, planned) = result["settings"], result["tables"], result["at_budget"]
    intervals = [str(own["interval"]) for own in result["contenders"] if own["contender"].startswith("DeepCache 0")]
    at_full, at_plan = (percent(own["followed"]["everything"]) for own in (full, planned))

    def ratios(figure: str) -> str:
        found = [own["value"] for own in result["figures"] if own["figure"].startswith(figure)]
        if not found:
            raise KeyError(figure)
        return " and ".join(f"{value:.3f} ×" for value in found)

    return "\n".join(
        [
            f"`{settings['model']}` is a Stable Diffusion in miniature: DDIM with {settings['steps']} steps, guidance "
            f"{settings['guidance']:g}. Each contender is compared with the full model in its own runtime. "
            f"{first['title']}:",
            "",
            table(first["columns"], first["rows"]),
            "",
            f"In the time of DeepCache with intervals {' and '.join(intervals)}, the plan does "
            f"{ratios('damage of unetc / damage of DeepCache')} its damage, and "
            f"{ratios('damage of unetc / damage of the best peer')} the damage of the best peer in that time. It takes "
            f"{ratios('time of unetc / time of the best peer')} the time of that peer. At a budget of 0.27, {at_plan} "
            f"of {planned['samples']} pictures show everything that their prompt asks for. The full model's share is "
            f"{at_full}.",
        ]
    )


def first_table(result: dict[str, Any]) -> str:
    """Write the first table of a result."""
    _, columns, rows = tables_of(result)[0]
    return table(columns, rows)


def promises(result: dict[str, Any]) -> str:
    """Write a row for every promise, and the tries that broke it."""
    rows = [
        [
            f"**{row['promise']}**: {row['promised']}",
            row["tried"],
            row["tries"],
            row["broken"],
            f"{row['trials']} of {row['trials in full']}",
            figures_of(row),
        ]
        for row in result["rows"]
    ]
    lines = [table(["promise", "how it was tried", "tries", "broken", "trials", "largest figures"], rows)]
    for row in result["rows"]:
        lines += [f"\n{row['promise']}, broken:\n", *(f"- {one}" for one in row["examples"])] if row["examples"] else []
    return "\n".join(lines)


def figures_of(row: Mapping[str, Any]) -> str:
    """List the figures of a promise with their limits; those above one are bold."""
    texts = []
    for name, value in row["figures"].items():
        limit = row["limits"].get(name)
        text = f"{name} {value:.4g}" if limit is None else f"{name} {value:.4g} (≤ {limit:g})"
        texts.append(text if limit is None or value <= limit else f"**{text}: missed**")
    return "; ".join(texts)


PAGES: Mapping[str, Mapping[str, Writer]] = {
    "README.md": {"budget": one_budget, "terrain": terrain},
    "docs/results.md": {
        "budget": budgets,
        "terrain": every_terrain,
        "quality": quality,
        "pareto": first_table,
        "peers": peers,
        "rtx_build": first_table,
    },
    "docs/promises.md": {"promises": promises},
    "docs/serving.md": {"serve": first_table},
    "docs/targets.md": {"support": first_table},
}
"""By page, the results that it shows and their writers."""


def rewrite(page: str, text: str) -> str:
    """Put the figures of all results of a page between their markers."""
    for name, write in PAGES[page].items():
        path = f"benchmarks/results/{name}.json"
        result = json.loads((ROOT / path).read_text())
        link = os.path.relpath(path, Path(page).parent)
        source = f"From [{path}]({link}); regenerate: `{result['command']}`, then `python benchmarks/readme.py`.\n"
        text = replace_block(page, text, path, f"{write(result)}\n\n{source}")
    return text


def replace_block(page: str, text: str, path: str, figures: str) -> str:
    """Put figures between the markers of a result."""
    block = re.compile(rf"(<!-- figures: {re.escape(path)} -->\n).*?(<!-- /figures -->)", re.DOTALL)
    updated, count = block.subn(lambda match: match[1] + figures + match[2], text)
    if count != 1:
        sys.exit(f"{page} has {count} blocks for {path}; expected one.")
    return updated


def main() -> None:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        updated = rewrite(page, text)
        if not options.check:
            path.write_text(updated)
        elif updated != text:
            sys.exit(f"{page} does not show the results: run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
