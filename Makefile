# Every verb sets up what it needs in .venv; a set-up that is already there costs nothing.

PYTHON := .venv/bin/python
STAMP  := .venv/.setup-done
ARGS   ?=

# One process, and every choice spelled out, so that it runs alike with and without a GPU and warns of no default.
LAUNCH := .venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# One thread in each of a few workers: small tensors gain nothing from more. The order is tests/conftest.py's.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder \
          --durations 40 --durations-min 2

# What LeRobot and its simulators promise: adapters and exports, datasets, recording, environments.
NEXT := tests/adapters tests/conformance tests/data tests/recording tests/simulators tests/test_lerobot_rl.py

# A sourced ROS puts the packages of another Python on this path.
unexport PYTHONPATH
# Where no bytecode may be kept, every process compiles torch and LeRobot anew: twice the start-up of some hundred tests.
unexport PYTHONDONTWRITEBYTECODE
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# The stamp holds the folder it was made in: an environment that was moved or copied is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint typecheck pytest bench benchpi benchgroot counts gpu format next pins clean FORCE

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r verb text; do printf '  make %-10s %s\n' "$$verb" "$$text"; done

setup: $(STAMP)  ## make .venv with everything that the other verbs need
	@echo "setup: .venv is complete"

$(STAMP): pyproject.toml $(wildcard adapters/*/pyproject.toml) .ci/constraints.txt .ci/overrides.txt .ci/setup
	@bash .ci/setup

demo: $(STAMP)  ## run recipes/mlp_cube.py; options go into ARGS="--seed 1"
	@# The launcher ignores Ctrl-C and waits: the run itself saves, says where, and ends.
	@trap '' INT; $(LAUNCH) recipes/mlp_cube.py $(ARGS)

test: $(STAMP)  ## check style, types and behaviour; all three run even if one fails
	@$(MAKE) --no-print-directory --keep-going lint typecheck pytest

test-all: test  ## also the long tests: clean environments, full widths, every backend, every page
	$(PYTEST) -m exhaustive $(ARGS)

lint: $(STAMP)  ## check style
	.venv/bin/ruff check
	.venv/bin/ruff format --check

typecheck: $(STAMP)  ## check types
	.venv/bin/pyright

pytest: $(STAMP)  ## run the tests alone; options go into ARGS="-k flow"
	$(PYTEST) -m "not exhaustive" $(ARGS)

bench: $(STAMP)  ## measure one update, of POCO in detail and of every algorithm
	$(PYTHON) tests/benchmarks/bench_update.py $(ARGS)
	$(PYTHON) tests/benchmarks/bench_algorithms.py

benchpi: $(STAMP)  ## measure pi0.5 against LeRobot's own code (minutes); options go into ARGS="--device cuda"
	$(PYTHON) tests/benchmarks/bench_pi05.py $(ARGS)

benchgroot: $(STAMP)  ## measure GR00T N1.6 with and without its shared prefix (minutes); options go into ARGS="--device cuda"
	$(PYTHON) tests/benchmarks/bench_groot.py $(ARGS)

counts: $(STAMP)  ## count FLOPs, bytes, launches and memory of an update at full size, without a GPU (minutes)
	$(PYTHON) tests/benchmarks/bench_counts.py $(ARGS)

gpu:  ## measure all that needs a GPU (25 minutes, resumable); ARGS=--rehearse runs it on a CPU, tiny
	@bash .ci/gpu $(ARGS)

format: $(STAMP)  ## put the style right where ruff can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

next:  ## try the newest LeRobot, also where the pins forbid it: the tests of what this library takes from it
	@bash .ci/setup next
	$(subst .venv/,.ci/.venv-next/,$(PYTEST)) -m "not exhaustive" $(or $(ARGS),$(NEXT))

pins:  ## resolve the newest versions into .ci/constraints.txt
	@bash .ci/setup pins

clean:  ## remove .venv and caches; what runs wrote stays
	rm -rf .venv .ci/.venv .ci/.venv-next .pytest_cache .ruff_cache .hypothesis build dist
	find poco_vla adapters recipes tests -type d -name __pycache__ -prune -exec rm -rf {} +
