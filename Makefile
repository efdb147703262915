# The two commands: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install quickstart test lint bench parity chaos accuracy gpu canary clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_WORDS) -c constraints.txt -e '.[dev,tasks]'
	touch $@

quickstart: install
	$(BIN)/packhorse quickstart

lint: install
	$(BIN)/ruff format --check src tests launch benchmarks tools
	$(BIN)/ruff check src tests launch benchmarks tools
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_architecture.py

# Lint and every test that this machine can run, in groups; `make test ONLY="lint slurm"` runs some of them.
test: install
	$(BIN)/python tests/run.py $(ONLY)

bench: install
	$(BIN)/python benchmarks/step_loop.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/checkpoint_scale.py
	$(BIN)/python benchmarks/verdicts.py

# Every method under every engine, 20 steps each, written to docs/lab-log.md. The curves of the hand-written loop are
# computed again and compared with the committed ones. Then the cells of other tests that `make test` does not run.
parity: install
	$(BIN)/python benchmarks/parity.py
	$(BIN)/pytest tests/unit tests/faults tests/soft_cuda -m matrix

# 200 kills and 20 minutes of all kinds of faults, about an hour, written to docs/lab-log.md. Then every kind of
# interruption in every phase of jobs on a real Slurm.
chaos: install
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/pytest tests/slurm -m chaos

# How right `packhorse plan` is: beside published speeds and beside what ranks on this CPU hold; to docs/lab-log.md.
accuracy: install
	$(BIN)/python benchmarks/plan_accuracy.py

# On a machine with a GPU: everything that only a GPU can show, in at most 8 minutes, to gpu-report.md (docs/gpu.md).
gpu: install
	$(BIN)/python benchmarks/gpu $(GPU)

# The newest releases of the libraries whose private names are used (src/packhorse/library_hooks.toml).
canary: install
	$(BIN)/python tools/canary.py $(CANARY)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
