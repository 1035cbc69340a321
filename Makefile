# make demo | test | lint | bench | clean      each sets up .venv by itself on first use; needs Python 3.11 or newer

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export OMP_WAIT_POLICY := PASSIVE

# The first Python that is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
OUT ?= runs/demo

.PHONY: demo test slow lint bench clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/efface erase cat --keep dog,tiger --method ap --images quick --out $(OUT) --force
	@echo "report: $(OUT)/report.html"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/efface erase cat --keep dog,tiger --method ap --images full --out runs/bench --force

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find . -path ./node_modules -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@
