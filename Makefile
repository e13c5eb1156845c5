# Every target makes its own .venv from nothing; what is up to date is not done again.
#   make demo   the guided tour, with modeprobe-tour.html
#   make test   lint and every test that this machine allows
#   make lint   ruff, mypy, clang-format, the wall test
#   make bench  benchmarks against peers (QUICK=1 for a short run, PUBLISH=1 to refresh README.md and docs/)
#   make kernels  registers, vector accesses and instructions of every GPU kernel, from the compilers
#   make gpu    on a machine with an NVIDIA GPU, offline: build, test, measure, sanitize, profile (STEPS=tests,bench
#               TOTAL=seconds ARCHIVE=results.tar.gz; STEPS=build ARCH=9.0 builds ahead, without that GPU)

PYTHON ?= python3
# The version that the tests were last run with; any torch from 2.10 on will do: make demo TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
export MPLBACKEND := Agg
# `make bench` ends within a quarter of an hour, the making of its environment included.
STARTED := $(shell date +%s)
# One process a core below: more threads than cores slow small tensors many times over.
test: export OMP_NUM_THREADS := 1

.PHONY: demo test lint bench kernels gpu clean

demo: $(VENV)/.demo
	$(BIN)/modeprobe tour

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -- '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/python -m pytest -q tests/test_walls.py

bench: $(VENV)/.bench
	left=$$(($(STARTED) + 870 - $$(date +%s))); \
	$(BIN)/modeprobe bench $(if $(QUICK),--quick --within 105,--within $$((left > 240 ? left : 240))) $(if $(PUBLISH),--publish)

kernels: $(VENV)/.test
	$(BIN)/python -m modeprobe.benchmarks.kernels

gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(STEPS),--steps $(STEPS)) $(if $(TOTAL),--total $(TOTAL)) \
		$(if $(ARCHIVE),--archive $(ARCHIVE)) $(if $(ARCH),--arch $(ARCH))

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "modeprobe needs Python 3.10 or later; name one with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making $(VENV) with $(TORCH); the first time takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" ninja wheel
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.extension: $(VENV)/.venv $(SOURCES)
	@echo "Compiling the kernels (CUDA kernels too where a toolkit is found)."
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.extension
	$(PIP) --no-build-isolation -e ".[tour]"
	@touch $@

$(VENV)/.bench: $(VENV)/.extension
	$(PIP) "matplotlib>=3.8"
	@touch $@

$(VENV)/.test: $(VENV)/.extension
	$(PIP) --no-build-isolation -e ".[test,lint]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .cache *.egg-info modeprobe/*.so
