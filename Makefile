# `make demo` and `make test` set up what they need; a second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format clean fuzz gpu-test

demo: $(READY)  ## a real vision encoder, compressed at every depth of the paper, on a real photo
	$(BIN)/laco bench vec --out demo

test: $(READY)
	$(BIN)/pytest

fuzz: $(READY)  ## the kernels on 10,000 random shapes, interpreted where there is no GPU
	$(BIN)/pytest tests/kernels -k anywhere --hypothesis-profile=fuzz

gpu-test: $(READY)  ## what only a GPU can show, and the kernels' tests compiled
	$(BIN)/pytest tests/gpu tests/kernels

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "PYTHON: got '$(PYTHON)' ($$($(PYTHON) --version 2>&1)), expected Python 3.10 to 3.13." \
	       "Pass another one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "VENV: got no virtual environment with pip, expected python3 with venv." \
	       "On Debian and Ubuntu: apt-get install python3-venv, then the same command again." >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
