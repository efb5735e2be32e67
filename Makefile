# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all soak check format benchmarks clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A shell function: the first Python that is new enough, or a clear word about what is missing.
define FIND_PYTHON
set -e; \
[ "$$(uname -s)" = Linux ] || { echo "error: this needs Linux; found $$(uname -s)" >&2; exit 1; }; \
for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
  if command -v "$$candidate" >/dev/null 2>&1 && \
     "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
done; \
[ -n "$$python" ] || { echo "error: Python 3.11 or newer is missing$(if $(PYTHON), ($(PYTHON) is not one)): install it, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
"$$python" -c 'import venv, ensurepip' 2>/dev/null || \
  { echo "error: $$python has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
endef

export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

demo: $(INSTALLED) ## The whole main job on a real corpus: train, embed, build, evaluate, serve, ask
	@exec $(BIN)/python examples/demo.py

test: $(INSTALLED) ## The tests, but for those that take long or kill processes
	@exec $(BIN)/python -m pytest -m "not slow and not faults"

test-all: $(INSTALLED) ## The whole test suite, as CI runs it
	@exec $(BIN)/python -m pytest

soak: $(INSTALLED) ## All rounds of each kill, roll-out and fuzz test; results in benchmarks/results
	@RAEXMC_SOAK=1 $(BIN)/python -m pytest --timeout 7200 tests/test_memory_survives_kills.py \
	  tests/test_serving_survives_kills.py tests/test_rollouts_lose_nothing.py tests/test_serving_over_http.py \
	  tests/test_tuning_looks_at_held_out_rows_only.py tests/test_jobs_over_files_survive_kills.py

check: $(INSTALLED) ## Lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(INSTALLED) ## Every benchmark, one after the other; results in benchmarks/results
	@set -e; for benchmark in benchmarks/[a-z]*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark; done; $(BIN)/python benchmarks/_readme.py

clean: ## Remove .venv, caches and runs/
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp is touched last: an installation that was stopped is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(FIND_PYTHON); \
	echo "Setting up $(VENV) with $$python (a few minutes, once)"; \
	[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,demo,dev]' || \
	  { echo "error: the installation failed: the package registry must be reachable; see above, then run make again" >&2; exit 1; }; \
	touch $@
