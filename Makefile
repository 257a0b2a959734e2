# dpcomm's commands. `make help` lists them. Everything is kept in .venv and build/.
# PYTHON=python3.12 chooses another Python (>= 3.10), DPCOMM_TORCH etc. pass through to setup.py.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
VENV_PYTHON := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
CXX ?= g++
JOBS ?= $(shell nproc)
PYTEST := $(VENV_PYTHON) -m pytest
PYTEST_ARGS ?=

# All architectures of CUDA take minutes; here one is enough, and its PTX serves newer devices.
# `pip install .` builds for all. Without nvcc there is no CUDA part.
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX

NATIVE_SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml \
                  dpcomm/_build_record.py.in

.PHONY: help venv build demo test test-torch check format campaign frameworks peers plants sass sanitize clean distclean
.PHONY: check-format check-ruff check-mypy check-stubs check-layering check-warnings

help:
	@echo "make demo      train on handwritten digits with gloo, dpcomm and dpcomm+fp16; table and picture"
	@echo "make test      the tests (PYTEST_ARGS=... passes arguments on)"
	@echo "make test-torch TORCH=2.14.0  the backend's tests with another torch, in build/torch-2.14.0"
	@echo "make check     formatting, ruff, mypy, stubs, layering, compiler warnings: what CI checks"
	@echo "make format    put the sources into the checked format"
	@echo "make sanitize  native tests under AddressSanitizer + UBSan and under ThreadSanitizer"
	@echo "make campaign  the long tests"
	@echo "make frameworks  the examples of Lightning, Ray, DeepSpeed and others, in an environment of its own"
	@echo "make peers     the libraries that bench/peers.py compares with, each in an environment of its own"
	@echo "make plants    faults planted in the CUDA kernels, and who finds them: a table"
	@echo "make sass      what nvcc makes of the CUDA kernels on all architectures: a table (minutes)"
	@echo "make build     only make $(VENV) and build dpcomm into it (editable)"
	@echo "make clean     remove what was built; make distclean also removes $(VENV)"

# --- the environment ---------------------------------------------------------------------------------
$(STAMPS)/venv:
	@tools/make_venv.sh "$(VENV)" "$(PYTHON)"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/venv
	@tools/announce_torch.sh $(VENV_PYTHON)
	$(PIP) install --quiet -r requirements/torch.txt
	@touch $@

$(STAMPS)/requirements: requirements/build.txt requirements/test.txt $(STAMPS)/torch
	$(PIP) install --quiet -r requirements/build.txt -r requirements/torch.txt -r requirements/test.txt
	@touch $@

$(STAMPS)/tools: requirements/check.txt $(STAMPS)/requirements
	$(PIP) install --quiet -r requirements/check.txt
	@touch $@

# Editable: a changed Python file needs no new build, and `python -m dpcomm...` works in this folder.
$(STAMPS)/build: $(NATIVE_SOURCES) $(STAMPS)/requirements
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

venv: $(STAMPS)/requirements
build: $(STAMPS)/build

# --- the two commands --------------------------------------------------------------------------------
demo: build
	$(VENV_PYTHON) examples/demo.py

# What one process computes runs on all workers, what starts ranks on one alone (tests/workers.py).
# PYTEST_ARGS=-n0 for a debugger or -s.
TEST_WORKERS ?= 2
test: build
	$(PYTEST) -n $(TEST_WORKERS) $(PYTEST_ARGS)

# With a torch that is not that of requirements/torch.txt; not part of `make test`.
test-torch:
	@[ -n "$(TORCH)" ] || { echo "make test-torch TORCH=<version>" >&2; exit 1; }
	PYTHON="$(PYTHON)" tools/test_with_torch.sh "$(TORCH)" $(PYTEST_ARGS)

campaign: build
	$(PYTEST) -m campaign -o faulthandler_timeout=86400 $(PYTEST_ARGS)

# Over 2 GB; in an environment of its own, as frameworks have demands of their own. The same torch.
FRAMEWORKS_VENV ?= .venv-frameworks
FRAMEWORKS_PYTHON := $(FRAMEWORKS_VENV)/bin/python

$(FRAMEWORKS_VENV)/stamp: requirements/frameworks.txt requirements/build.txt requirements/torch.txt
	@tools/make_venv.sh "$(FRAMEWORKS_VENV)" "$(PYTHON)"
	$(FRAMEWORKS_PYTHON) -m pip --disable-pip-version-check install --quiet \
	  -r requirements/build.txt -r requirements/torch.txt -r requirements/frameworks.txt
	@touch $@

frameworks: $(FRAMEWORKS_VENV)/stamp
	$(FRAMEWORKS_PYTHON) -m pip --disable-pip-version-check install --quiet \
	  --no-build-isolation --no-deps --editable .
	$(FRAMEWORKS_PYTHON) -m pytest -m frameworks tests/frameworks $(PYTEST_ARGS)

# Each into $(PEERS)/<name>; 1 GB in all. What cannot be installed is skipped with the reason.
PEERS ?= build/peers

peers: $(STAMPS)/requirements
	tools/install_peers.sh $(abspath $(VENV_PYTHON)) "$(PEERS)"

plants: build
	$(VENV_PYTHON) tests/emulated/plants.py

sass: $(STAMPS)/requirements
	$(VENV_PYTHON) tools/sass_report.py --compile 75 80 86 89 90 100 120

# --- make check --------------------------------------------------------------------------------------
check: check-format check-ruff check-mypy check-stubs check-layering check-warnings

check-format: $(STAMPS)/tools
	find bench csrc tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort | \
	  xargs $(VENV)/bin/clang-format --dry-run -Werror

check-ruff: $(STAMPS)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check-mypy: $(STAMPS)/tools $(STAMPS)/build
	$(VENV)/bin/mypy --strict -p dpcomm

check-stubs: $(STAMPS)/tools $(STAMPS)/build
	$(VENV_PYTHON) -m mypy.stubtest --allowlist tools/stubtest_allowlist.txt dpcomm._core
	$(VENV_PYTHON) -c "import torch, sys; from mypy import stubtest; sys.exit(stubtest.main())" \
	  --allowlist tools/stubtest_allowlist_torch.txt dpcomm._torch

check-layering: $(STAMPS)/build
	$(PYTEST) -q tests/unit/test_layering.py

check-warnings: $(STAMPS)/requirements
	tools/build_native.sh $(VENV) build/werror -DDPCOMM_WERROR=ON

format: $(STAMPS)/tools
	find bench csrc tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# --- sanitizers --------------------------------------------------------------------------------------
sanitize: $(STAMPS)/requirements
	$(PYTEST) tests/native $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info dpcomm/*.so dpcomm/_build_record.py demo_output $(STAMPS)/build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(FRAMEWORKS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
