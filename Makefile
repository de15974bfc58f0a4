# Every target sets up its own .venv on first use. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := balance megakernel perf reference tests

.PHONY: demo test test-all check format gpu bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[perf,test]"
	touch $@

demo: $(VENV)/ready
	$(RUN) -m perf demo

test: check
	$(RUN) -m pytest -m "not gpu and not slow"

test-all: check
	$(RUN) -m pytest

check: $(VENV)/ready
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

format: $(VENV)/ready
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

bench: $(VENV)/ready
	$(RUN) -m perf run --suite all --quick --out out/perf
	$(RUN) -m perf report out/perf --out out/perf

gpu: $(VENV)/ready
	$(RUN) -m perf.gpu

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
