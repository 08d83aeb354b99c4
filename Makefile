# Two commands matter to a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-ray lint format clean

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F':.*?## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch first and by itself: any other order lets pip pick a CUDA build of several gigabytes.
$(RUNS): pyproject.toml setup.py $(wildcard fdconv_deploy/ops/native/source/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[cpu,export,serve]'
	@touch $@

# Compilers, browsers' drivers and clients that only tests need: the demo does without.
$(STAMP): $(RUNS)
	$(PIP) -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## Make .venv with everything development needs

demo: $(RUNS)  ## Export, verify, measure and serve the packaged checkpoint
	$(BIN)/fdconv demo --output demo-output

test: $(STAMP)  ## Run the test suite (no GPU, no network)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP)  ## Run the full-size networks too
	$(BIN)/python -m pytest -m "not gpu"

# Apart from the others: Ray takes 600 MB, and a cluster half a minute to start.
test-ray: $(STAMP)  ## Run the tests that start a Ray cluster
	$(PIP) -r tests/serve/ray/requirements.txt
	$(BIN)/python -m pytest tests/serve/ray tests/cli/test_segment_ray.py

# A type checker must see the folders `export` and `serve` where they are imported from.
LINKS := $(VENV)/links/fdconv_deploy
lint: $(STAMP)  ## ruff and mypy
	rm -rf $(LINKS) && mkdir -p $(LINKS)
	for entry in fdconv_deploy/* export serve; do ln -s "../../../$$entry" $(LINKS)/; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the source as ruff would
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was made
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
