# Every target sets itself up: a virtual environment, the tested versions, then the work.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install demo test lint table kill-test fuzz clean

help:
	@echo "make demo    distil the embedded miniature and compare (about 5 minutes on 2 cores)"
	@echo "make test    lint and all tests (about 12 minutes on 2 cores)"
	@echo "make kill-test  kill runs at some forty moments, repeat the command, compare (about 15 minutes)"
	@echo "make fuzz    throw thousands of malformed requests at a served teacher (some minutes)"
	@echo "make table   the full comparison of docs/results.md (hours)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install
	$(BIN)/oprd demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

table: install
	$(BIN)/python benchmarks/same_family_table.py

kill-test: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill_test.py

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz --requests 5000

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache runs
