# Every target makes the environment it needs first (test-gpu takes the one at hand); `make help` lists them.
#   RECIPE=demo|1.3b|7b|smollm2|llama3.1-8b   TO=<extension stage>   CKPT=<Hugging Face folder, default that of TO, else the newest>
#   GPUS=<per node>   ARGS="key=value ..."

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= demo
GPUS ?=
ARGS ?=
GATE ?=
TASKS ?=
HELDOUT ?=
WORKERS ?= 2
# the extension stages of the recipe, shortest first: extend-2k.yaml -> 2k
STAGES := $(shell ls recipes/$(RECIPE)/extend-*.yaml 2>/dev/null | sed 's/.*extend-\(.*\)\.yaml/\1/' | sort -n)
TO ?= $(firstword $(STAGES))
# the stage TO where it is named, else the newest that has been exported, unless CKPT says otherwise
IS_STAGE_NAMED = $(filter command environment,$(firstword $(origin TO)))
EXPORTED = $(wildcard $(foreach s,$(shell printf '%s\n' $(STAGES) | sort -rn),runs/$(RECIPE)/extend-$(s)/hf))
FIRST = $(if $(wildcard recipes/$(RECIPE)/pretrain.yaml),pretrain,$(if $(TO),extend-$(TO),pretrain))
CKPT ?=
AT_CKPT = $(or $(CKPT),$(if $(IS_STAGE_NAMED),runs/$(RECIPE)/extend-$(TO)/hf,$(firstword $(EXPORTED) runs/$(RECIPE)/$(FIRST)/hf)))
# a path, whatever is in it, as one word of a command
quoted = '$(subst ','\'',$(patsubst ~/%,$(HOME)/%,$(1)))'
AT_HAND = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
DEVICES := $(if $(GPUS),trainer.devices=$(GPUS))
export TOKENIZERS_PARALLELISM ?= true

# what `data`, `tokenizer` and `data-report` work on: the recipe's stage, or SOURCES into OUT
STAGE := recipes/$(RECIPE)/$(if $(IS_STAGE_NAMED),extend-$(TO),pretrain).yaml
PREPARE = $(if $(SOURCES),--sources $(foreach s,$(SOURCES),$(call quoted,$(s))) --output $(call quoted,$(or $(OUT),$(error SOURCES needs OUT=<folder>))) \
	$(if $(TOKENIZER),--tokenizer $(call quoted,$(TOKENIZER))),--recipe $(STAGE))

.PHONY: help setup test test-all test-gpu verify mutants lint demo data tokenizer data-report pretrain extend gate generate eval suite layers rope needle report results bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo '  settings: RECIPE=$(RECIPE) TO=$(TO) CKPT=$(AT_CKPT) GPUS=$(GPUS) ARGS="key=value ..."'

setup: ## make .venv with everything installed
	@wanted=$$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-32); \
	if [ "$$(cat $(VENV)/.ready 2>/dev/null)" = "$$wanted" ]; then exit 0; fi; \
	if [ -z '$(filter setup,$(MAKECMDGOALS))' ] && [ -n "$${SLURM_JOB_ID:-}" ]; then \
		echo 'error: $(VENV) is missing or was set up from another pyproject.toml, and a SLURM job installs nothing: run `make setup` on the login node' >&2; exit 2; fi; \
	if [ -z '$(filter setup,$(MAKECMDGOALS))' ] && [ -e $(VENV) ] && [ ! -e $(VENV)/.ready ]; then \
		echo 'error: $(VENV) was not set up by this Makefile, so nothing is installed into it: run `make setup VENV=$(VENV)` to do so, or choose another VENV' >&2; exit 2; fi; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo 'installing into $(VENV) (a few minutes the first time)'; echo unfinished >$(VENV)/.ready; \
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	echo "$$wanted" >$(VENV)/.ready

DEMO := runs/demo/start/needle.json runs/demo/extend-2k/results/needle.json

demo: setup ## the whole recipe on this machine: pretrain, extend, lm-eval table, needle heatmaps before and after
	$(MAKE) pretrain RECIPE=demo
	$(MAKE) extend RECIPE=demo TO=2k
	$(MAKE) eval RECIPE=demo TO=2k CKPT=runs/demo/extend-2k/hf
	$(MAKE) needle CKPT=recipes/demo/start ARGS="--lengths 256,512,1k,2k --beyond --haystack runs/demo/data/heldout \
		--no-generate --output $(firstword $(DEMO))"
	$(BIN)/python -m eval.heatmap $(DEMO) --output runs/demo/needle-before-after.png \
		--titles 'before: as pretrained at 512' 'after: extended to 2k here'

