# Run it:   demo, serve, play (a page that shows both answers side by side).
# Check it: check (linters, types, unit and contract tests), test (check, and the servers), test-all (the slow tests, too).
#           Parts of test-all, with figures: parity, seeded, adjustments, kits, structured, soak, fuzz.
# Others:   lint, style, types, bench, clean; clients (installs other people's clients, and SGLang's router, for test-all),
#           tokenizer (fetches Qwen3's, for grammars on the real vocabulary).
# Everything lives in .venv and .venv-clients, made once.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# Tests that share no servers run in as many processes as there are cores.
PYTEST := $(BIN)/python -m pytest
BESIDE := -n logical --maxprocesses 4 --dist loadfile tests/unit tests/contract
# OpenMP threads that spin for long stall when servers and tests share few cores.
export GOMP_SPINCOUNT ?= 10000

# Each has an environment of its own, since SGLang pins openai and others exactly.
REQUIREMENTS := $(wildcard tests/clients/requirements-*.txt tests/router/requirements-*.txt)
CLIENTS := $(patsubst requirements-%.txt,.venv-clients/%/.installed,$(notdir $(REQUIREMENTS)))
vpath requirements-%.txt tests/clients tests/router

.PHONY: demo serve play check test test-all clients parity seeded adjustments kits structured tokenizer soak fuzz bench lint style types clean
# What fails within seconds comes first.
.NOTPARALLEL:

demo: .venv/.installed
	$(BIN)/python -m sglang_orthrus demo

serve: .venv/.installed
	$(BIN)/python -m sglang_orthrus serve

play: .venv/.installed
	$(BIN)/python -m sglang_orthrus play

check: lint
	$(PYTEST) -m "not slow" $(BESIDE)

test: check
	$(PYTEST) -m "not slow" tests/e2e tests/gpu

test-all: lint clients .venv/.slow-extra
	$(PYTEST) $(BESIDE)
	$(PYTEST) tests/e2e tests/gpu

clients: $(CLIENTS)

parity: .venv/.test-extra
	$(BIN)/python -m benchmarks.parity

seeded: .venv/.test-extra
	$(BIN)/python -m benchmarks.parity.seeded

adjustments: .venv/.test-extra
	$(PYTEST) tests/e2e/test_adjustments.py

kits: .venv/.test-extra
	$(PYTEST) tests/e2e/test_kits.py

structured: .venv/.test-extra
	$(BIN)/python -m benchmarks.structured cpu
	$(BIN)/python -m benchmarks.structured.walk benchmarks/results/walk-cpu.json
	$(PYTEST) tests/e2e/test_grammar.py tests/e2e/test_grammar_setups.py

tokenizer: .venv/.installed
	$(BIN)/python -m benchmarks.common.qwen3_tokenizer

soak: .venv/.test-extra
	$(BIN)/python -m benchmarks.volume.soak

fuzz: .venv/.fuzz-extra
	$(BIN)/python -m benchmarks.volume.fuzz

bench: .venv/.bench-extra
	$(BIN)/python -m benchmarks.speed.sweep cpu
	$(BIN)/python -m benchmarks.speed.plot benchmarks/results/sweep-cpu.json docs/img

lint: style types

style: .venv/.ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test-extra
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-clients .mypy_cache .pytest_cache .ruff_cache build *.egg-info

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# Before SGLang, which takes minutes to install.
.venv/.ruff: .venv/.made pyproject.toml
	$(BIN)/pip install --disable-pip-version-check "$$(grep -o 'ruff==[0-9.]*' pyproject.toml)"
	@touch $@

.venv/.installed: .venv/.made pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -e .
	@touch $@

.venv/.test-extra: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/.fuzz-extra: .venv/.test-extra
	$(BIN)/pip install --disable-pip-version-check -e '.[fuzz]'
	@touch $@

.venv/.slow-extra: .venv/.test-extra
	$(BIN)/pip install --disable-pip-version-check -e '.[play,package,fuzz]'
	@touch $@

.venv/.bench-extra: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -e '.[bench]'
	@touch $@

.venv-clients/%/.installed: requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -r $<
	@touch $@
