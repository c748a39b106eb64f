"""Only machines of one kind work together; the others are named."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from unetc.jobs import Advance
from unetc.ray_workers import Needs, joined, machines_of, workers_of

pytestmark = pytest.mark.nightly  # starts three machines of a cluster on this one

KIND = "UNETC_TEST_KIND"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a cluster of three machines: two of kind a with one CPU each, one of kind b with one."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "env_vars": {KIND: "a"}})
    cluster.add_node(num_cpus=1, env_vars={KIND: "b"})
    cluster.add_node(num_cpus=1, env_vars={KIND: "a"})
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(module)


def kind() -> str:
    return os.environ[KIND]


@dataclass(frozen=True)
class Recipe:
    def open(self) -> str:
        return kind()


@dataclass(frozen=True)
class Ask:
    name: str = "a question"

    def run(self, bench: str, advance: Advance) -> tuple[str, int]:
        return bench, os.getpid()


def test_the_most_numerous_kind_works_and_the_others_are_named(address: str) -> None:
    with joined(address):
        workers = workers_of(Recipe(), machines_of(Needs(cpus=1, gpu=False, describe=kind)))
        assert workers.machine == "a"
        assert workers.count == 2
        assert workers.notes == ("1 worker on b left out: results and times of unlike machines do not mix",)
        assert workers.run_alone(Ask())[0] == "a"
        answers = [answer for _, answer in workers.run([Ask()] * 20)]
        assert {own for own, _ in answers} == {"a"}
    assert not ray.is_initialized()


def test_a_machine_that_cannot_describe_itself_is_left_out(address: str, tmp_path: Path) -> None:
    def fragile() -> str:
        if kind() == "a":
            raise OSError("no such tool")
        return "b"

    with joined(address):
        workers = workers_of(Recipe(), machines_of(Needs(cpus=1, gpu=False, describe=fragile)))
        assert (workers.machine, workers.count) == ("b", 1)
        assert len(workers.notes) == 2
        assert all("was left out: OSError: no such tool" in note for note in workers.notes)
