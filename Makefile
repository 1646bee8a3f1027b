# Every target makes .venv with pip when it is missing or pyproject.toml has changed; nothing is done twice.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run run-diffusion test test-ci test-slow bench lint docs locked lock
# whose build is the machine's own, CPU or CUDA of some version: CI takes torch by its version alone, and what comes with it
OF_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
# extras of what the docs run on a cluster's nodes: training, prepare, tune, infer, serve, benchmark, index-documents
ON_NODES := images curation tune serve benchmark retrieval gcp
UV ?= uv
COMPILE = $(UV) pip compile --quiet --generate-hashes --no-annotate --custom-compile-command 'make lock' pyproject.toml

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"heliostat needs Python 3.11 or later, not {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

run: .venv/.installed  ## prepare the quickstart's text, train on it, register the model, let it write
	$(BIN)/heliostat data prepare pipelines/quickstart.yaml
	$(BIN)/heliostat train jobs/quickstart.yaml --resume

run-diffusion: .venv/.installed  ## prepare handwritten digits, train a model that draws them, let it draw a seven
	$(BIN)/heliostat data prepare pipelines/quickstart-images.yaml
	$(BIN)/heliostat train jobs/quickstart-diffusion.yaml --resume
	$(BIN)/heliostat model generate models:/quickstart-diffusion/1 --prompt 'a handwritten seven' --grid 8 --out .heliostat/seven.png

test: .venv/.installed  ## unit and integration tests (tests/gpu skips itself without a GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit --numprocesses auto --dist worksteal --durations 10
	$(BIN)/python -m pytest tests/integration tests/gpu --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10

test-ci: .venv/.installed  ## what `make test` leaves to CI: the grids of stage, precision, layout and optimizer whole, and dear runs
	$(BIN)/python -m pytest tests/unit tests/integration -m ci --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

test-slow: .venv/.installed  ## chaos, several hosts made of network namespaces (as root), MLflow in a browser, sweeps: half an hour and more
	$(BIN)/python -m pytest tests/integration -m slow

# which want a model, an index or a corpus to be named
WITH_INPUT := curated curation_corpus curation_pipeline curation_stages dry_run fim infer infer_chaos minhash_recall planted_pairs retrieval
# no benchmarks themselves
SHARED := harness one_process planted_web

bench: .venv/.installed  ## the benchmarks behind docs/benchmarks/ that want no input, one after another (hours)
	for b in $(filter-out $(WITH_INPUT) $(SHARED),$(basename $(notdir $(wildcard tests/benchmarks/*.py)))); do \
		$(BIN)/python -m tests.benchmarks.$$b || exit 1; done

docs: .venv/.installed  ## the documentation as a site, build/docs/site; warnings, and whatever it would fetch from elsewhere, are errors
	$(BIN)/python -m docs.site.build

lint: .venv/.installed docs  ## ruff (lint, format), mypy, which rooms may import which (pyproject.toml), and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

locked:  ## .venv as CI has it: each package of the version and the hash in tests/requirements.lock, torch of the version in the image's
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep -o '^torch==[^ ]*' clusters/requirements.lock)"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement tests/requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv/.installed

lock:  ## writes both lock files anew, for what pyproject.toml has come to ask for; UPGRADE=--upgrade takes the newest versions
	$(COMPILE) $(UPGRADE) $(addprefix --extra ,$(ON_NODES)) --python-version 3.12 --python-platform x86_64-manylinux_2_39 \
		--output-file clusters/requirements.lock
	$(COMPILE) $(UPGRADE) --extra dev --universal --python-version 3.11 --constraint clusters/requirements.lock \
		$(addprefix --no-emit-package ,$(OF_TORCH)) --output-file tests/requirements.lock
