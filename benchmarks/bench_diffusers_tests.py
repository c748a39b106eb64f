"""How many of diffusers' own pipeline tests pass with a bundle in the place of their UNet?

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python benchmarks/bench_diffusers_tests.py diffusers/     # half an hour on two cores

Runs nine files of tests twice, with the original UNets and with drop-ins that run the full model. A test counts if it
passes with the original. With a drop-in it then passes, is refused by one of unetc's errors, or fails in another way.
Tests that download models fail in both runs without a network and do not count. The tests need the package
`parameterized` and `requests-mock`. With HF_HUB_OFFLINE=1, a tiny tokenizer stands in for those on the Hub. `--file`
runs some files alone, for a trial. Writes `results/diffusers_tests.json`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from command_line import add_results
from result_file import write

HERE = Path(__file__).parent
PIPELINES = "tests/pipelines"
"""Folder of the files in a checkout."""
FILES = (
    "stable_diffusion/test_stable_diffusion.py",
    "stable_diffusion/test_stable_diffusion_img2img.py",
    "stable_diffusion/test_stable_diffusion_inpaint.py",
    "stable_diffusion/test_stable_diffusion_instruction_pix2pix.py",
    "stable_diffusion_xl/test_stable_diffusion_xl.py",
    "stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    "stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
    "latent_consistency_models/test_latent_consistency_models.py",
    "controlnet/test_controlnet.py",
)
FAST = "not Slow and not Integration and not IPAdapter and not Memory and not DeviceMap and not Ckpt"
"""Leaves out tests that need a GPU, a real model or another checkpoint."""

REFUSED = re.compile(r"RefusedByBundle|unetc\.errors\.")


def run(checkout: Path, cache: Path, files: Sequence[str], *, original: bool) -> dict[str, str]:
    """Run the tests; return passed, refused or failed by test, with the last line of the error of a failed one."""
    report = cache / f"{'original' if original else 'dropin'}.xml"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        "UNETC_SUITE_CACHE": str(cache),
        "UNETC_SUITE_ORIGINAL": str(int(original)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "diffusers_suite", "-k", FAST]
    command += [*(f"{PIPELINES}/{file}" for file in files), f"--junitxml={report}", "-o", "addopts="]
    subprocess.run(command, cwd=checkout, env=environment, check=False)
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [*case.iter("failure"), *case.iter("error")]
        name = f"{case.get('classname')}::{case.get('name')}"
        if problems:
            text = f"{problems[0].get('message')} {problems[0].text}"
            results[name] = "refused" if REFUSED.search(text) else f"failed: {problems[0].get('message')}"[:200]
        elif not list(case.iter("skipped")):
            results[name] = "passed"
    return results


def summarise(original: Mapping[str, str], dropin: Mapping[str, str]) -> dict[str, object]:
    """Count the tests that pass with the original UNet."""
    passing = [name for name, result in original.items() if result == "passed"]
    others = {name: dropin.get(name, "missing") for name in passing if dropin.get(name) != "passed"}
    refused = sorted(name for name, result in others.items() if result == "refused")
    counts = {
        "tests that pass with the original UNet": len(passing),
        "of these, pass with the drop-in": len(passing) - len(others),
        "are refused by name": len(refused),
        "fail otherwise": len(others) - len(refused),
    }
    return {
        "figures": [{"figure": figure, "value": count} for figure, count in counts.items()],
        "refused": refused,
        "otherwise": {name: result for name, result in sorted(others.items()) if result != "refused"},
    }


def main() -> None:
    """Run both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="Folder of a checkout of diffusers.")
    add_results(parser)
    parser.add_argument("--file", action="append", choices=FILES, help="Run this file alone.")
    options = parser.parse_args()
    if not (options.checkout / PIPELINES).is_dir():
        parser.error(
            f"{options.checkout} has no folder {PIPELINES}; expected a checkout of diffusers: git clone --depth 1 "
            "--branch v0.40.0 https://github.com/huggingface/diffusers"
        )
    files = options.file or FILES
    with tempfile.TemporaryDirectory() as folder:
        results = [run(options.checkout.resolve(), Path(folder), files, original=one) for one in (True, False)]
    write(options.results, "diffusers_tests", summarise(*results))


if __name__ == "__main__":
    main()
