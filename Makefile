# Every target sets itself up: a virtual environment, the tested versions, then the work.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install demo test lint docs table scale-test kill-test soak fuzz audit clean

help:
	@echo "make install the tested versions into $(VENV), nothing else (some minutes)"
	@echo "make demo    distil the embedded miniature and compare (about 5 minutes on 2 cores)"
	@echo "make test    lint and all tests (about 17 minutes on 2 cores)"
	@echo "make docs    build the documentation site into build/site (some seconds)"
	@echo "make kill-test  kill runs at some forty moments, repeat the command, compare (about 15 minutes)"
	@echo "make soak    2,000 updates with every option on: does anything grow? (about an hour)"
	@echo "make scale-test  DDP, FSDP2, ZeRO-2 and ZeRO-3 with 2 and 4 processes against one (about 15 minutes)"
	@echo "make fuzz    throw thousands of malformed requests at a served teacher (some minutes)"
	@echo "make audit   look for known vulnerabilities in the pinned versions (needs a network)"
	@echo "make table   the full comparison of docs/results.md (hours)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Setting up $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install
	$(BIN)/oprd demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The variable keeps the theme from writing about its own future.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html, or serve it, with search: $(BIN)/python -m http.server --directory build/site"

table: install
	$(BIN)/python benchmarks/same_family_table.py

kill-test: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill_test.py

soak: install
	$(BIN)/python benchmarks/soak.py

scale-test: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[deepspeed]"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz --requests 5000

# In a virtual environment of its own: the auditor's packages are not ours to pin.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache runs
