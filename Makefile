# `make demo` and `make test` set up what they need; a second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PY ?= $(BIN)/python
GPU_JOBS ?= 8  # processes that share a GPU in its tests: most of their time goes to compiling
JOBS ?= 2  # processes that tests run in, a file's in one of them, as what a file prepares is prepared once
OLDEST := torch==2.11.0 triton==3.6.0  # the oldest versions supported
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

.PHONY: demo train-demo test lint format clean fuzz gpu faults gpu-test gpu-sanitize test-oldest test-wheel resources

demo: $(READY)  ## a real vision encoder, compressed at every depth of the paper, on a real photo
	$(BIN)/laco bench vec --out demo

train-demo: $(READY)  ## a tiny multimodal LLM, trained in LaCo's stages and asked held-out questions; in ten minutes, on two cores
	$(BIN)/laco train-demo --out train-demo

test: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist loadfile

test-oldest: .venv-oldest/.ready  ## operators and kernels with the oldest torch and Triton, in an environment of its own
	$(<D)/bin/pytest tests/ops tests/kernels -n $(JOBS) --dist loadfile --hypothesis-profile=brief

test-wheel: $(READY)  ## a wheel built in isolation from the source distribution: complete, compiled in ten minutes, importable
	$(BIN)/pytest tests/csrc/wheel.py

fuzz: $(READY)  ## the kernels on 10,000 random shapes, interpreted where there is no GPU; keeps the statistics
	$(BIN)/laco env | sed '/^$$/,$$d' > fuzz.log
	$(BIN)/pytest tests/kernels -k anywhere --hypothesis-profile=fuzz -n $(JOBS) -q --hypothesis-show-statistics | tee -a fuzz.log
	mv fuzz.log benchmarks/results/fuzz.txt

faults: $(READY)  ## every kernel broken on purpose, one fault at a time; each must turn a test red
	$(BIN)/python -m tests.faults

resources: $(READY)  ## registers and shared memory of every kernel, compiled ahead of time
	$(BIN)/python -m laco_kernels.bench.resources > resources.part
	mv resources.part benchmarks/results/kernel-resources.json
	$(BIN)/python -m laco_kernels.bench.cuda_resources > resources.part
	mv resources.part benchmarks/results/cuda-kernel-resources.json

gpu: $(READY)  ## everything a newly available GPU should do, in nine minutes: tests, measurements, selection table
	$(PY) benchmarks/gpu.py $(GPU)

gpu-test: $(READY)  ## what only a GPU can show, and the kernels' tests compiled
	$(BIN)/pytest tests/gpu tests/kernels -k "not resources" -n $(GPU_JOBS) --hypothesis-profile=gpu

gpu-sanitize: $(READY)  ## compute-sanitizer on the CUDA kernels; minutes
	$(BIN)/pytest tests/gpu/sanitize.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "PYTHON: got '$(PYTHON)' ($$($(PYTHON) --version 2>&1)), expected Python 3.10 to 3.13." \
	       "Pass another one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "VENV: got no virtual environment with pip, expected python3 with venv." \
	       "On Debian and Ubuntu: apt-get install python3-venv, then the same command again." >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

# NumPy 2.4 refuses what that Triton's interpreter does.
.venv-oldest/.ready: pyproject.toml setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(@D)
	LACO_BUILD_CUDA=0 $(@D)/bin/python -m pip install --quiet --constraint <(grep -v -e '^torch' -e '^triton' -e '^numpy' constraints.txt) \
	  --editable . $(OLDEST) 'numpy<2.4' pytest pytest-xdist hypothesis pybind11
	@touch $@