data: setup ## token shards of RECIPE (TO), or SOURCES="path ..." OUT=dir [TOKENIZER=file or folder] [ARGS="--eos '</s>'"]
	$(BIN)/python -m data.prepare $(PREPARE) $(ARGS)

tokenizer: setup ## only the tokenizer of RECIPE (TO), or SOURCES="path ..." OUT=dir ARGS="--vocab-size 32768"
	$(BIN)/python -m data.prepare $(PREPARE) --only-tokenizer $(ARGS)

data-report: setup ## what is in the data of RECIPE (TO), or in OUT=dir: report/report.md and plots beside the shards
	$(BIN)/python -m data.report $(if $(OUT),--output $(call quoted,$(OUT)),--recipe $(STAGE)) $(ARGS)

pretrain: setup ## pretrain RECIPE (resumes by itself; does nothing when finished), then measure its gate, if it has one (GATE=no: do not)
	$(BIN)/python -m s2.training.cli recipes/$(RECIPE)/pretrain.yaml $(DEVICES) $(ARGS)
	@$(call measure,pretrain)

extend: setup ## extend RECIPE's last stage to the context length TO, then measure its gate, if it has one (GATE=no: do not)
	@test -n '$(TO)' || { echo 'error: recipes/$(RECIPE) has no extend-*.yaml; recipes that have: $(sort $(patsubst recipes/%/,%,$(dir $(wildcard recipes/*/extend-*.yaml))))'; exit 2; }
	$(BIN)/python -m s2.training.cli recipes/$(RECIPE)/extend-$(TO).yaml $(DEVICES) $(ARGS)
	@$(call measure,extend-$(TO))

# the gate of a stage of RECIPE, where there is one, unless GATE=no; not of a run that ARGS has given another folder
THRESHOLDS = recipes/$(RECIPE)/gates/$(1).yaml
ELSEWHERE = $(filter run.root=% run.recipe=% run.stage=%,$(ARGS))
measure = $(if $(filter no,$(GATE)),:,if [ -f $(THRESHOLDS) ]; then $(if $(ELSEWHERE), \
	echo 'ARGS gives the run a folder of its own and its gate is not measured; make gate CKPT=<folder>/hf CONFIG=$(THRESHOLDS) does that', \
	if [ -d runs/$(RECIPE)/$(1)/hf ]; then \
	$(MAKE) --no-print-directory gate RECIPE=$(RECIPE) CKPT=runs/$(RECIPE)/$(1)/hf CONFIG= ARGS=; fi); fi)

gate: setup ## CKPT against the thresholds of CONFIG (default: recipes/RECIPE/gates/<stage>.yaml), into gate.json; stages with run.gate=required begin only from what has passed; EVAL_DATA=<folder of jsonl> for its tasks, else the hub
	$(BIN)/python -m eval.gate --ckpt $(call quoted,$(AT_CKPT)) \
		--config $(call quoted,$(or $(CONFIG),recipes/$(RECIPE)/gates/$(notdir $(patsubst %/hf,%,$(AT_CKPT))).yaml)) \
		$(if $(EVAL_DATA),--data-dir $(call quoted,$(EVAL_DATA))) $(ARGS)

generate: setup ## continue PROMPT="some text" with CKPT, without PROMPT standard input: ARGS="--max-new-tokens 200 --temperature 0.7 --chat"
	@$(if $(CKPT),:,echo $(call quoted,checkpoint: $(AT_CKPT)) >&2)
	@$(BIN)/python -m s2.inference.cli --ckpt $(call quoted,$(AT_CKPT)) $(if $(filter command,$(firstword $(origin PROMPT))),--prompt "$$PROMPT") $(ARGS)

eval: setup ## lm-eval table of CKPT: TASKS=hellaswag,piqa, EVAL_DATA=<folder of jsonl>; without TASKS our own tasks and the heatmap (HELDOUT=<text or shards> of a checkpoint of others)
	@test -z $(call quoted,$(EVAL_DATA)) -o -n '$(TASKS)' || { echo $(call quoted,error: EVAL_DATA=$(EVAL_DATA) needs TASKS=<stock tasks>); exit 2; }
	$(BIN)/python -m eval.lm --ckpt $(call quoted,$(AT_CKPT)) $(if $(TASKS),--tasks $(TASKS)) $(if $(EVAL_DATA),--data-dir $(call quoted,$(EVAL_DATA))) \
		$(if $(HELDOUT),$(if $(TASKS),,--heldout $(call quoted,$(HELDOUT)))) $(ARGS)
	$(if $(TASKS),,$(MAKE) needle CKPT=$(call quoted,$(AT_CKPT)) HELDOUT=$(call quoted,$(HELDOUT)) ARGS=)

