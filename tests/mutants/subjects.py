"""The heart of unetc in four subjects, each with the tests that must notice a change of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Modules to change, and their tests."""

    name: str
    modules: tuple[str, ...]
    """Paths below src/unetc; a folder stands for all its modules."""
    tests: tuple[str, ...]
    """Folders, files or single tests below tests/."""
    sample: int
    """Number of mutants to try."""


SUBJECTS = (
    Subject(
        name="planner",
        modules=("compiler/planner",),
        tests=("planner",),
        sample=120,
    ),
    Subject(
        name="treatments",
        modules=("treatments.py",),
        tests=("ground/test_treatments.py", "graph/test_new_treatment.py"),
        sample=8,
    ),
    Subject(
        name="specialisation",
        modules=("compiler/graph/specialise.py",),
        tests=(
            "graph/test_gated_graph.py",
            "graph/test_law_of_guidance.py",
            "graph/test_new_treatment.py",
            "graph/test_slicing.py",
        ),
        sample=80,
    ),
    Subject(
        name="batcher",
        modules=("runtime/batching",),
        tests=(
            "batching",
            "compiler/test_ladder.py::test_the_largest_call_is_the_smallest_one_that_saves_nearly_all",
            "compiler/test_ladder.py::test_engines_that_take_little_time_give_no_seats",
        ),
        sample=120,
    ),
)
