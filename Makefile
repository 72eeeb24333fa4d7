# `make test` is what CI runs. Everything happens in $(VENV), which is made once; `make clean` removes what was built.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Options for installing torch. Where its CUDA build is what pip finds first, name an index of its CPU builds here:
#   make test TORCH_ARGS='--index-url ...'
TORCH_ARGS ?=

.PHONY: .venv test gpu-test lint fuzz zoo demo docs wheel clean

.venv: $(VENV)/installed-dev

# torch goes in first and alone, so that the other packages find a CPU build in place and pull no CUDA one.
$(VENV)/installed-torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) -c constraints.txt torch==2.13.0
	touch $@

# What tests, lint and benchmarks take.
$(VENV)/installed-dev: $(VENV)/installed-torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# What the demo takes, which is less; enough is there where the other is.
$(VENV)/installed-demo: $(VENV)/installed-torch
	test -e $(VENV)/installed-dev || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

test: lint
	$(BIN)/python -m pytest -n 2

# The tests that need a CUDA device. Without one they are skipped, which it says last, with the reason.
gpu-test: .venv
	$(BIN)/python -m pytest -m gpu -rs tests/test_gpu.py

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff format --preview --check docs README.md
	$(BIN)/mypy

fuzz: .venv
	FXPRUNE_FUZZ=2000 $(BIN)/python -m pytest tests/test_fuzz.py

zoo: .venv
	$(BIN)/python -m bench.coverage

demo: $(VENV)/installed-demo
	$(BIN)/python -m bench.demo

# The documentation site, in build/site. A warning is an error.
docs: .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: .venv
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
