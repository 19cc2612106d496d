# make demo      set up, train the default run on real handwritten digits, compare policies, print the table
# make test      set up and run the fast tests            make test-all  these and the slow ones
# make check     lint, format, types                      make gpu       GPU tests and a short benchmark
# make test-diffusers   the tests of pipelines against another release of diffusers (DIFFUSERS=0.41.0)
# make clean     remove what builds and tests leave (runs and the environment stay)
#
# PYTHON=python3.12 chooses the interpreter of a new environment (3.11 to 3.13).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
# Errors are told in one line; a traceback is asked for with GEARSHIFT_DEBUG=1.
unexport HYDRA_FULL_ERROR

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all test-diffusers check gpu clean

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	"gearshift needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d; say make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	@# The variable pins what builds the package too, which -c alone does not reach.
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,slurm]'
	@touch $@

# Standard output ends with the JSON line of `evaluate`; progress goes to standard error.
demo: setup
	@answer="$$($(BIN)/gearshift train experiment=digits | tail -n 1)"; \
	run="$$(printf '%s' "$$answer" | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["run"])')"; \
	$(BIN)/gearshift evaluate run="$$run" evaluation=demo

test: setup
	$(BIN)/python -m pytest

# TESTED=1 leaves out the fast tests where `make test` has just run.
test-all: $(if $(TESTED),setup,test)
	$(BIN)/python -m pytest -m "slow and not gpu"

# In a folder of its own, so that the environment stays as it is.
DIFFUSERS ?= 0.41.0
test-diffusers: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target .venv/diffusers-$(DIFFUSERS) diffusers==$(DIFFUSERS)
	PYTHONPATH=.venv/diffusers-$(DIFFUSERS) $(BIN)/python -m pytest tests/integrations

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu needs a CUDA device")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/gearshift bench device=cuda

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +
