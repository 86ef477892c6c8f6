# Two commands do all the set-up: `make serve` and `make test`. Everything lives in .venv and build/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNIT := $(VENV)/.dependencies
ARGS ?=

# What an installed build depends on; Python files are read from the checkout and need no rebuild.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard mullama/_core/* mullama/_core/*/*) mullama/abi.h $(wildcard mullama/*.pxd) \
           $(wildcard vendor/*.toml vendor/*.py vendor/patches/*)

.PHONY: serve test lint unit debug asan tsan bench clean help

help:
	@echo "make serve   build, fetch the default model, serve it on http://127.0.0.1:8080 (ARGS=\"--port 9000 …\")"
	@echo "make test    build, lint, check types, run all tests"
	@echo "make lint    ruff, mypy, cython-lint"
	@echo "make unit    tests that need no model and no compiled code"
	@echo "make debug   a build with bounds checks, line tracing and annotated Cython"
	@echo "make asan    the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer (long)"
	@echo "make tsan    tests with threads under ThreadSanitizer (long)"
	@echo "make bench   mullama beside llama-server and llama-bench (long)"

serve: $(STAMP)
	$(BIN)/mullama serve $(ARGS)

test: $(STAMP) lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(BIN):$$PATH" $(BIN)/cython-lint mullama

# Where mullama is built this hides its compiled part, so that a test that needs it is found everywhere.
unit: $(UNIT)
	PYTHONPATH="$(CURDIR)/tests/without_core:$(CURDIR)" $(BIN)/python -m pytest -n auto tests/unit tests/web $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m bench.peers $(ARGS)

# Python packages alone: no compiler, no headers.
$(UNIT): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/dependencies.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/dependencies.txt
	touch $@

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mullama needs Python 3.11 or newer; set PYTHON=…"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "no C++ compiler was found; on Debian: apt install build-essential"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "Python's headers were not found; on Debian: apt install python3-dev"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.11" "cython>=3.1,<4" "cmake>=3.21,<5" ninja
	@echo "building llama.cpp and mullama's core: some minutes the first time, seconds with ccache or a warm build/"
	$(BIN)/python -m pip install --no-build-isolation --verbose --editable ".[dev]" > $(VENV)/build.log 2>&1 & pid=$$!; \
	  while kill -0 $$pid 2>/dev/null; do sleep 5; grep -oE '\[ *[0-9]+/[0-9]+\]' $(VENV)/build.log | tail -n 1; done | uniq; \
	  wait $$pid || { tail -n 40 $(VENV)/build.log; echo "the build failed; the whole log is $(VENV)/build.log"; exit 1; }
	touch $@

debug: $(STAMP)
	$(BIN)/python -m pip install --no-build-isolation --no-deps --verbose --editable . -C cmake.define.MULLAMA_DEBUG=ON \
	  -C cmake.build-type=RelWithDebInfo -C build-dir=build/debug

# Builds with sanitizers have environments and build folders of their own, so that the usual one stays as it is.
asan: .venv-asan/.installed
	.venv-asan/bin/python tests/native/sanitized.py asan $(ARGS)

tsan: .venv-tsan/.installed
	.venv-tsan/bin/python tests/native/sanitized.py tsan $(ARGS)

.venv-asan/.installed: SANITIZE := address,undefined
.venv-tsan/.installed: SANITIZE := thread
.venv-%/.installed: $(SOURCES)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "scikit-build-core>=0.11" "cython>=3.1,<4" "cmake>=3.21,<5" ninja
	@echo "building llama.cpp and mullama's core with -fsanitize=$(SANITIZE): ten minutes or more the first time"
	$(@D)/bin/python -m pip install --no-build-isolation --verbose --editable ".[dev]" \
	  -C build-dir=build/$* -C cmake.define.MULLAMA_SANITIZE=$(SANITIZE) > $(@D)/build.log 2>&1 || \
	  { tail -n 40 $(@D)/build.log; echo "the build failed; the whole log is $(@D)/build.log"; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) .venv-asan .venv-tsan build dist
