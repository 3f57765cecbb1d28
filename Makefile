PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
BIN := .venv/bin
# Two cores compile twice as much as one.
JOBS ?= 2

.PHONY: help demo env test test-slow lint clean

help:
	@echo "make demo       the whole story in minutes: refine, train three ways, evaluate, report"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that take longer"
	@echo "make env        only the environment, with what tests need"
	@echo "make lint       ruff"
	@echo "make clean      removes .venv and runs/demo"

demo: .venv/demo.stamp
	$(BIN)/python -m hqclip_jax.demo

env: .venv/dev.stamp

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs/demo

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
