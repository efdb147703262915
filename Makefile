# The two commands: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install quickstart test lint bench parity chaos accuracy gpu canary clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/packhorse quickstart

lint: install
	$(BIN)/ruff format --check src tests launch benchmarks tools
	$(BIN)/ruff check src tests launch benchmarks tools
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_architecture.py

test: lint
	$(BIN)/pytest tests

bench: install
	$(BIN)/python benchmarks/step_loop.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/saving.py

# Every method under every engine: some two hundred launches of ten seconds and more; the table goes to docs/lab-log.md.
parity: install
	$(BIN)/python benchmarks/parity.py

# Two hundred kills and twenty minutes of all kinds of faults, about an hour; the table goes to docs/lab-log.md.
chaos: install
	$(BIN)/python benchmarks/chaos.py

# How right `packhorse plan` is: beside published speeds and beside what ranks on this CPU hold; to docs/lab-log.md.
accuracy: install
	$(BIN)/python benchmarks/plan_accuracy.py

# On a machine with a GPU of 24 GB or more: the plan's memory beside the peak of CUDA's allocator; rows for docs/lab-log.md.
gpu: install
	$(BIN)/python benchmarks/plan_accuracy.py --no-write gpu

# The newest releases of the libraries whose private names are used (src/packhorse/library_hooks.toml).
canary: install
	$(BIN)/python tools/canary.py $(CANARY)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
