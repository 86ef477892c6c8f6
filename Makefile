# Two commands do all the set-up: `make serve` and `make test`. Everything lives in .venv and build/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# What an installed build depends on; Python files are read from the checkout and need no rebuild.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard mullama/_core/* mullama/_core/*/*) mullama/abi.h $(wildcard mullama/*.pxd) \
           $(wildcard vendor/*.toml vendor/*.py vendor/patches/*)

.PHONY: serve test lint unit debug bench clean help

help:
	@echo "make serve   build, fetch the default model, serve it on http://127.0.0.1:8080 (ARGS=\"--port 9000 …\")"
	@echo "make test    build, lint, check types, run all tests"
	@echo "make lint    ruff, mypy, cython-lint"
	@echo "make unit    tests that need no model and no compiled code"
	@echo "make debug   a build with bounds checks, line tracing and annotated Cython"
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

unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/web $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m bench.peers $(ARGS)

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

clean:
	rm -rf $(VENV) build dist