suite: setup ## needle, RULER, loss by position and TASKS of CKPT in one table: LENGTHS=4k,8k HAYSTACK=<text> DOCUMENTS=<text> EVAL_DATA=<folder> GPUS=<processes>
	$(BIN)/python -m eval.suite --ckpt $(call quoted,$(AT_CKPT)) $(if $(LENGTHS),--lengths $(LENGTHS)) $(if $(HAYSTACK),--haystack $(call quoted,$(HAYSTACK))) \
		$(if $(DOCUMENTS),--documents $(call quoted,$(DOCUMENTS))) $(if $(TASKS),--tasks $(TASKS)) $(if $(EVAL_DATA),--data-dir $(call quoted,$(EVAL_DATA))) \
		$(if $(GPUS),--processes $(GPUS)) $(ARGS)

layers: setup ## which DENSE=5 layers of the dense checkpoint CKPT stay dense under LAYOUT=L8V12+sink1, by losses without training: HAYSTACK=<text> DOCUMENTS=<text>
	@test -n '$(and $(LAYOUT),$(DENSE))' || { echo 'error: name the sparse layout and the number of dense layers; for example LAYOUT=L8V12+sink1 DENSE=5'; exit 2; }
	$(BIN)/python -m eval.layers --ckpt $(call quoted,$(AT_CKPT)) --layout $(call quoted,$(LAYOUT)) --dense $(DENSE) $(if $(HAYSTACK),--haystack $(call quoted,$(HAYSTACK))) \
		$(if $(DOCUMENTS),--documents $(call quoted,$(DOCUMENTS))) $(ARGS)

rope: setup ## which RoPE the checkpoint CKPT begins its extension to LENGTHS=8k,16k,32k with, by losses without training: HAYSTACK=<text> DOCUMENTS=<text>
	$(BIN)/python -m eval.rope --ckpt $(call quoted,$(AT_CKPT)) $(if $(LENGTHS),--lengths $(LENGTHS)) $(if $(HAYSTACK),--haystack $(call quoted,$(HAYSTACK))) \
		$(if $(DOCUMENTS),--documents $(call quoted,$(DOCUMENTS))) $(ARGS)

needle: setup ## needle-in-a-haystack heatmap of CKPT
	$(BIN)/python -m eval.needle --ckpt $(call quoted,$(AT_CKPT)) $(if $(HELDOUT),--haystack $(call quoted,$(HELDOUT))) $(ARGS)

report: setup ## runs side by side: RUNS="runs/a/b runs/a/c" into OUT=runs/report.html and .md, or FRONT=front.png (heatmaps with a table below)
	@test -n '$(RUNS)' || { echo 'error: RUNS names no run folder; for example RUNS="runs/demo/pretrain runs/demo/extend-2k"'; exit 2; }
	$(BIN)/python -m eval.report $(RUNS) $(if $(FRONT),--front $(call quoted,$(FRONT)),--output $(call quoted,$(or $(OUT),runs/report.html))) $(ARGS)

results: setup ## the experiment NAME=patterns|scale|scale-32k|smollm2 over GPUS, page into docs/results/: ARGS="--minutes 27", "--status"
	@test -n '$(NAME)' || { echo 'error: NAME names no experiment; there are $(notdir $(patsubst %/plan.yaml,%,$(wildcard recipes/experiments/*/plan.yaml)))'; exit 2; }
	$(BIN)/python scripts/results.py $(NAME) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

test: setup ## the test suite, no GPU needed (WORKERS processes)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not gpu and not nightly' $(ARGS)

test-all: setup ## the same with its nightly tests, and ten random cases of damage and kills
	S2_RANDOM_CASES=10 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not gpu' $(ARGS)

test-gpu: ## the tests of attention, generation and integrations on a CUDA device, with the environment at hand (PYTHON=...) or .venv
	$(AT_HAND) -m pytest -q -n $(WORKERS) --dist worksteal \
		tests/attention tests/model/test_triton_op.py tests/inference/test_gpu_*.py tests/integrations/test_gpu_*.py $(ARGS)

verify: ## check the attention of every recipe, or of RECIPE, on this machine's GPU, with the environment at hand or .venv
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(AT_HAND) scripts/verify.py $(if $(filter command environment,$(firstword $(origin RECIPE))),$(RECIPE)) $(ARGS)

mutants: ## whether the tests notice faults put into copies of the tree (ARGS=--gpu: those of the CUDA kernels)
	$(AT_HAND) tests/mutants.py $(ARGS)

lint: setup ## ruff (check and format) and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup ## time the kernels beside their baselines on this GPU, report into docs/benchmarks/
	$(BIN)/python scripts/bench_attention.py $(ARGS)

clean: ## remove .venv, caches and build products (never runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
