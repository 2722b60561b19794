# `make demo` and `make test` work on a bare machine with Python 3.11 or 3.12, pip and make.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A worker for each core, of one thread; one that is done takes tests from the others.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
BASELINES := mobilenetv2_100 resnet18 resnet50 resnet101 resnext50_32x4d regnetx_006 regnetx_016 regnety_006 efficientnet_b0

.PHONY: demo test test-slow check costs format clean

demo: $(STAMP)  ## train the default DG-Net on handwritten digits
	$(BIN)/dgnet train

test: $(STAMP)  ## format, lint and type checks, then the tests but for the slow ones
	$(MAKE) check
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(STAMP)  ## the slow tests (runs killed again and again, several nodes, exports, compilation), and properties at length
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or hypothesis" --hypothesis-profile thorough

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A network's cost is recorded once; the tests recount it, and the README's table is printed from it.
costs: $(STAMP)  ## record the cost of every network in docs/costs.json
	$(BIN)/dgnet cost $$($(BIN)/dgnet models) $(BASELINES) --json > docs/costs.json

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp is written last: a set-up that was interrupted starts again.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dgnet needs Python 3.11 or 3.12; name one with: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
