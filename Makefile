PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
BIN := .venv/bin
REFINE := .venv-refine/bin
# Two cores compile twice as much as one.
JOBS ?= 2

.PHONY: help demo demo-lvlm env test test-slow test-refine refine-env lint clean

help:
	@echo "make demo       the whole story in minutes: refine, train three ways, evaluate, report"
	@echo "make demo-lvlm  the paper's first half too, with a real model in vLLM: half an hour"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-refine  the tests with a real vLLM, on the CPU"
	@echo "make env        only the environment, with what tests need"
	@echo "make refine-env the environment of the refinement, with vLLM for CPUs"
	@echo "make lint       ruff"
	@echo "make clean      removes both environments and the demos' runs"

demo: .venv/demo.stamp
	$(BIN)/python -m hqclip_jax.demo

demo-lvlm: .venv/demo.stamp .venv-refine/test.stamp
	$(BIN)/python -m hqclip_jax.demo_lvlm --refine-python $(REFINE)/python

env: .venv/dev.stamp

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m "slow and not lvlm"

test-refine: .venv-refine/test.stamp
	$(REFINE)/python -m pytest -m lvlm --confcutdir=tests/refine tests/refine

refine-env: .venv-refine/test.stamp

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-refine runs/demo runs/demo-lvlm

# A stamp is written last, so that an interrupted installation is done again.
.venv/demo.stamp: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

.venv/dev.stamp: .venv/demo.stamp requirements-dev.txt requirements-peers.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-peers.txt
	touch $@

.venv-refine/test.stamp: requirements-refine-cpu.txt requirements-refine-common.txt \
		requirements-refine-test.txt refine/cpu_env.py
	$(PYTHON) -m venv .venv-refine
	$(REFINE)/python -m pip install -q -r requirements-refine-cpu.txt
	# Linked to CUDA, the first two stop the engine's start; the third is a gigabyte for GPUs.
	$(REFINE)/python -m pip uninstall -q -y torchaudio torchcodec triton
	$(REFINE)/python -m pip install -q -r requirements-refine-common.txt -r requirements-refine-test.txt
	$(REFINE)/python -m pip install -q --no-deps -e .
	$(REFINE)/python refine/cpu_env.py
	touch $@
