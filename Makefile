# make quickstart: the whole way on generated videos.   make test: everything that runs without a GPU.
# Each target makes .venv when it is missing or out of date; nothing else has to be installed.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install quickstart sweep test test-unit check format clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "making .venv (the first time this downloads some 5 GB and takes minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/python -m jobs.quickstart

sweep: $(READY)
	$(BIN)/python -m jobs.sweep

test: $(READY)
	$(BIN)/python -m pytest -m "not gpu and not weights" --durations=15

test-unit: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info
