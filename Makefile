# Everything runs in .venv, which is made at first use. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
TORCH := torch==2.13.0

.PHONY: demo test test-full lint types bench clean install install-dev

$(VENV)/user.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[cpu]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml tests/plugins/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[cpu,tpu-cpu,bench,dev]' -e tests/plugins
	@touch $@ $(VENV)/user.stamp

install: $(VENV)/user.stamp
install-dev: $(VENV)/dev.stamp

demo: install
	@$(BIN)/core fetch-sample
	@$(BIN)/core demo

test:
	@PYTHON=$(PYTHON) bash tools/test.sh

lint: install-dev
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

test-full: install-dev
	$(BIN)/core fetch-sample
	$(BIN)/pytest -q

bench: install-dev
	$(BIN)/pytest -q benchmarks --benchmark-only -p no:xdist

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
