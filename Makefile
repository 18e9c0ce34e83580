# `make demo` and `make test` do all the set-up: a system python3 (3.11 or newer) and make are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PYTEST := python -m pytest -n auto --dist worksteal

.PHONY: demo test test-long test-oldest test-engines lint clean

demo: $(READY)
	$(BIN)/python examples/demo.py --out demo

test: $(READY) lint
	$(BIN)/$(PYTEST) -m "not long"

# The long property runs that `make test` leaves out.
test-long: $(READY)
	$(BIN)/$(PYTEST) -m long

# The oldest transformers that is supported, on the tests that touch it.
test-oldest: $(READY)
	$(PYTHON) -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/oldest/bin/python -m pip install --quiet --editable ".[test]" "transformers==5.17.0"
	$(VENV)/oldest/bin/$(PYTEST) tests/models tests/exporting tests/evals/test_evidence.py

# The engines' own code beside our rules: wheels without their dependencies, a few modules of each.
test-engines: $(READY)
	$(BIN)/python tests/engines_real/fetch.py build/engines
	$(BIN)/$(PYTEST) tests/engines_real

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
