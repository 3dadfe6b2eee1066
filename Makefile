# make setup       .venv with everything, editable        make test        the tests (minutes)
# make assets      real models and data into .assets/     make test-slow   the long ones
# make quickstart  fine-tune, export, use: the main job   make check       ruff, mypy, layout
# make assets-more  what configs/ of further tasks need (npm for one)
# make mutants     take each guard out, see a test fail   make clean       .venv and caches
# make test-report  the report page in headless Chromium (which must be installed)
# make kernels-aot compile every Triton kernel for GPUs (none needed); registers, spills, instructions
.PHONY: help setup assets assets-more quickstart test test-slow test-report check mutants kernels-aot clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && { echo "$$p"; break; }; done)

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
CONFIG := configs/quickstart.yaml
RUN := runs/quickstart
PYTEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2

help:
	@sed -n '1,/^\.PHONY/s/^# //p' Makefile

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer was found. Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { \
		echo "PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1); peft-engine needs Python 3.11 or newer." >&2; exit 2; }
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV) && $(BIN)/python -m pip --version >/dev/null || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' can't make an environment with pip. Install the venv module" \
			"(Debian, Ubuntu: apt install python3-venv) and run make setup again." >&2; exit 2; }

# torch first and alone: whatever build is chosen for this machine, nothing later replaces it
$(VENV)/.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): some minutes the first time, most of it torch."
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[dev,gguf]'
	@touch $@

setup: $(VENV)/.stamp

assets: setup
	@$(BIN)/python benchmarks/assets.py

assets-more: setup
	@$(BIN)/python benchmarks/assets.py --more

quickstart: assets
	$(BIN)/peft-engine train $(CONFIG) --overwrite
	$(BIN)/peft-engine export $(RUN)
	@echo "area man wins argument with his own reflection" > $(RUN)/one.txt
	$(BIN)/peft-engine predict $(RUN) --input $(RUN)/one.txt

# tests/kernels runs in a process of its own: Triton's interpreter must be on before triton is imported
test: assets
	$(PYTEST) -n $(WORKERS) -q -m 'not slow' --ignore=tests/kernels --ignore=tests/report tests
	@if [ -d tests/kernels ]; then $(PYTEST) -q -m 'not slow' tests/kernels; fi

test-slow: assets
	$(PYTEST) -q -m slow --ignore=tests/kernels --ignore=tests/report tests

# Fails, rather than skips, where there is no Chromium
test-report: setup
	$(PYTEST) -q tests/report

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q tests/test_layout.py

mutants: assets
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/mutants.py

kernels-aot: setup
	$(BIN)/python benchmarks/kernels_aot.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
