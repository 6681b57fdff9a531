# env, demo and test are the promise to a newcomer: Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one process a core, each with one thread: threads of several processes get in each other's way
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help env demo test lint types check test-gpu synthetics clean

help:
	@echo "make env         the environment in .venv, dependencies pinned by constraints.txt"
	@echo "make demo        train a small hybrid on TinyShakespeare on this CPU, in five minutes"
	@echo "make test        lint, types and the whole test suite"
	@echo "make test-gpu    the tests that need a CUDA device, in the python at hand"
	@echo "make synthetics  what H3 can recall and S4D cannot, on this CPU, in about three minutes"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== making $(VENV) with pinned dependencies"
	@$(PYTHON) -c 'import sys; sys.exit("h3lm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)
	@echo "== $(VENV) is ready: $(BIN)/h3lm --help"

demo: env
	@echo "== training the demo, see runs/demo"
	@$(BIN)/h3lm train demo

test: env lint types check

lint: env
	@echo "== ruff"
	@$(BIN)/ruff format --check src tests
	@$(BIN)/ruff check src tests

types: env
	@echo "== mypy"
	@$(BIN)/mypy

check: env
	@echo "== pytest"
	@$(PYTEST)
	@echo "== pytest, shapes and dtypes of every call checked"
	@$(PYTEST) tests/ssm tests/layers tests/flashconv -k "not mistake" \
	  --jaxtyping-packages=h3lm.ssm,h3lm.flashconv,h3lm.layers,beartype.beartype
	@echo "== examples in docstrings"
	@$(BIN)/python -m pytest --doctest-modules src/h3lm/flashconv/op.py src/h3lm/data/tokenizers.py

test-gpu:
	@PYTHONPATH=src $(PYTHON) -m pytest -m gpu

synthetics: env
	@$(BIN)/h3lm synthetics --short

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
