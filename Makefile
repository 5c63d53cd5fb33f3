# Every target sets up what it needs, from nothing. The interpreter comes through .python-version.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
# Huge pages for XLA's temporaries: on a CPU a training step otherwise spends a third of its time in page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

.DEFAULT_GOAL := help
.PHONY: help train test lint format bench gpu parity floor lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/installed: requirements.lock pyproject.toml
.venv-parity/installed: requirements-parity.lock pyproject.toml
.venv-floor/installed: requirements-floor.lock pyproject.toml
$(VENV)/installed .venv-parity/installed .venv-floor/installed:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "lumen needs Python 3.12 or newer; this is " + sys.version)'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

train: $(VENV)/installed  ## the main job: tokenizer and LPD on handwritten digits, then evaluation (minutes)
	$(BIN)/python train.py --config=experiments/lpd/digits_tokenizer.py --workdir=runs/digits_tokenizer
	$(BIN)/python train.py --config=experiments/lpd/digits.py --workdir=runs/digits
	$(BIN)/python evaluate.py --config=experiments/lpd/digits.py --workdir=runs/digits
	@echo; cat runs/digits/eval/comparison.md; echo; echo "pictures: runs/digits/eval/*.png"

test: $(VENV)/installed lint  ## lint, types and every test that needs neither a GPU nor torch
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not parity"

lint: $(VENV)/installed  ## ruff and pyright, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed  ## rewrites files the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed  ## measures LPD-L on this machine, random weights: seconds per image, by part
	$(BIN)/python evaluate.py --config=experiments/lpd/latency_l.py --workdir=runs/latency_l --random_weights

gpu: $(VENV)/installed  ## the tests that need a GPU
	JAX_PLATFORMS= $(BIN)/python -m pytest -m gpu

parity: .venv-parity/installed  ## the tests against torch libraries, in an environment of their own (gigabytes)
	.venv-parity/bin/python -m pytest -m parity
	.venv-parity/bin/python tests/language/bench_transformers.py
	.venv-parity/bin/python tests/sparse/bench_spconv.py

floor: .venv-floor/installed  ## the kernels' tests with the oldest jax that is supported
	.venv-floor/bin/python -m pytest -n 2 --dist loadfile -m "not gpu and not parity" tests/pallas_kernels

FLOOR := 0.11.2
COMPILE = $(BIN)/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --python-version 3.12 \
  --python-platform x86_64-manylinux_2_31 --extra dev

lock: $(VENV)/installed  ## renews the lock files: names and versions only
	$(BIN)/python -m pip install --quiet uv
	$(COMPILE) --upgrade --output-file requirements.lock pyproject.toml
	grep -v ^nvidia- requirements.lock | $(COMPILE) --extra parity --constraint - \
	  --output-file requirements-parity.lock pyproject.toml
	(grep -v ^jax requirements.lock; printf '%s==$(FLOOR)\n' jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt) | \
	  $(COMPILE) --constraint - --output-file requirements-floor.lock pyproject.toml

clean:  ## removes what the targets made, runs/ apart
	rm -rf $(VENV) .venv-parity .venv-floor .jax_cache .pytest_cache .ruff_cache *.egg-info
