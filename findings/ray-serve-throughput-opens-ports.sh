#!/usr/bin/env bash
# RAY_SERVE_THROUGHPUT_OPTIMIZED=1 gives every replica of Ray Serve a port, where no request router chooses.
#
# Guess: the option changes threads, buffers and transport only. Clients reach a deployment through the proxy, and a custom
# request router (`RequestRouterConfig`) sees each of their requests.
#
# Fact: the option switches "direct ingress" on as well. Every replica listens on a port of its own, from 30000 up, and
# answers requests for its application there. They pass neither the proxy nor the router. The proxy works as before.
#
# Why it matters: sticky sessions, limits and counts in a router hold for some requests only, and a firewall that knows
# the port of the proxy does not know the others. RAY_SERVE_ENABLE_DIRECT_INGRESS=0 next to the option closes them. The other
# parts can be switched on one by one: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0,
# RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0, RAY_SERVE_USE_GRPC_BY_DEFAULT=1.
#
# Seen with ray 2.60.0 (status at port 30000, and requests that the router saw of one to the proxy and one to port 30000):
#   default:                                   nothing listens; 1 of 1
#   RAY_SERVE_THROUGHPUT_OPTIMIZED=1:          200; 1 of 2
#   and RAY_SERVE_ENABLE_DIRECT_INGRESS=0:     nothing listens; 1 of 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q "ray[serve]==2.60.0"
cd "$folder"
cat >ports.py <<'PY'
import os
import pathlib
import socket
import sys
import urllib.error
import urllib.request

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter

DIRECT, SEEN = 30000, pathlib.Path("seen").absolute()


class Noting(RequestRouter):
    """Writes a line for every request, and leaves the choice to the replicas."""

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        if pending_request is not None:
            with open(os.environ["SEEN"], "a") as file:
                file.write("one\n")
        return [candidate_replicas]


@serve.deployment(request_router_config=RequestRouterConfig(request_router_class=Noting))
class Hello:
    async def __call__(self, request):
        return "hello"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def ask(port):
    """Return the status, or nothing if nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            return answer.status
    except urllib.error.URLError:
        return None


SEEN.write_text("")
os.environ["SEEN"] = str(SEEN)
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": (port := free_port())})
serve.run(Hello.bind())
assert ask(port) == 200
routed = SEEN.read_text().count("one")
direct = ask(DIRECT)
routed_then = SEEN.read_text().count("one")
serve.shutdown()
ray.shutdown()
print(f"at port {DIRECT}: {direct}; the router saw {routed} request of the proxy, and {routed_then - routed} of that port")
assert routed >= 1 and routed_then == routed, "the behaviour has changed"
assert direct == (200 if sys.argv[1] == "open" else None), "the behaviour has changed"
PY
export RAY_USAGE_STATS_ENABLED=0
run() { env "${@:2}" venv/bin/python -W ignore ports.py "$1" 2>log | grep '^at port' || { cat log; exit 1; }; }
run closed
run open RAY_SERVE_THROUGHPUT_OPTIMIZED=1
run closed RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_ENABLE_DIRECT_INGRESS=0
