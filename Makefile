# Every target sets up its own .venv on first use. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := balance examples megakernel perf reference tests
# Both cores test; whoever has none left takes over half of what the other has left. With more
# cores: make test WORKERS=8.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist worksteal --benchmark-disable
# mypy runs while the tests do, and its failure is theirs.
TYPES := -p tests.helpers.beside --beside mypy
EXTRAS := perf,test

.PHONY: demo test test-all test-newest test-oldest check lint format gpu bench metrics clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

# What a plain `pip install` resolves to today, without our constraints.
.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable ".[$(EXTRAS)]"
	touch $@

# The oldest versions that pyproject.toml allows.
.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[$(EXTRAS)]"
	touch $@

demo: $(VENV)/ready
	$(RUN) -m perf demo

test: lint
	$(RUN) -m pytest $(PARALLEL) $(TYPES) -m "not gpu and not slow"

test-all: lint
	$(RUN) -m pytest $(PARALLEL) $(TYPES)

test-newest: .venv-newest/ready
	.venv-newest/bin/python -m pytest $(PARALLEL) -m "not gpu and not slow"

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest $(PARALLEL) -m "not gpu and not slow" tests/megakernel

check: lint
	$(RUN) -m mypy

lint: $(VENV)/ready
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)

format: $(VENV)/ready
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

metrics: $(VENV)/ready
	$(RUN) -m tests.metrics

bench: $(VENV)/ready
	$(RUN) -m perf run --suite all --quick --out out/perf
	$(RUN) -m perf report out/perf --out out/perf

# Nothing is installed for it: a machine with a GPU has its own torch and Triton, and maybe no network.
gpu:
	$(PYTHON) -m perf.gpu first --out out/gpu
	$(PYTHON) -m perf.gpu second --out out/gpu --cache out/gpu/first.tgz

clean:
	rm -rf .venv .venv-newest .venv-oldest build *.egg-info .mypy_cache .ruff_cache .hypothesis
