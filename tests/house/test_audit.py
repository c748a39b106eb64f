"""The audit of packages finds known vulnerabilities, and never passes without an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.house.audit import ENVIRONMENT, Unreachable, audit, pinned

pytestmark = pytest.mark.nightly

VULNERABLE = "pillow"
FLAW = {
    "id": "EXAMPLE-1",
    "summary": "an example",
    "affected": [{"package": {"name": VULNERABLE, "ecosystem": "PyPI"}}],
}


class Database(BaseHTTPRequestHandler):
    """Answers as OSV does; one package has a vulnerability."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"vulns": [FLAW]} if asked["package"]["name"] == VULNERABLE else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def database() -> Iterator[list[str]]:
    """Options that name a database on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Database)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield ["--vulnerability-service", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}"]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_known_vulnerability_is_named_with_its_package(database: list[str]) -> None:
    (version,) = (own.partition("==")[2] for own in pinned("lowest") if own.startswith(f"{VULNERABLE}=="))
    assert audit("lowest", database).vulnerable == (f"{VULNERABLE} {version}: EXAMPLE-1",)


def test_a_database_that_gives_no_answer_is_no_success() -> None:
    with pytest.raises(Unreachable):
        audit("lowest", ["--vulnerability-service", "osv", "--osv-url", "http://127.0.0.1:9", "--timeout", "1"])


def test_no_tested_package_has_a_known_vulnerability() -> None:
    try:
        findings = audit(ENVIRONMENT)
    except Unreachable as error:
        pytest.skip(f"the database of vulnerabilities gives no answer: {error}")
    assert findings.vulnerable == ()
