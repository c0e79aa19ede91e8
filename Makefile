# Two commands do everything on a fresh machine: `make demo` and `make test`.
# The first of these that runs.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3.13 python3.14 python3; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
OUT ?= runs/demo
BIN := .venv/bin
# --no-compile: the recipe below compiles the Python files instead, on all cores.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# A change in one of these files rebuilds the package.
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)

# make gpu uses the Python on PATH and downloads nothing; see benchmarks/gpu.py.
gpu: PYTHON := python3
gpu: OUT := runs/gpu

.PHONY: demo test check docs bench campaign sanitize soak gpu clean

demo: .venv/.demo
	$(BIN)/lift-fast demo --out $(OUT)

# Two processes; each runs one file of tests at a time. passive: waiting threads leave their core to the other process.
test: .venv/.test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/; see mkdocs.yml. The variable silences mkdocs-material's notice about a successor of MkDocs.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo 'open site/index.html'

bench: .venv/.test
	$(BIN)/python -m pytest benchmarks

# Attacks, with a table of how many of each kind there were and how they ended; at most 20 minutes on two cores.
campaign: .venv/.test
	OMP_WAIT_POLICY=passive timeout -s INT 1200 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'campaign or attack' --bars

# The tests of the C++ engine in builds with sanitizers.
sanitize: .venv/.test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m sanitize

# Long tests: kernels compiled for GPUs that are not here, leaks, other numbers of ranks, a run that is killed 30 times.
soak: .venv/.test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal -m soak

gpu:
	@$(PYTHON) -m benchmarks.gpu --out $(OUT)

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3 here; install Python 3.10 or later"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# One recipe for the four. It ends by printing what the build found out about CUDA, which pip does not show.
.venv/.demo: EXTRAS := demo
.venv/.test: EXTRAS := demo,test,docs
.venv/.check: EXTRAS := demo,test,docs,check
.venv/.docs: EXTRAS := docs
.venv/.demo .venv/.test .venv/.check .venv/.docs: .venv/bin/python $(SOURCES)
	$(PIP) -e '.[$(EXTRAS)]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@$(BIN)/python -c "from lift_fast._C import build_info as b; \
		print('lift-fast: CUDA for ' + (b()['archs'] or 'no GPU'), b()['reason'], sep=', ')"
	@touch $@

# For tests of exports, in a folder of its own; see the file. Not a reason to build the rest again.
.venv/.test: | .venv/.peers
.venv/.peers: .venv/bin/python tests/peers.txt
	$(PIP) --no-deps --upgrade --target .venv/peers -r tests/peers.txt
	@touch $@

clean:
	rm -rf .venv build site *.egg-info lift_fast/_C*.so
