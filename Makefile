# make demo: the whole chain on a real model, in a fresh environment.  make test: everything that must hold.
# make test-fast: what most changes need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest release for which the Gluon kernel is tested; only compiled with, beside the installed one.
OLDER_TRITON := $(VENV)/triton-3.6
# The oldest release of diffusers that is supported; one test runs under it.
OLDER_DIFFUSERS := $(VENV)/diffusers-0.38
# The CPU build of PyTorch where the index has one; a CUDA machine can set TORCH to its own build.
TORCH ?= torch==2.13.0
# Each process computes on one core: tests/conftest.py.
PROCESSES ?= 2
IN_PARALLEL := -n $(PROCESSES) --dist worksteal

.PHONY: demo test test-fast lint types clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[runtime,tools,models,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDER_TRITON) triton==3.6.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDER_DIFFUSERS) diffusers==0.38.0
	touch $@

demo: $(VENV)/.installed
	$(BIN)/calibatt-demo -o demo

test: lint
	CALIBATT_OLDER_TRITON=$(CURDIR)/$(OLDER_TRITON) CALIBATT_OLDER_DIFFUSERS=$(CURDIR)/$(OLDER_DIFFUSERS) \
		$(BIN)/python -m pytest $(IN_PARALLEL)

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	mkdir -p build/types/calibatt
	ln -sfn $(CURDIR)/calibatt/__init__.py build/types/calibatt/__init__.py
	for folder in plans compiler runtime tools; do ln -sfn $(CURDIR)/$$folder build/types/calibatt/$$folder; done
	MYPYPATH=build/types $(BIN)/mypy

clean:
	rm -rf $(VENV) build demo *.egg-info
