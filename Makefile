# Everything a newcomer types. Each target sets up what it needs; running it again is fast.
# PYTHON chooses the interpreter (3.11 or 3.12), CORES the number of cores Snakemake may use.
PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: setup demo rehearsal test lint bench clean help image image-test cluster-test

help:
	@echo "make demo   handwritten digits through the whole pipeline: a MixFlow table and figures in minutes"
	@echo "make rehearsal   the ImageNet tables in miniature: every rule on small random stand-ins, in folder rehearsal/ (TABLES= for others)"
	@echo "make test   unit, golden and end-to-end tests (FAST=1 leaves out the slow ones)"
	@echo "make lint   ruff, mypy, snakefmt, snakemake --lint"
	@echo "make cluster-test   kills and cuts on a Slurm cluster of this machine, thrown away at the end (docs/reliability.md)"
	@echo "make bench  speed, each as a ratio against a named baseline"
	@echo "make image  the container image (docs/container.md); make image-test checks it as any user, read-only, offline"
	@echo "make clean  remove what runs left behind (results/, scratch/, logs/)"

# The stamp is younger than the lock exactly when the environment matches it.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"mixflow needs Python 3.11 or 3.12, found {v[0]}.{v[1]}: call make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes --requirements requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	$(BIN)/python -m compileall -q mixflow
	touch $@

setup: $(VENV)/.installed

# The environment as the jobs see it: `python`, `torchrun` and `snakemake` are those of .venv.
export PATH := $(CURDIR)/$(BIN):$(PATH)

demo: setup
	@workflow/clear_stale_lock.sh
	@start=$$SECONDS; snakemake --cores $(CORES) digits && \
	  echo "done in $$((SECONDS - start)) s: results/tables/digits.html (and .md), figures in results/tables/digits/"

# Together these pass through every rule that ImageNet needs; others are rehearsed by `make rehearsal TABLES="table4 gamma"`.
TABLES ?= main table8 imagenet512 other_metrics figure1

# In a folder of its own, for its tables are called as the real ones.
rehearsal: setup
	@mkdir -p rehearsal
	@start=$$SECONDS; snakemake $(TABLES) --profile local --configfile rehearsal.yaml --directory rehearsal && \
	  echo "done in $$((SECONDS - start)) s: $(TABLES) are in rehearsal/results/tables/ and rehearsal/results/slow_flow/"

test: setup
	pytest --numprocesses $(CORES) --durations 15 $(if $(FAST),-m "not slow")

lint: setup
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

bench: setup
	python benchmarks/frechet.py
	python benchmarks/precision_recall.py --reference 2000 --samples 10000
	python benchmarks/inception.py
	python benchmarks/evaluate_memory.py --images 5000 --reference-images 3000
	python benchmarks/sde_calls.py
	python benchmarks/repa_sde.py
	python benchmarks/autoguidance.py
	python benchmarks/training_step.py
	python benchmarks/image_to_step.py
	python benchmarks/loader.py

# DOCKER is the engine's command, IMAGE the name to build, BASE another image to build on, BUILD_FLAGS more for `docker build`.
DOCKER ?= docker
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= localhost/mixflow:$(VERSION)
# The host's certificates, as a build secret: behind a proxy that signs anew, nothing can be installed without them.
CERTIFICATES := $(wildcard /etc/ssl/certs/ca-certificates.crt)

image:
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git describe --always --abbrev=40 --dirty --exclude='*' || echo unknown) \
	  $(CERTIFICATES:%=--secret id=ca,src=%) $(BUILD_FLAGS) .

image-test:
	@if $(DOCKER) info >/dev/null 2>&1; then $(MAKE) image && DOCKER=$(DOCKER) tests/image/check.sh $(IMAGE); \
	else echo "image-test skipped: no container engine answers '$(DOCKER) info'"; fi

# CLUSTER_TEST="--times 3 --write docs/reliability.md" makes the table of that page.
cluster-test: setup
	python -m tests.cluster.faults $(CLUSTER_TEST)

clean:
	rm -rf rehearsal results/downloads results/latents results/checkpoints results/extractors results/references results/samples results/metrics \
	  results/tables results/report results/slow_flow results/clocks results/theory scratch logs .snakemake
