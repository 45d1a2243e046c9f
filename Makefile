# `make demo` and `make test` are all a fresh clone needs: Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# MLX comes from its CPU build on Linux; on a Mac the mlx package has Metal.
CPU := $(if $(filter Linux,$(shell uname -s)),cpu)
comma := ,
# A test's processes read what is compiled; compiling it again is 2 seconds for each that
# checks shapes. Empty: not set, whatever the caller's environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint compiled test-slow test-oracle fuzz fault soak clean

demo: $(VENV)/.demo
	@$(BIN)/python -m mlx_ep.launch -n 2 -- \
	    mlx_ep.generate --ranks 2 --prompt "What is spaghetti code?" </dev/null

test: $(VENV)/.test
	@$(MAKE) --no-print-directory --jobs 2 lint compiled
	$(BIN)/python -m pytest -q -n 3 --dist worksteal -m "not slow and not oracle"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Beside the types, which keep one core busy: else all three processes of the tests compile
# all tests at once. What it finds wrong, the tests say.
compiled: $(VENV)/.test
	-@$(BIN)/python -m pytest -qq --collect-only >/dev/null 2>&1

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 3 --dist worksteal -m "slow and not oracle"

# Logits against transformers. It installs PyTorch, whose CPU build is enough: to save
# the larger download, install that one into .venv before.
test-oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest -q -m oracle

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.support.fuzz_exchange
	$(BIN)/python -m tests.support.fuzz_checkpoints

# Every way for a rank to fail, at every point of a run; over half an hour. After an
# interruption: make fault FAULT=--resume (on the same commit).
fault: $(VENV)/.test
	$(BIN)/python -m tests.support.fault --write docs/reliability.md $(FAULT)

# 30 minutes of answers on 2 ranks: tokens right, memory flat.
soak: $(VENV)/.test
	$(BIN)/python -m tests.support.soak

clean:
	rm -rf $(VENV) dist build

$(VENV)/.demo: pyproject.toml
	$(call install,$(CPU))

$(VENV)/.test: pyproject.toml
	$(call install,$(if $(CPU),$(CPU)$(comma))dev$(comma)mpi)
	@touch $(VENV)/.demo

$(VENV)/.oracle: pyproject.toml
	$(call install,$(if $(CPU),$(CPU)$(comma))dev$(comma)mpi$(comma)oracle)
	@touch $(VENV)/.demo $(VENV)/.test

# Python compiles what it imports, a small part of what is installed.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mlx_ep needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".$(if $(1),[$(1)])"
	@touch $@
endef
