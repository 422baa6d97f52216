# Two commands: `make demo` and `make test`. Both make .venv when it is missing, and need no GPU and no compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp's name carries setup.py's checksum: only a changed setup.py installs again, whatever its date.
STAMP := $(shell cksum < setup.py | cut -d' ' -f1)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo    synthetic videos, warm start, GRPO with SCRE/IGSR, report (ARGS='...' is passed on)"
	@echo "make test    every test that needs no GPU (ARGS='...' is passed on to pytest)"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove .venv and everything that was built"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no '$(PYTHON)' here; install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), wanted Python 3.10 or newer; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.train-$(STAMP): $(BIN)/python
	@echo "installing into $(VENV): the first time some minutes and several GB, most of it torch"
	$(BIN)/python -m pip install --editable '.[train]'
	touch $@

# the test extra holds the train extra, so `make demo` after `make test` installs nothing
$(VENV)/.test-$(STAMP): $(BIN)/python
	@echo "installing into $(VENV): the first time some minutes and several GB, most of it torch"
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@ $(VENV)/.train-$(STAMP)

demo: $(VENV)/.train-$(STAMP)
	$(BIN)/raise-core demo $(ARGS)

test: $(VENV)/.test-$(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal --benchmark-disable $(ARGS)

lint: $(VENV)/.test-$(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy raise_core kernels/raise_kernels

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
