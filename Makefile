# `make quickstart` and `make test` need only Python 3.11+ (with venv) and make; a second call reuses .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-slow check format docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "hieratok needs Python 3.11 or newer, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing hieratok and its dependencies into $(VENV) (torch alone is several GB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# uv is fast but does not read pip's configuration (a mirror, say): where it fails, pip gets its turn.
	@VIRTUAL_ENV=$(VENV) UV_HTTP_TIMEOUT=300 $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[dev]' \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/hieratok quickstart

test: $(INSTALLED) check
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/settings.py
	$(BIN)/python docs/api.py
	$(BIN)/python docs/recipes.py
	$(BIN)/python docs/drawings.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
