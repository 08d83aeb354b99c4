# Two commands matter to a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format clean

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F':.*?## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch first and by itself: any other order lets pip pick a CUDA build of several gigabytes.
$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## Make .venv with everything development needs

demo: $(STAMP)  ## Export, verify, measure and serve the packaged checkpoint
	$(BIN)/fdconv demo --output demo-output

test: $(STAMP)  ## Run the test suite (no GPU, no network)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP)  ## Run the full-size networks too
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the source as ruff would
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was made
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
