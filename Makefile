# Every target makes its own virtual environment when it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := projection hvp hvp_vs_exact blocks spectrum scaling training imports
# BENCH_OPTIONS= measures in full, BENCH_OPTIONS='--device cuda' on a GPU.
BENCH_OPTIONS ?= --quick

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/lmc-curvature demo

# The tests of a file run in one process, which makes what they share once.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The profiler, which benchmarks ask about memory, otherwise announces every start and stop.
bench: export KINETO_LOG_LEVEL ?= 6
bench: $(INSTALLED)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(BENCH_OPTIONS); done

# The stamp is written last: an installation that was interrupted is done again.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
