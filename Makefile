# `make ppo` trains PPO on a bare machine with Python 3.11, `make test` tests the lab. Each sets up .venv first, once.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2> /dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip
RUN := .venv/bin/python -m

.PHONY: ppo test quick lint types clean

ppo: .venv/base  ## extra flags by ARGS, as in: make ppo ARGS="--num-seeds 10"
	$(RUN) rl_lab.ppo --env HalfCheetah-v4 $(ARGS)

# On as many cores as there are, up to four. The tests of a file share one; files keep their order, the longest first.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/dev  ## everything, slow tests included; ARGS go to pytest
	$(PYTEST) $(ARGS)

quick: .venv/dev  ## the tests that take seconds
	$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/dev
	$(RUN) ruff check .

types: .venv/dev
	$(RUN) mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/base: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@ .venv/base
