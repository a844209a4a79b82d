# make demo   installs, trains a dense and an MoE model on real text, evaluates both, writes a report
# make test   installs, runs the whole suite
# make faults  installs, does 27 faults to real runs and shows what was seen; ONLY=4,16 does some
# PIP_ARGS    extra pip arguments, e.g. PIP_ARGS="--extra-index-url URL" for torch's CPU wheels
# PYTHON      the Python (3.11 or newer) that the virtual environment is made with

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test faults lint clean

demo: $(VENV)/installed
	$(BIN)/python moe/demo.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal --durations 20

faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults $(if $(ONLY),--only $(ONLY))

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "open_lm needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# One pip command each: pip then resolves everything together.
$(VENV)/installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable .
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info
