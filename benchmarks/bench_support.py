"""Which architectures work, and what do the tests show for each?

    python benchmarks/bench_support.py           # about 25 minutes on two cores

The benchmark runs the tests that are marked `shows` for an architecture, nightly ones included. An aspect is shown if
all tests marked with it pass. Writes `results/support.json`.

- capture: the denoiser is traced and its components are found
- law: engines compute the same as the gated graph at their gates, on random assignments
- export: the graph in onnxruntime computes the same as the denoiser in torch
- sample: a session draws the same samples as diffusers (or the published sampler)
- drop-in: diffusers pipelines run with a bundle as their UNet
- quality: damage was measured on trained weights, in the named benchmark
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from command_line import add_results
from result_file import write

HERE = Path(__file__).parent
ASPECTS = ("capture", "law", "export", "sample", "drop-in")
QUALITY = {
    "UNet2DModel": "bench_budget.py (`digits`)",
    "UNet2DConditionModel as in Stable Diffusion 1.5": "bench_peers.py (`prompted-digits`)",
}
"""Architectures with trained weights, and the benchmark that measures their damage."""


def run_tests(report: Path, processes: int) -> int:
    """Run the marked tests and return the exit code of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "-m", "shows", f"--junitxml={report}"]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode


def outcomes(report: Path) -> dict[str, dict[str, list[bool]]]:
    """Read pytest's report: architecture → aspect → whether each test passed."""
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for case in ET.parse(report).getroot().iter("testcase"):
        properties = [(own.get("name"), own.get("value")) for own in case.iter("property")]
        architecture = next((value for name, value in properties if name == "architecture"), None)
        passed = all(case.find(outcome) is None for outcome in ("failure", "error", "skipped"))
        for name, value in properties:
            if architecture and value and name == "shows":
                found[architecture][value].append(passed)
    return found


def cell(tests: list[bool] | None) -> str:
    """Summarise the tests of an aspect in a table cell."""
    if not tests:
        return "–"
    return "yes" if all(tests) else f"no ({tests.count(False)} of {len(tests)} tests fail)"


def main() -> None:
    """Run the tests and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, default=2)
    parser.add_argument("--report", type=Path, help="read this report of `pytest --junitxml` instead of running tests")
    add_results(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        report = options.report or Path(work) / "report.xml"
        status = 0 if options.report else run_tests(report, options.processes)
        found = outcomes(report)
    record = {
        "tables": [
            {
                "title": "Results of the tests",
                "columns": ["architecture", *ASPECTS, "quality"],
                "rows": [
                    [name, *(cell(found[name].get(aspect)) for aspect in ASPECTS), QUALITY.get(name, "–")]
                    for name in sorted(found, key=lambda name: (not name.startswith("UNet"), name))
                ],
            }
        ],
    }
    write(options.results, "support", record)
    sys.exit(status)


if __name__ == "__main__":
    main()
