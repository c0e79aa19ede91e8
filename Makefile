# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
OUT ?= runs/demo
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What the package is built from; a change here builds it anew.
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test check bench campaign clean

demo: .venv/.demo
	$(BIN)/lift-fast demo --out $(OUT)

test: .venv/.test
	$(BIN)/python -m pytest

check: .venv/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.test
	$(BIN)/python -m pytest benchmarks

campaign: .venv/.test
	$(BIN)/python -m pytest -m campaign

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python $(SOURCES)
	$(PIP) -e '.[demo]'
	@touch $@

.venv/.test: .venv/bin/python $(SOURCES)
	$(PIP) -e '.[demo,test]'
	@touch $@

.venv/.check: .venv/bin/python $(SOURCES)
	$(PIP) -e '.[demo,test,check]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info lift_fast/_C*.so
