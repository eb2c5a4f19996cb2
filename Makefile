# The two commands: `make demo` runs the whole pipeline on the embedded default, `make test` the whole suite.
# While you work: `make check`, lint, types and quick tests in about a minute.

PYTHON ?= python3
BIN    := .venv/bin
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile
# The tests of `make check`: quick ones, of the numeric core and of what users type.
QUICK  := bad_input checks config data follow infill layers likelihood loss models noise objectives plan preflight presets \
          published sampling scoring strategies vocabularies

.PHONY: venv demo test test-all check benchmark clean

venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The flow starts further processes by the name `python`: they must find the environment's.
demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python flows/a2d_flow.py run --objective bd3lm

test: .venv/installed-dev
	$(PYTEST)

# All of it: also the flow killed at 20 random moments on the local datastore and on S3, and a team's MLflow on PostgreSQL: most of an hour.
test-all: .venv/installed-dev
	$(PYTEST) -m "long or not long"

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(QUICK:%=tests/test_%.py)

benchmark: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/write.py

clean:
	rm -rf .venv .metaflow mlruns mlflow.db runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
