"""Write the figures of README.md from the committed results.

python benchmarks/readme.py          # rewrites the block between the markers
python benchmarks/readme.py --check  # exits 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import table

ROOT = Path(__file__).parents[1]


def budgets(result: dict[str, Any]) -> str:
    """Write one table per budget and what each means in a sentence."""
    first = next(iter(result["budgets"].values()))["verification"]
    lines = [
        f"`digits`, {first['scheduler'].upper()} {first['steps']} steps, {first['samples']} samples on seeds that "
        f"neither analysis nor build has seen, {first['target']}, {first['threads']} threads "
        f"({first['environment']['processor']}). Time ratio = time / time of the full model, both through the same "
        "runtime in turns; damage at the same noise, with 95 % intervals. A control that beats the plan is bold.",
        "",
    ]
    for run in result["budgets"].values():
        lines += table_of(run)
    return "\n".join(lines)


def table_of(run: dict[str, Any]) -> list[str]:
    """Write the table of one budget and a sentence on it."""
    verified, judged = run["verification"], run["classifier"]
    own = verified["damage"]["relative_l2"]["mean"]
    rows = [("*the plan*", verified["time_ratio"], verified["damage"], False)]
    for control in verified["controls"].values():
        less = control["damage"]["relative_l2"]["mean"] < own and control["time_ratio"] <= verified["time_ratio_p90"]
        rows.append((control["description"], control["time_ratio"], control["damage"], less))
    lines = [
        f"| budget {verified['budget']:g} | time ratio | relative L2 | PSNR dB | SSIM |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, ratio, damage, beats in rows:
        l2 = damage["relative_l2"]
        cells = [
            name,
            f"{ratio:.3f}",
            f"{l2['mean']:.4f} ({l2['low']:.4f}–{l2['high']:.4f})",
            f"{damage['psnr']['mean']:.1f}",
            f"{damage['ssim']['mean']:.3f}",
        ]
        lines.append("| " + " | ".join(f"**{cell}**" if beats else cell for cell in cells) + " |")
    controls = verified["controls"]
    against = [
        f"{own / controls[name]['damage']['relative_l2']['mean']:.3f} × that of {words}"
        for name, words in (("fewer_steps", "fewer steps"), ("deep-hold", "DeepCache's rule"))
        if name in controls and controls[name]["damage"]["relative_l2"]["mean"] > 0
    ]
    disk = verified["disk_bytes"] / verified["full_disk_bytes"]
    return [
        *lines,
        "",
        f"The plan's relative L2 damage is {' and '.join(against)}. The digit classifier sees the same digit in "
        f"{judged['same_digit_share']:.1%} of {judged['samples']} samples and is confident in "
        f"{judged['confident_share_pruned']:.1%} of them (full model: {judged['confident_share_full']:.1%}). "
        f"All engines together take {disk:.3f} × the disk of the full model alone.",
        "",
    ]


def peers(result: dict[str, Any]) -> str:
    """Write the contenders at the time of DeepCache, and what it means in sentences."""
    settings, (first, *_), (full, planned) = result["settings"], result["tables"], result["at_budget"]
    ratios = [own["value"] for own in result["figures"] if own["figure"].startswith("damage")]
    intervals = [str(own["interval"]) for own in result["contenders"] if own["contender"].startswith("DeepCache 0")]
    at_full, at_plan = (f"{own['followed']['everything']:.1%}" for own in (full, planned))
    return "\n".join(
        [
            f"`{settings['model']}`, a Stable Diffusion in miniature, DDIM {settings['steps']} steps, guidance "
            f"{settings['guidance']:g}, each contender against the full model in its own runtime. {first['title']}:",
            "",
            table(first["columns"], first["rows"]),
            "",
            f"At the time that DeepCache takes, the plan does {' and '.join(f'{ratio:.3f} ×' for ratio in ratios)} "
            f"its damage (intervals {' and '.join(intervals)}). "
            f"At a budget of 0.27, {at_plan} of {planned['samples']} pictures show everything that their prompt asks "
            f"for; of the full model's {at_full}.",
            "",
        ]
    )


def support(result: dict[str, Any]) -> str:
    """Write the table of what tests have shown."""
    (own,) = result["tables"]
    return table(own["columns"], own["rows"]) + "\n"


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {"budget": budgets, "peers": peers, "support": support}
"""Name of a result → what writes it."""


def rewrite(text: str, name: str) -> str:
    """Put the figures of a result between its markers."""
    path = f"benchmarks/results/{name}.json"
    block = re.compile(rf"(<!-- figures: {re.escape(path)} -->\n).*?(<!-- /figures -->)", re.DOTALL)
    result = json.loads((ROOT / path).read_text())
    source = f"From [{path}]({path}); regenerate: `{result['command']}`, then `python benchmarks/readme.py`.\n"
    figures = f"{BLOCKS[name](result)}\n{source}"
    updated, count = block.subn(lambda match: match[1] + figures + match[2], text)
    if count != 1:
        sys.exit(f"README.md has {count} blocks for {path}; expected one.")
    return updated


def main() -> None:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    updated = functools.reduce(rewrite, BLOCKS, text)
    if options.check:
        sys.exit(0 if updated == text else "README.md does not show the results: run python benchmarks/readme.py")
    path.write_text(updated)


if __name__ == "__main__":
    main()
