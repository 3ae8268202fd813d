# The two commands of the README are `make demo` and `make test`. Both do all the set-up, in .venv, on a fresh machine.
# PIP_ARGS goes to pip as it is, e.g. make demo PIP_ARGS="--extra-index-url URL".

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo ## train on digits and draw them at three budgets (runs/demo/demo.png)
	$(BIN)/python -m fpdm demo

test: .venv/.dev ## run the tests
	$(BIN)/python -m pytest -n logical --dist loadfile

check: .venv/.dev ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches (runs are kept)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build src/*.egg-info

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fpdm needs Python 3.11 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e '.[plots]'
	@touch $@

.venv/.dev: .venv/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@
