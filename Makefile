# Every target makes .venv with pip when it is missing or pyproject.toml has changed; nothing is done twice.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run run-diffusion test test-slow bench lint

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"heliostat needs Python 3.11 or later, not {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

run: .venv/.installed  ## prepare the quickstart's text, train on it, register the model, let it write
	$(BIN)/heliostat prepare pipelines/quickstart.yaml
	$(BIN)/heliostat train jobs/quickstart.yaml --resume

run-diffusion: .venv/.installed  ## prepare handwritten digits, train a model that draws them, let it draw a seven
	$(BIN)/heliostat prepare pipelines/quickstart-images.yaml
	$(BIN)/heliostat train jobs/quickstart-diffusion.yaml --resume
	$(BIN)/heliostat generate models:/quickstart-diffusion/1 --prompt 'a handwritten seven' --grid 8 --out .heliostat/seven.png

test: .venv/.installed  ## unit and integration tests (tests/gpu skips itself without a GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit --numprocesses auto --dist worksteal
	$(BIN)/python -m pytest tests/integration tests/gpu

test-slow: .venv/.installed  ## chaos, several hosts made of network namespaces (as root), MLflow in a browser, sweeps: half an hour and more
	$(BIN)/python -m pytest tests/integration -m slow

bench: .venv/.installed  ## the benchmarks behind docs/benchmarks/, one after another (hours)
	for b in tests/benchmarks/*.py; do $(BIN)/python $$b || exit 1; done

lint: .venv/.installed  ## ruff (lint, format), mypy, and which rooms may import which (pyproject.toml)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
