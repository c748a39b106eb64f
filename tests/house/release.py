"""Write a release of the latest commit: the wheel, its bill of materials and their hashes.

    python -m tests.house.release [FOLDER]    # make release; into dist/

The wheel is built in a fresh clone, with the time of the commit, so the same commit gives the same bytes. The bill of
materials (CycloneDX) lists the packages of this environment: those that the release was tested with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUMS = "SHA256SUMS"
"""File of hashes, as `sha256sum --check` reads it."""


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the latest commit.

    Args:
        folder: Where the wheel is written.

    Returns:
        The wheel.
    """
    time = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": time.stdout.strip()}
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "unetc"
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", temporary, clone]
        for command in (["git", "clone", "--quiet", ROOT, clone], pip):
            # modes of files get into the wheel, and depend on the mask
            subprocess.run(command, check=True, umask=0o022, env=environment)
        (built,) = Path(temporary).glob("*.whl")
        return Path(shutil.copy(built, folder))


def write_bill(wheel: Path) -> Path:
    """Write the bill of materials next to a wheel."""
    name, version, *_ = wheel.name.split("-")
    bill = wheel.with_name(f"{name}-{version}.cdx.json")
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--mc-type", "library"]
    subprocess.run([*command, "--pyproject", ROOT / "pyproject.toml", "-o", bill], check=True)
    content = json.loads(bill.read_text())
    content["metadata"]["component"] |= {  # pyproject.toml has no version, and no wheel
        "version": version,
        "hashes": [{"alg": "SHA-256", "content": sha256(wheel)}],
    }
    bill.write_text(json.dumps(content, indent=1) + "\n")
    return bill


def write_sums(files: Sequence[Path]) -> Path:
    """Write the hashes of files into their folder."""
    sums = files[0].with_name(SUMS)
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(files)))
    return sums


def sha256(file: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    """Write the release."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(folder)
    bill = write_bill(wheel)
    print(wheel, bill, write_sums((wheel, bill)), sep="\n")


if __name__ == "__main__":
    main()
