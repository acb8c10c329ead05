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
TRITON_VENV := .venv-triton
PYTEST_ARGS ?=
BAZEL ?= bazel
BAZEL_ARGS ?=
# Of `make gpu`: a Python that has jax for CUDA and the test tools (default: one is set up), one with torch for CUDA, minutes,
# seconds for building the CUDA library where there is none.
GPU_PYTHON ?=
TORCH_PYTHON ?=
GPU_MINUTES ?= 9
GPU_BUILD_SECONDS ?= 180

# Most of a test's time is one thread tracing and compiling, so a worker for each of two cores.
PYTEST = -m pytest -n 2 --dist worksteal
# On the oldest jax: what could break with its version. Geometry, tiles, messages and reports are numpy and Python.
CORE_TESTS = $(addprefix tests/,xla_test.py reference_test.py vjp_test.py sharding_test.py flax_test.py)
CORE_CHOICE = -k "not (explicit_tiles or several_steps or head_dims)"
# What Triton compiles; the other Triton tests are of values, in its interpreter.
TRITON_COMPILED = tests/triton_resources_test.py tests/triton_sharding_test.py
TRITON_VALUES = $(filter-out $(TRITON_COMPILED) tests/triton_test.py,$(wildcard tests/triton_*_test.py))

.PHONY: help setup lint type test test-newest test-oldest test-kernels test-triton test-all bazel-test gpu gpu-library demo bench wheel format clean

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
	@GNA_JAX_TEST_UNOPTIMISED=1 $(OLDEST_VENV)/bin/python $(PYTEST) $(CORE_TESTS) $(CORE_CHOICE) $(PYTEST_ARGS) | tee build/pytest-oldest.log

test-kernels: setup ## GPU kernels without a GPU: values in jax's interpreter, resources from the compiler
	@mkdir -p build
	@.ci/timed "kernels, newest jax" 1080 $(MAKE) test-kernels-parts
	@.ci/timed
	@tail -n 1 build/pytest-kernels.log

