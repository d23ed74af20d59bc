# Every target makes its own virtual environment when it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := projection checks hvp hvp_vs_exact language blocks spectrum scaling training imports
# BENCH_OPTIONS= measures in full, BENCH_OPTIONS='--device cuda' on a GPU.
BENCH_OPTIONS ?= --quick

# Each process takes a run of neighbouring tests, which share what their file makes once, and later some of the other's.
PYTEST := -m pytest -n auto --dist worksteal
# Shapes written in signatures are checked against every call the tests make, which takes two to five times as long.
TYPED := --jaxtyping-packages=lmc_curvature,beartype.beartype

# What is compiled is kept, for the processes that tests start, and for the next run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check test-versions lint bench docs clean

demo: $(INSTALLED)
	$(BIN)/lmc-curvature demo

test: lint
	$(BIN)/python $(PYTEST) -m 'not check'

# The long tests: what those of a file share takes long, too, so they stay in one process, and files come in order,
# because the longest have the fewest tests. Then all other tests with the shapes of what they call, which two variants
# of each show.
check: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m check
	$(BIN)/python $(PYTEST) $(TYPED) -m 'not check' --variants 2

# With other versions of Python and of the dependencies, the lowest that the project allows among them.
test-versions: $(INSTALLED)
	$(BIN)/python scripts/versions.py

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

# The site, in runs/site, where it opens without a network.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
