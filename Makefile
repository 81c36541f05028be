# Every target runs the set-up it needs, once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test test-reliability test-ray lint docs build format bench lock clean

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip --disable-pip-version-check --no-input
BENCH_ARGS ?= --quick

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

# The lock has all dependencies, so --no-deps is complete. uv is two to four times faster than pip; pip is the fallback
# if uv cannot use the index configured for pip. Bytecode is compiled at install: some Ray processes never write it.
LOCKED := --no-deps --only-binary :all: --require-hashes -r requirements.lock
$(STAMP): requirements.lock pyproject.toml
	@python=""; \
	for candidate in $${PYTHON:-} python3.11 python3.12 python3; do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or 3.12 with the venv module: install one (Debian: apt-get install python3-venv), or name it: make install PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	[ -x $(PY) ] || "$$python" -m venv $(VENV)
	@echo "Installing the locked packages into $(VENV) (about 7 GB, one to four minutes the first time)"
	@$(PIP) install --quiet --no-deps --only-binary :all: --require-hashes \
	  -r <(awk '/^[a-z]/ { keep = /^uv==/ } keep' requirements.lock)
	@$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) $(LOCKED) || $(PIP) install --quiet $(LOCKED)
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

install: $(STAMP) ## create .venv with the locked packages and this package
	@echo "ready: $(VENV)/bin/pillsnap --help"

demo: $(STAMP) ## generate photos, train and evaluate both models: minutes on two CPU cores
	@$(VENV)/bin/pillsnap demo

test: $(STAMP) ## all tests except reliability; needs no network and no GPU
ifdef PYTEST_ARGS
	@$(PY) -m pytest -m "not reliability" $(PYTEST_ARGS)
else
	@# The longest first; those of tests/reliability measure times and run one by one.
	@$(PY) -m pytest -m "not reliability" tests/integration tests/contract tests/cluster tests/security tests/unit \
	  -n 2 --dist loadfile --cov --cov-report=
	@$(PY) -m pytest -m "not reliability" tests/reliability --cov --cov-append --cov-report=term:skip-covered
endif

test-reliability: $(STAMP) ## tests that kill, pause and starve processes
	@$(PY) -m pytest -m reliability --timeout 1800 $(PYTEST_ARGS)

docs: $(STAMP) ## generate the reference, build site/ from docs/; a broken link is an error
	@$(PY) -m docs.reference
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

RAY ?= 2.58.1
test-ray: $(STAMP) ## contract, stream, order and one training on another Ray: make test-ray RAY=2.58.1
	@[ -x .venv-ray-$(RAY)/bin/python ] || $(PY) -m venv --without-pip .venv-ray-$(RAY)
	@$(VENV)/bin/uv pip install --quiet --python .venv-ray-$(RAY)/bin/python --no-deps --only-binary :all: \
	  --require-hashes -r <(awk '/^[a-z]/ { keep = !/^ray==/ } keep' requirements.lock)
	@$(VENV)/bin/uv pip install --quiet --python .venv-ray-$(RAY)/bin/python --no-deps --only-binary :all: ray==$(RAY)
	@.venv-ray-$(RAY)/bin/python -m pytest -p no:cacheprovider tests/contract tests/integration/test_stream.py \
	  tests/integration/test_reads.py $(PYTEST_ARGS)

lint: $(STAMP) ## check style, format, types and the layers of the package
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

build: $(STAMP) ## build the wheel in dist/
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

format: $(STAMP) ## fix style and format
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: $(STAMP) ## run every benchmark that has a quick size, at it; BENCH_ARGS= for full size
	@for file in $$(grep -l '"--quick"' benchmarks/[a-z]*.py); do \
	  name=$$(basename "$$file" .py); echo "== benchmarks.$$name $(BENCH_ARGS)"; $(PY) -m "benchmarks.$$name" $(BENCH_ARGS); \
	done

lock: ## update requirements.lock from pyproject.toml
	@{ echo "# Exact versions with hashes: Linux x86-64, Python 3.11, run time and development. Made by \`make lock\`; do not edit."; \
	  $(VENV)/bin/uv pip compile pyproject.toml --quiet --extra dev --upgrade --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --strip-extras; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## remove caches and build outputs; keeps .venv and artifacts
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
