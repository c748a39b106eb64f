"""Compare the tested packages with a database of known vulnerabilities.

    python -m tests.house.audit [environment] [lowest] [highest]    # make audit: this environment

`environment` is the one that runs this; `make bounds` makes `lowest` and `highest`. pip-audit asks the database
of PyPI, so this needs a network. It exits 1 if a package has a known vulnerability, and 2 if the database gave no
answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.house.bounds import ENDS, SEEN

ENVIRONMENT = "environment"


class Unreachable(Exception):
    """The database gave no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Answers of the database."""

    vulnerable: tuple[str, ...]
    """Each package with the name of a vulnerability."""
    unknown: tuple[str, ...]
    """Packages that the database does not have, such as builds with a local version."""


def pinned(end: str) -> list[str]:
    """List the packages at one end of the bounds with their versions."""
    versions: dict[str, str] = {}
    for own in json.loads(SEEN.read_text())[end]["versions"].values():
        versions |= own
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def audit(subject: str, options: Sequence[str] = ()) -> Findings:
    """Ask about all packages of a subject.

    Args:
        subject: `environment`, or an end of the bounds.
        options: Further options of pip-audit.

    Raises:
        Unreachable: If the database gives no answer about any package.
    """
    with tempfile.TemporaryDirectory() as folder:
        packages, answer = Path(folder, "packages.txt"), Path(folder, "answer.json")
        chosen = ["--skip-editable"]
        if subject != ENVIRONMENT:
            packages.write_text("\n".join(pinned(subject)))
            chosen = ["--requirement", str(packages), "--no-deps", "--disable-pip"]
        command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json", *chosen]
        done = subprocess.run([*command, "--output", answer, *options], capture_output=True, text=True, check=False)
        if not answer.exists():
            raise Unreachable(done.stderr.strip().splitlines()[-1])
        answers = json.loads(answer.read_text())["dependencies"]
    known = [one for one in answers if "skip_reason" not in one]
    if not known:
        raise Unreachable(f"it knows none of {len(answers)} packages")
    return Findings(
        vulnerable=tuple(f"{one['name']} {one['version']}: {own['id']}" for one in known for own in one["vulns"]),
        unknown=tuple(one["name"] for one in answers if "skip_reason" in one),
    )


def main() -> None:
    """Audit the asked subjects."""
    vulnerable = []
    for subject in sys.argv[1:] or [ENVIRONMENT]:
        if subject not in (ENVIRONMENT, *ENDS):
            sys.exit(__doc__)
        try:
            findings = audit(subject)
        except Unreachable as error:
            print(f"{subject}: no answer: {error}", file=sys.stderr)
            sys.exit(2)
        vulnerable += [f"{subject}: {one}" for one in findings.vulnerable]
        if findings.unknown:
            print(f"{subject}: not in the database: {', '.join(findings.unknown)}")
    sys.exit("\n".join(vulnerable) or 0)


if __name__ == "__main__":
    main()
