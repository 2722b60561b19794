# `make demo` and `make test` work on a bare machine with Python 3.11 to 3.14, pip and make.
# PYTHON is the newest of these that runs and has venv and pip. (A name may be a shim for a version that is not active.)
CHECK_PYTHON := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(CHECK_PYTHON)' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# `make test-oldest` tests the lowest versions that pyproject.toml allows, with the lowest Python.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.11
# `make test-newest` tests the newest versions, which constraints.txt may not have yet.
NEWEST := .venv-newest
NEWEST_PYTHON ?= $(PYTHON)
# `make test-tools` tests what docs/tools.md shows, with other people's tools.
TOOLS := .venv-tools
# One worker of one thread for each core; an idle worker takes tests from the others.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
# Many slow tests wait for a compiler or another process: one worker more.
PARALLEL_SLOW := -n $(shell '$(PYTHON)' -c 'import os; print(min(os.cpu_count() or 1, 8) + 1)' 2>/dev/null || echo 2) --dist worksteal
BASELINES := mobilenetv2_100 resnet18 resnet50 resnet101 resnext50_32x4d regnetx_006 regnetx_016 regnety_006 efficientnet_b0

.PHONY: demo test test-slow test-oldest test-newest test-tools fuzz check docs tables costs bench-check format clean

demo: $(STAMP)  ## train the default DG-Net on handwritten digits to half of its cost, and show what it does
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## format, lint and type checks, then the tests, except the slow ones
	$(MAKE) check
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(STAMP)  ## the slow tests (killed and resumed runs, several nodes, exports, compilation), and properties with more examples
	$(BIN)/python -m pytest $(PARALLEL_SLOW) -m "slow or hypothesis" --hypothesis-profile thorough --durations 40

INPUTS ?= 1000
fuzz: $(STAMP)  ## random inputs of all kinds; those that are answered badly are kept in tests/fuzz/found/new (SEED=, INPUTS=, KEEP=)
	$(BIN)/python -m tests.fuzz.campaign --inputs $(INPUTS) $(if $(SEED),--seed $(SEED)) $(if $(KEEP),--keep $(KEEP))

# Old versions may give other warnings, so warnings are not errors here.
test-oldest: $(OLDEST)/.installed  ## the tests, except the slow ones, with the lowest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -m "not slow" -W default --disable-warnings

test-newest: $(NEWEST)/.installed  ## the same with the newest versions that exist
	$(NEWEST)/bin/python -m pytest $(PARALLEL) -m "not slow" -W default --disable-warnings

test-tools: $(TOOLS)/.installed  ## the code of docs/tools.md, with the tools that it is about
	DGNET_TEST_TOOLS=1 $(TOOLS)/bin/python -m pytest $(PARALLEL) tests/tools

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without --quiet: it silences the warnings that --strict counts.
docs: $(STAMP)  ## the documentation site in site/, which opens from disk; broken links and references are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A test compares the pages with the rows.
tables: $(STAMP)  ## write the tables of the documentation from the committed rows of experiments, benchmarks and costs
	$(BIN)/python docs/tables.py

# The cost of every network is recorded, for the detection backbones also at 800×1333; the tests recount it.
costs: $(STAMP)  ## record the cost of every network in docs/costs*.json
	$(BIN)/dgnet cost $$($(BIN)/dgnet models) $(BASELINES) --json > docs/costs.json
	$(BIN)/dgnet cost --table 2 --json > docs/costs_detection.json
	$(MAKE) tables

bench-check: $(STAMP)  ## a few ratios of speed and memory against benchmarks/baseline.json, on a machine that does nothing else
	$(BIN)/python benchmarks/gate.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp is written last, so that an interrupted set-up is repeated.
$(STAMP): pyproject.toml constraints.txt
	@{ '$(PYTHON)' -c '$(CHECK_PYTHON)'; } 2>/dev/null || { echo "dgnet needs Python 3.11 to 3.14 with venv and pip"\
		"(Debian: apt install python3-venv), got: $(or $(PYTHON),none). Name one with: make PYTHON=/path/to/python3.13" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	grep -oE '"[A-Za-z-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

$(NEWEST)/.installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	touch $@

$(TOOLS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tools]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(TOOLS) site .mypy_cache .ruff_cache .pytest_cache
