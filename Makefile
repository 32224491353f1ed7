# The two commands for newcomers are `make demo` and `make test`; both need only python3.11 and make.
# Each installs into .venv once; it installs again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread for every process: two test processes share two cores, and results do not depend on the machine.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-zoo check format clean

help:  ## show this list
	@sed -n 's/^\([a-z%-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | awk -F': ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) is not installed; try make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # older ones do not know --group
	$(BIN)/python -m pip install --constraint constraints.txt --editable . --group dev
	touch $@

install: $(INSTALLED)  ## install into .venv

demo: $(INSTALLED)  ## prune, prove and measure a small network on real data
	$(BIN)/deploypipe build --target cpu --algo thinet

# Continuous integration sets CI and takes its time; at the desk whole builds and slow converters are left out.
TESTS := $(if $(CI),not zoo,not slow and not zoo)

test: $(INSTALLED)  ## run the tests, in about three minutes on two cores (all of them where CI is set, as in test-all)
	$(ONE_THREAD) $(BIN)/pytest -m "$(TESTS)" -n 2 --dist worksteal -q

test-all:  ## run them with whole builds and slow converters, in about six minutes
	$(MAKE) test CI=1

test-zoo: $(INSTALLED)  ## run the slow tests over the torchvision zoo
	$(BIN)/pytest -m zoo -q

bench-%: $(INSTALLED) benchmarks/%.py  ## run benchmarks/NAME.py; its table goes to benchmarks/results
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	$(BIN)/python benchmarks/$*.py

check: $(INSTALLED)  ## ruff, format, mypy, import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what make and the tools made; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
