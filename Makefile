.PHONY: install check test nightly rtx bench docs build

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

rtx:
	python -m pip install -e ".[rtx]"
	python -m pytest -q -m rtx --require-rtx

bench:
	set -e; for question in benchmarks/bench_*.py; do python "$$question"; done

docs:
	python -m sphinx --fail-on-warning --keep-going --fresh-env docs dist/docs

build:
	python -m pip wheel --no-deps --wheel-dir dist .
