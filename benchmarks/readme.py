"""Write the figures of README.md from the committed results.

python benchmarks/readme.py          # rewrites the block between the markers
python benchmarks/readme.py --check  # exits 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = "benchmarks/results/budget.json"
BLOCK = re.compile(rf"(<!-- figures: {re.escape(RESULT)} -->\n).*?(<!-- /figures -->)", re.DOTALL)


def figures(result: dict[str, Any]) -> str:
    """Write the table of one verification and what it means in a sentence."""
    verified, judged = result["verification"], result["classifier"]
    rows = [("**the plan**", verified["time_ratio"], verified["damage"])]
    rows += [(c["description"], c["time_ratio"], c["damage"]) for c in verified["controls"].values()]
    lines = [
        f"`digits`, {verified['scheduler'].upper()} {verified['steps']} steps, budget {verified['budget']:g}, "
        f"{verified['samples']} samples on seeds that neither analysis nor build has seen, {verified['target']}, "
        f"{verified['threads']} threads ({verified['environment']['processor']}). Time ratio = time / time of the full "
        "model, both through the same runtime in turns; damage at the same noise, with 95 % intervals.",
        "",
        "| | time ratio | relative L2 | PSNR dB | SSIM |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, ratio, damage in rows:
        l2 = damage["relative_l2"]
        lines.append(
            f"| {name} | {ratio:.3f} | {l2['mean']:.4f} ({l2['low']:.4f}–{l2['high']:.4f}) "
            f"| {damage['psnr']['mean']:.1f} | {damage['ssim']['mean']:.3f} |"
        )
    fewer = verified["controls"]["fewer_steps"]["damage"]["relative_l2"]["mean"]
    times = verified["damage"]["relative_l2"]["mean"] / fewer
    disk = verified["disk_bytes"] / verified["full_disk_bytes"]
    lines += [
        "",
        f"The plan's relative L2 damage is {times:.2f} × that of fewer steps. The digit classifier sees the same digit "
        f"in {judged['same_digit_share']:.1%} of {judged['samples']} samples and is confident in "
        f"{judged['confident_share_pruned']:.1%} of them (full model: {judged['confident_share_full']:.1%}). "
        f"All engines together take {disk:.3f} × the disk of the full model alone.",
        "",
        f"From [{RESULT}]({RESULT}); regenerate: `{result['command']}`, then `python benchmarks/readme.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    table = figures(json.loads((ROOT / RESULT).read_text()))
    updated = BLOCK.sub(lambda match: match[1] + table + match[2], text)
    if options.check:
        sys.exit(0 if updated == text else f"README.md does not show {RESULT}: run python benchmarks/readme.py")
    path.write_text(updated)


if __name__ == "__main__":
    main()
