# Everything runs in .venv, which is made at first use and again when pyproject.toml changes.
# PYTHON chooses the interpreter it is made with: 3.11 or newer. TORCH chooses the build of torch.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --no-input
# One exact version, so that every machine tests the same. Where pip's index has builds for the CPU only, they are
# found by their local version: make TORCH=torch==2.13.0+cpu
TORCH ?= torch==2.13.0

.PHONY: demo install install-dev test test-full faults clean-room lint types bench clean

demo: install
	@echo "fetching the sample model"
	@$(BIN)/core fetch-sample
	@$(BIN)/core demo

# The stages are defined in .ci/run, once.
test:
	@.ci/run

test-full:
	@.ci/run install lint types contract sample tests-full conformance wheels

# Wheels of core[cpu,conformance] and of the example backend, in an environment with nothing else.
clean-room: install-dev
	@$(BIN)/python tools/clean_room.py --extras cpu,conformance --first $(TORCH)

# The suite's own proof over 20 seeds, into docs/conformance: about two hours on 2 cores, and it goes on where it was ended.
JOBS ?= 2
faults: install-dev
	@$(BIN)/python tools/faults.py --jobs $(JOBS)

lint:
	@.ci/run install lint

types:
	@.ci/run install types

bench: install-dev
	@$(BIN)/pytest -q -p no:xdist --benchmark-only benchmarks

install: .venv/user.stamp

install-dev: .venv/dev.stamp

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("core needs Python 3.11 or newer; choose one: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/torch.stamp: .venv/python.stamp Makefile
	@echo "installing $(TORCH): about 200 MB as a build for the CPU, some gigabytes as one for accelerators"
	@$(PIP) install $(TORCH)
	@touch $@

.venv/user.stamp: .venv/torch.stamp pyproject.toml
	@echo "installing core[cpu], about a minute"
	@$(PIP) install --quiet -e '.[cpu]'
	@touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml tests/plugins/pyproject.toml
	@echo "installing core[cpu,tpu-cpu,dev] and the test plugins, about two minutes"
	@$(PIP) install --quiet -e '.[cpu,tpu-cpu,dev]' -e tests/plugins
	@touch $@ .venv/user.stamp

clean:
	rm -rf .venv build dist *.egg-info tests/plugins/*.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
