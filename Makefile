.PHONY: install check test nightly nightly-slice durations promises coverage mutants bounds audit rtx bench docs build \
	release

SLICE = auto

install:
	python -m pip install -e ".[dev]"

check:
	python -m ruff check
	python -m ruff format --check
	python -m mypy

test:
	python -m pytest -q -n 2

nightly:
	python -m pytest -q -n 2 -m nightly

nightly-slice:
	python -m pytest -q -n 2 -x -m nightly --nightly-slice $(SLICE)

durations:
	python -m pytest -q -p no:randomly -m nightly --write-durations tests/durations.json

promises:
	python -m tests.promises

coverage:
	python -m tests.coverage

mutants:
	python -m tests.mutants

bounds:
	python -m tests.house.bounds

audit:
	python -m tests.house.audit

rtx:
	python -m pip install -e ".[rtx]"
	python -m pytest -q -m rtx --require-rtx

bench:
	set -e; for question in benchmarks/bench_*.py; do python "$$question"; done

docs:
	python -m sphinx --fail-on-warning --keep-going --fresh-env docs dist/docs

build:
	python -m pip wheel --no-deps --wheel-dir dist .

release:
	python -m tests.house.release
