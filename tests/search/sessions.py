"""Sessions over candidates of a workbench in this process."""

from __future__ import annotations

from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.workbench import Workbench
from unetc.jobs import InProcess
from unetc.runtime.session import Session


def session_of(workbench: Workbench, candidate: Candidate) -> Session:
    """Open a session over the engines of a candidate."""
    assert isinstance(workbench.workers, InProcess)
    session: Session = workbench.workers.bench.session(candidate)
    return session
