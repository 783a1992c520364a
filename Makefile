# Everything runs inside .venv, made from requirements.lock (GPU=1: requirements-gpu.lock): exact versions, checked by
# hash, and complete, so that pip has nothing to resolve (--no-deps).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VARIANT := $(if $(GPU),-gpu)
# A file's tests stay in one process, which has its networks and fixtures already; each process may take 3 GB. The order
# is that of tests/conftest.py.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Needs a GPU; what other benchmarks share.
NO_BENCH := gpu scratch stand_in
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup run repro test check bench lock clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/ready$(VARIANT) ## make .venv from the hash-locked requirements; GPU=1 adds CUDA's libraries

$(VENV)/ready$(VARIANT): requirements$(VARIANT).lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements$(VARIANT).lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

run: setup ## the main job on the embedded digits: train, judge, promote, predict a folder
	$(BIN)/nightly retrain --predict data/prepared/examples

repro: setup ## dvc repro: rebuild what an edit made stale, nothing else
	$(BIN)/dvc repro

test: setup ## lint, import contracts and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pytest $(PARALLEL)

check: setup ## the fast part of `make test`, for while you type
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pytest $(PARALLEL) -m "not slow"

bench: setup ## the benchmarks behind the README's table; gpu.py, which needs a GPU, is run by itself
	for script in $(filter-out $(NO_BENCH:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

lock: ## resolve pyproject.toml anew into both lock files (needs uv)
	for extra in "" gpu; do \
		uv pip compile pyproject.toml --extra dev $${extra:+--extra $$extra} --universal --python-version 3.11 \
			--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
			--output-file requirements$${extra:+-$$extra}.lock || exit 1; \
	done

clean: ## remove the virtual environment and caches; data and models stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