# jax's compiler for CUDA without CUDA: two of its wheels. CUTLASS' headers, a disassembler, and nvcc where the machine has none.
.PHONY: test-kernels-parts
test-kernels-parts: setup
	@version=$$($(VENV)/bin/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	  wheels="jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version"; \
	  wheels="$$wheels nvidia-cutlass==4.2.0.0 nvidia-cuda-nvdisasm"; \
	  if ! command -v nvcc >/dev/null; then \
	    wheels="$$wheels nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"; \
	  fi; \
	  $(VENV)/bin/python -m pip install --quiet --no-deps $$wheels
	@$(VENV)/bin/python $(PYTEST) -m "kernel and not slow" $(PYTEST_ARGS) | tee build/pytest-kernels.log

# Triton interprets in one process and compiles in the other: it decides at its import. jax's compiler for CUDA is in two of its wheels.
test-triton: ## Triton kernels without a GPU: values in Triton's interpreter, then compiled; in .venv-triton (2 GB)
	@mkdir -p build
	@.ci/timed "Triton kernels" 240 $(MAKE) test-triton-parts TRITON_CHOICE="triton and not slow"
	@.ci/timed
	@tail -qn 1 build/pytest-triton-values.log build/pytest-triton-compiled.log

.PHONY: test-triton-parts
test-triton-parts:
	@.ci/setup $(TRITON_VENV) test,triton $(JAX)
	@version=$$($(TRITON_VENV)/bin/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	  $(TRITON_VENV)/bin/python -m pip install --quiet --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python $(PYTEST) -m "$(TRITON_CHOICE)" $(TRITON_VALUES) $(TRITON_REPORT:%=%-values.xml) $(PYTEST_ARGS) | tee build/pytest-triton-values.log
	@$(TRITON_VENV)/bin/python $(PYTEST) -m "$(TRITON_CHOICE)" $(TRITON_COMPILED) $(TRITON_REPORT:%=%-compiled.xml) $(PYTEST_ARGS) | tee build/pytest-triton-compiled.log

test-all: setup ## the tests, those of the GPU kernels and those marked slow: some hours; rewrites tests/all_results.md
	@mkdir -p build
	@rm -f build/all-*.xml; status=0; \
	$(VENV)/bin/python $(PYTEST) -m "not gpu and not triton" --junitxml=build/all-newest.xml $(PYTEST_ARGS) | tee build/pytest-all.log || status=$$?; \
	$(MAKE) test-triton-parts TRITON_CHOICE=triton TRITON_REPORT=--junitxml=build/all-triton || status=$$?; \
	$(VENV)/bin/python tests/all_results.py build/all-*.xml > tests/all_results.md; \
	exit $$status

RUN_BAZEL = PATH="$(abspath $(VENV))/bin:$$PATH" $(BAZEL) --output_user_root=$(CURDIR)/build/bazel

bazel-test: setup ## Bazel's view of the tree: its quick tests, without a network if Bazel is Debian's
	@if ! command -v $(BAZEL) >/dev/null; then \
	  echo "no Bazel: apt-get install bazel-bootstrap, or BAZEL=/path/to/bazel make bazel-test" >&2; exit 1; \
	fi; \
	status=0; $(RUN_BAZEL) test $(BAZEL_ARGS) //:quick || status=$$?; $(RUN_BAZEL) shutdown; exit $$status

# Parts go on after a failure: a GPU is rare, and what the next part says is worth having. All of it stays below GPU_MINUTES.
gpu: ## on this machine's GPU, in 9 minutes: the tests marked gpu, gna-jax selfcheck, the benchmark of published sizes
	@if [ -z "$(GPU_PYTHON)" ]; then $(MAKE) setup EXTRAS=dev,cuda13,cuda-build,triton; fi
	@GNA_JAX_TEST_GPU=1 $(MAKE) gpu-parts GPU_STARTED=$(shell date +%s) GPU_PYTHON=$(or $(GPU_PYTHON),$(VENV)/bin/python)

# cutlass takes part where its library can be loaded, or be built within GPU_BUILD_SECONDS; triton where it can be imported. Tests: at most
# a third of the time; what was found until then is told. One implementation: make gpu PYTEST_ARGS="-k triton".
.PHONY: gpu-parts
gpu-parts: export XLA_PYTHON_CLIENT_PREALLOCATE = false
gpu-parts: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-parts:
	@if ! $(GPU_PYTHON) -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then \
	  echo "jax sees no GPU here, so there is nothing to verify on one. Without a GPU: make test-kernels."; exit; \
	fi; \
	SECONDS=$$(($$(date +%s) - $(GPU_STARTED))); status=0; implementations=mosaic; mkdir -p build; \
	if timeout $(GPU_BUILD_SECONDS) $(GPU_PYTHON) -m gna_jax build-cuda && $(LOADS_CUDA_LIBRARY); then \
	  implementations=mosaic,cutlass; \
	else \
	  echo "without cutlass: no CUDA library, and none could be built in $(GPU_BUILD_SECONDS) s; going on with mosaic"; \
	fi; \
	if $(IMPORTS_TRITON); then implementations=$$implementations,triton; else echo "without triton; going on with $$implementations"; fi; \
	part=$$(((60 * $(GPU_MINUTES) - SECONDS) / 3)); workers=$$(($$(nproc) < 8 ? 4 : 8)); \
	GNA_JAX_TEST_IMPLEMENTATIONS=$$implementations timeout --foreground --signal=INT --kill-after=20 $$part \
	  $(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS) -n $$workers -o faulthandler_timeout=60 $(PYTEST_ARGS) || status=$$?; \
	timeout $$part $(GPU_PYTHON) -m gna_jax selfcheck --out build/selfcheck.md \
	  --minutes $$(awk "BEGIN {print ($$part - 15) / 60}") || status=$$?; \
	left=$$((60 * $(GPU_MINUTES) - 30 - SECONDS)); \
	timeout $$((left + 25)) $(GPU_PYTHON) benchmarks/attention.py --suite published --implementations $$implementations \
	  --minutes $$(awk "BEGIN {print $$left / 60}") $(if $(TORCH_PYTHON),--torch-python $(TORCH_PYTHON)) $(BENCH_ARGS) || status=$$?; \
	echo "make gpu: $$SECONDS s, status $$status"; \
	exit $$status

LOADS_CUDA_LIBRARY = $(GPU_PYTHON) -c 'from cuda_ffi import library; library.load()'
# Says in its last line why it cannot.
IMPORTS_TRITON = $(GPU_PYTHON) -c 'from gna_jax.backends.triton import toolchain; toolchain.check(is_interpreted=False)' 2>&1 | tail -n 1
# By name: a Python for the GPU alone need not have what other tests import.
GPU_TESTS = tests/gpu_kernels_test.py tests/gpu_triton_test.py tests/tuning_test.py

# A machine with a GPU may have no compiler and no network: what this leaves in the package's folder is ignored by git, and is where
# `GNA_JAX_CUDA=1 pip install .` puts it, by which it is made.
gpu-library: setup ## the CUDA library, built into cuda_ffi/: to be carried to a machine with a GPU
	@rm -rf build/cuda-wheel
	@GNA_JAX_CUDA=1 $(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/cuda-wheel .
	@$(VENV)/bin/python -m zipfile -e build/cuda-wheel/*.whl build/cuda-wheel/content
	@install -m 755 build/cuda-wheel/content/cuda_ffi/libgna_jax_cuda.so cuda_ffi/
	@$(VENV)/bin/python -c 'from cuda_ffi import library; print(library.load().path)'

demo: ## train on 5,000 real digits (about two minutes), pictures in demo/, gna against dense attention
	@.ci/setup $(VENV) examples $(JAX)
	@$(VENV)/bin/python examples/train_digits.py $(DEMO_ARGS)

bench: setup ## the speed and memory table of this machine's CPU
	@$(VENV)/bin/python benchmarks/cpu.py $(BENCH_ARGS)

wheel: setup ## the pure wheel, in dist/
	@$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## remove environments, builds and caches
	@rm -rf .venv .venv-oldest .venv-triton build dist demo .hypothesis .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
