# make run | test | lint | bench | study. Each sets up what it needs in .venv; the second time it is quick.
#   make run ARGS="--port 8000"      make bench BENCH=lpo_iteration ARGS="--size tiny"
#        make test ARGS="tests/test_jobs.py"      make study QUICK=1
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# labelling; lpo_iteration, lrm_step and pictures (each with ARGS="--size tiny"); gpu: see docs/performance.md
BENCH ?= labelling

.PHONY: run test lint bench study
.DELETE_ON_ERROR:

run: .venv/.runtime
	$(BIN)/python launch.py $(ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .

bench: .venv/.dev
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

study: .venv/.dev
	$(BIN)/python -m benchmarks.study $(if $(QUICK),--plan quick --out study-quick) $(ARGS)

# A stamp, since a `venv` that was killed leaves a python without pip behind.
.venv/.made:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Preference Lab needs Python 3.11, 3.12 or 3.13: make run PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	touch $@

# torch first and alone: with it installed, nothing else asks the registry for another build.
.venv/.runtime: requirements.txt | .venv/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
