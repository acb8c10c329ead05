# One command each. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV ?= .venv
JAX ?= newest
EXTRAS ?= dev
OLDEST_JAX := 0.11.2
OLDEST_PYTHON := 3.12
OLDEST_VENV := .venv-oldest
PYTEST_ARGS ?=

# Most of a test's time is one thread tracing and compiling, so a worker for each of two cores.
PYTEST = -m pytest -n 2 --dist worksteal
# On the oldest jax: what could break with its version. Geometry, tiles, messages and reports are numpy and Python.
CORE_TESTS = $(addprefix tests/,xla_test.py reference_test.py vjp_test.py sharding_test.py slab_test.py flax_test.py merge_test.py)

.PHONY: help setup lint type test test-newest test-oldest test-kernels test-all gpu demo bench wheel format clean

help: ## this list
	@echo "gna_jax: make TARGET"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'
	@echo
	@echo "  JAX=$(OLDEST_JAX) make setup                  pins jax; default: the newest"
	@echo "  PYTHON=/path/to/python make setup        names the interpreter (>= 3.12); default: .ci/find-python"
	@echo "  PYTEST_ARGS='-k vmap -x' make test-newest  passes arguments to pytest"

setup: ## make .venv, or bring it up to date
	@.ci/setup $(VENV) $(EXTRAS) $(JAX)

format: setup ## format the code and apply ruff's safe fixes
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

lint: setup ## ruff: rules and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

type: setup ## pyright over the three packages
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

test: ## everything CI runs: set-up from nothing, lint, types, tests on the newest and on the oldest jax
	@rm -rf build/times
	@.ci/timed "whole" 720 $(MAKE) test-parts
	@.ci/timed
	@tail -n 1 build/pytest-newest.log
	@tail -n 1 build/pytest-oldest.log

.PHONY: test-parts
test-parts:
	@.ci/timed "set-up" 90 $(MAKE) setup
	@.ci/timed "lint" 20 $(MAKE) lint
	@.ci/timed "types" 30 $(MAKE) type
	@.ci/timed "tests, newest jax" 480 $(MAKE) test-newest
	@.ci/timed "tests, oldest jax" 240 $(MAKE) test-oldest

test-newest: setup ## the tests on the newest jax
	@mkdir -p build
	@$(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS) | tee build/pytest-newest.log

test-oldest: ## the core's tests on the oldest jax and Python, in .venv-oldest
	@.ci/setup $(OLDEST_VENV) test $(OLDEST_JAX) $(OLDEST_PYTHON)
	@mkdir -p build
	@GNA_JAX_TEST_UNOPTIMISED=1 $(OLDEST_VENV)/bin/python $(PYTEST) $(CORE_TESTS) $(PYTEST_ARGS) | tee build/pytest-oldest.log

test-kernels: setup ## GPU kernels without a GPU: values in jax's interpreter, resources from the compiler
	@mkdir -p build
	@.ci/timed "kernels, newest jax" 1080 $(MAKE) test-kernels-parts
	@.ci/timed
	@tail -n 1 build/pytest-kernels.log

# jax's compiler for CUDA without CUDA: two of its wheels, and ptxas from a third where the machine has none.
.PHONY: test-kernels-parts
test-kernels-parts: setup
	@version=$$($(VENV)/bin/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	  wheels="jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version"; \
	  if ! command -v ptxas >/dev/null; then wheels="$$wheels nvidia-cuda-nvcc"; fi; \
	  $(VENV)/bin/python -m pip install --quiet --no-deps $$wheels
	@$(VENV)/bin/python $(PYTEST) -m "kernel and not slow" $(PYTEST_ARGS) | tee build/pytest-kernels.log

test-all: setup ## the tests, those of the GPU kernels and those marked slow: an hour or two
	@$(VENV)/bin/python $(PYTEST) -m "not gpu" $(PYTEST_ARGS)

gpu: ## the tests marked gpu, on this machine's GPU
	@$(MAKE) setup EXTRAS=dev,cuda13
	@GNA_JAX_TEST_GPU=1 $(VENV)/bin/python -m pytest -m gpu $(PYTEST_ARGS) || { \
	  status=$$?; \
	  if [ $$status -ne 5 ]; then exit $$status; fi; \
	  echo "No test is marked gpu: this version has no GPU kernel, so there is nothing to verify on a GPU."; }

demo: ## train on 5,000 real digits (about two minutes), pictures in demo/, gna against dense attention
	@.ci/setup $(VENV) examples $(JAX)
	@$(VENV)/bin/python examples/train_digits.py $(DEMO_ARGS)

bench: setup ## the speed and memory table of this machine's CPU
	@$(VENV)/bin/python benchmarks/cpu.py $(BENCH_ARGS)

wheel: setup ## the pure wheel, in dist/
	@$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## remove environments, builds and caches
	@rm -rf .venv .venv-oldest build dist demo .hypothesis .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
