# make quickstart: the whole way on generated videos.   make test: everything that runs without a GPU.
# make soak: random moments of kills and long matrices, until MINUTES=30 are over.
# make audit: known vulnerabilities of the pinned dependencies.
# Each target makes .venv when it is missing or out of date; nothing else has to be installed.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MINUTES ?= 30
# Two processes, each of which takes whole files, since modules share what is slow to make. Files are
# taken in order: tests/e2e first, whose long tests would otherwise keep one process busy at the end.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install quickstart sweep test test-unit soak audit check format clean

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

# Both parts run and close with pytest's summary, and a failure of either is one of the whole.
test: $(READY)
	@failed=0; \
	$(PYTEST) --durations=10 || failed=1; \
	$(PYTEST) --durations=15 \
		-m "(ray or slow) and not soak and not gpu and not weights" || failed=1; \
	exit $$failed

test-unit: $(READY)
	$(PYTEST)

soak: $(READY)
	$(BIN)/python -m pytest -m "soak and not gpu and not weights" --minutes=$(MINUTES) --durations=15

audit: $(READY)
	$(BIN)/python .ci/audit constraints.txt

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info
