# make demo: the whole chain on a real model, in a fresh environment.  make test: everything that must hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest release for which the Gluon kernel is tested; only compiled with, beside the installed one.
OLDER_TRITON := $(VENV)/triton-3.6
# The CPU build of PyTorch where the index has one; a CUDA machine can set TORCH to its own build.
TORCH ?= torch==2.13.0

.PHONY: demo test lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[runtime,tools,models,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDER_TRITON) triton==3.6.0
	touch $@

demo: $(VENV)/.installed
	$(BIN)/calibatt-demo -o demo

test: lint
	CALIBATT_OLDER_TRITON=$(CURDIR)/$(OLDER_TRITON) $(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/calibatt
	ln -sfn $(CURDIR)/plans build/types/calibatt/plans
	ln -sfn $(CURDIR)/compiler build/types/calibatt/compiler
	MYPYPATH=build/types $(BIN)/mypy

clean:
	rm -rf $(VENV) build demo *.egg-info
