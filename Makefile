# Every target works as the first command after a clone; `make` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHAIN := tools/chain
# The binary itself: the launcher that npm puts in .bin exits with 0 when tests fail.
FORGE := ../../$(CHAIN)/node_modules/@foundry-rs/forge-*/bin/forge
PACKAGES := protocol models market rl contracts provenance network worker orchestrator client
STAMP := $(VENV)/.installed
CHAIN_STAMP := $(CHAIN)/node_modules/.installed
PROVERS := .venv-contracts
PROVERS_STAMP := $(PROVERS)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo check test test-slow contracts contracts-check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(CHAIN_STAMP) ## install Shoal, its tools and the chain's, in this folder

demo: setup ## run a whole job on this machine: chain, market, workers, learning, payment
	$(BIN)/shoal demo

check: setup ## format, lint, types, import rules, sizes, unit and property tests: a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=tests:tools $(BIN)/mypy $(PACKAGES:%=%/shoal) tests tools benchmarks
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py $(PACKAGES) tests tools benchmarks
	$(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadscope tests/unit tests/property

test: check contracts-check ## everything CI runs: both checks, then integration and end-to-end tests
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/integration
	$(BIN)/python -m pytest -q -m "not slow" tests/e2e

test-slow: setup ## the tests that take longer than a minute each, and those against TRL
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev,peer]"
	$(BIN)/python -m pytest -q -m slow tests

contracts: setup ## compile the contracts, renew what the wheel ships of them, test them
	$(BIN)/python -m shoal.contracts.build
	cd contracts/solidity && $(FORGE) test --offline

contracts-check: setup $(PROVERS_STAMP) ## forge tests, gas ceilings, halmos proofs, slither: three minutes
	$(BIN)/python tools/check_contracts.py $(PROVERS)

bench: setup ## what the market costs over the same updates in one process
	$(BIN)/python -m benchmarks.overhead

clean: ## remove everything `make` made, the environment included
	rm -rf $(VENV) $(PROVERS) $(CHAIN)/node_modules build dist runs
	rm -rf contracts/solidity/out contracts/solidity/cache
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an installation that was interrupted is begun again.
$(STAMP): pyproject.toml constraints.txt tools/system_parts.sh
	PYTHON="$(PYTHON)" sh tools/system_parts.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev]"
	touch $@

$(CHAIN_STAMP): $(CHAIN)/package.json $(CHAIN)/package-lock.json tools/system_parts.sh
	PYTHON="$(PYTHON)" sh tools/system_parts.sh
	npm ci --prefix $(CHAIN) --ignore-scripts --no-audit --no-fund
	touch $@

$(PROVERS_STAMP): $(CHAIN)/requirements.txt
	$(PYTHON) -m venv --clear $(PROVERS)
	$(PROVERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement $(CHAIN)/requirements.txt || { \
		echo "halmos and slither could not be installed from $(CHAIN)/requirements.txt;" \
			"without them the contracts are tested but not proved." >&2; exit 1; }
	touch $@
