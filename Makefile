# Targets: demo, serve, test, test-all, parity, seeded, adjustments, kits, structured, soak, fuzz, bench, lint, clean.
# Everything lives in .venv, made once.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# OpenMP threads that spin for long stall when servers and tests share few cores.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo serve test test-all parity seeded adjustments kits structured soak fuzz bench lint clean

demo: .venv/.installed
	$(BIN)/python -m sglang_orthrus demo

serve: .venv/.installed
	$(BIN)/python -m sglang_orthrus serve

test: .venv/.test-extra
	$(BIN)/python -m pytest

test-all: .venv/.test-extra
	ORTHRUS_TESTS=all $(BIN)/python -m pytest

parity: .venv/.test-extra
	$(BIN)/python -m benchmarks.parity

seeded: .venv/.test-extra
	$(BIN)/python -m benchmarks.parity.seeded

adjustments: .venv/.test-extra
	ORTHRUS_TESTS=all $(BIN)/python -m pytest tests/e2e/test_adjustments.py

kits: .venv/.test-extra
	ORTHRUS_TESTS=all $(BIN)/python -m pytest tests/e2e/test_kits.py

structured: .venv/.test-extra
	$(BIN)/python -m benchmarks.structured cpu
	$(BIN)/python -m benchmarks.structured.walk benchmarks/results/walk-cpu.json
	ORTHRUS_TESTS=all $(BIN)/python -m pytest tests/e2e/test_grammar.py tests/e2e/test_grammar_setups.py

soak: .venv/.test-extra
	$(BIN)/python -m benchmarks.volume.soak

fuzz: .venv/.fuzz-extra
	$(BIN)/python -m benchmarks.volume.fuzz

bench: .venv/.bench-extra
	$(BIN)/python -m benchmarks.speed.sweep cpu
	$(BIN)/python -m benchmarks.speed.plot benchmarks/results/sweep-cpu.json docs/img

lint: .venv/.test-extra
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info

.venv/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e .
	@touch $@

.venv/.test-extra: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/.fuzz-extra: .venv/.test-extra
	$(BIN)/pip install --disable-pip-version-check -e '.[fuzz]'
	@touch $@

.venv/.bench-extra: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -e '.[bench]'
	@touch $@
