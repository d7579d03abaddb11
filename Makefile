# Needs Python 3.11 or newer (with venv and pip) and make. The rest is installed into .venv by the first call.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first interpreter that is new enough; `make book PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# Tests share the cores by files; each process is held to one thread, or they would wait for each other.
SHARED := -n auto --maxprocesses 4 --dist loadfile
# Evidence first: chapters read what it has computed.
CHAPTERS := book/intro.ipynb $(sort $(wildcard book/evidence/*.ipynb)) $(sort $(wildcard book/[0-9]*.ipynb)) book/beside.ipynb book/your_model.ipynb book/status.ipynb

# A notebook must run with this environment's kernel, and with what this checkout holds.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PLATFORM_DIRS := 1
export PYTHONNOUSERSITE := 1
# Threads that spin while they wait would take the processor from what they wait for, where two programs share two cores.
export OMP_WAIT_POLICY := passive

.PHONY: help install book preview pages test notebooks format bench slow torture clean
.DELETE_ON_ERROR:

help:
	@echo "make book       run every chapter live and build _build/html"
	@echo "make preview    build _build/html from the stored outputs, in seconds: nothing is run"
	@echo "make pages      the pages that either has built, in Chromium, where there is one (SCREENSHOTS=DIR keeps pictures)"
	@echo "make test       lint, types, tests, and every chapter against its stored outputs"
	@echo "make notebooks  run the chapters and store their outputs (only=book/NAME.ipynb for one)"
	@echo "make format     put code and notebooks in order"
	@echo "make slow       the tests that take longer"
	@echo "make torture    kills, damaged files, full disks, broken chapters; writes book/faults.md"
	@echo "make bench      memory and speed; paper=PATH adds a comparison with the code of the paper"
	@echo "make clean      remove what was built; .venv and runs/ stay"

install: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: expected Python 3.11 or newer, found none; name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamp is written last, so that an installation that broke off is taken up again.
$(STAMP): requirements.txt constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# --all: a chapter depends on the package too, which the build would not notice.
book: $(STAMP)
	$(BIN)/python book/run.py $(CHAPTERS)
	$(BIN)/jupyter-book build . --all -W -n --keep-going

preview: $(STAMP)
	TINYHALL_BOOK=stored $(BIN)/jupyter-book build . --all -W -n --keep-going

pages: $(STAMP)
	$(BIN)/python -m pytest -m pages tests/test_pages.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SHARED) -m "not slow and not gpu and not bench and not pages"
	@test -n "$(CHAPTERS)" || { echo "make: expected chapters book/[0-9]*.ipynb, found none" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) --nbval-lax --nbval-current-env --nbval-cell-timeout 600 --nbval-kernel-startup-timeout 600 $(CHAPTERS)

notebooks: $(STAMP)
	$(BIN)/python book/store.py $(or $(only),$(CHAPTERS))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

torture: $(STAMP)
	$(BIN)/python tests/torture.py

# Without the shape checks of the other tests, which would be measured too.
bench: $(STAMP)
	JAXTYPING_DISABLE=1 $(BIN)/python -m pytest tests/benchmarks -s
	$(BIN)/python tests/benchmarks/speed.py $(if $(paper),--paper $(paper),--only own)

clean:
	rm -rf _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find book tests tinyhall -name __pycache__ -prune -exec rm -rf {} +
