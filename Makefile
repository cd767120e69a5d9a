# make demo: train, evaluate, judge and sample a small model on bundled data.  make test: the tests.
# make browser: report.html in a Chromium, installed where there is none (as root, by apt-get).
# make faults: the fault campaign, which writes benchmarks/FAULTS.md; 35 minutes on 2 cores.
# make clients: a small model in other programs, each in an environment of its own (5 GB); writes
#   benchmarks/CLIENTS.md. RUN_DIR=out/500m takes another run.
# make bench NANOGPT=path/of/a/nanoGPT/checkout: our speed beside others' on this CPU.
# make gpu: 9 minutes on one GPU, which write benchmarks/GPU.md; nanoGPT beside it with NANOGPT=PATH.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles what is imported anyway; pip would compile all there is, and take twice as long.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
BENCHMARKS := $(RUN) -m benchmarks
NANOGPT ?= ../nanoGPT
RUN_DIR ?= out/clients/run

.PHONY: demo demo-data test browser faults clients bench gpu lint venv clean

demo: demo-data
	rm -rf out/demo
	$(RUN) train.py config/demo.py
	$(RUN) -m verdict --run=out/demo --max_new_tokens=16 --tasks=
	$(RUN) sample.py --run=out/demo --prompts=data/demo/val.bin --temperature=0 --max_new_tokens=12

demo-data: $(VENV)/.runtime
	$(RUN) data/make_sample.py --to=data/sample.jsonl
	$(RUN) prepare.py --source=data/sample.jsonl --data_dir=data/demo

test: $(VENV)/.development lint
	$(RUN) -m pytest -n 2 --dist worksteal

browser: $(VENV)/.development
	command -v chromium || apt-get install -y --no-install-recommends chromium
	$(RUN) -m pytest tests/verdict/test_browser.py

faults: $(VENV)/.development
	$(RUN) -m pytest tests/faults -n 2 --dist worksteal --campaign

clients: $(VENV)/.development $(RUN_DIR)
	$(RUN) tests/clients/compare.py --run=$(RUN_DIR) --venvs=.venv-clients

# The demo's model, but with a loss on every token: perplexity is compared over all of them.
out/clients/run: | demo-data
	$(RUN) train.py config/demo.py --loss_on=all --max_steps=100 --out_dir=$@

bench: $(VENV)/.benchmarks
	$(BENCHMARKS).compare_training --nanogpt=$(NANOGPT)
	$(BENCHMARKS).compare_sampling --nanogpt=$(NANOGPT)
	$(BENCHMARKS).compare_evaluation
	$(BENCHMARKS).compare_startup --nanogpt=$(NANOGPT)

# By the environment that is there: a GPU's machine may have no network to install from.
gpu:
	$(or $(wildcard $(RUN)),$(PYTHON)) -m benchmarks.gpu $(if $(wildcard $(NANOGPT)/train.py),--nanogpt=$(NANOGPT))

lint: $(VENV)/.development
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

venv: $(VENV)/.runtime

$(VENV)/.runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanosynth needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/.development: requirements-dev.txt $(VENV)/.runtime
	$(INSTALL) -r requirements-dev.txt
	touch $@

$(VENV)/.benchmarks: benchmarks/requirements.txt $(VENV)/.development
	$(INSTALL) -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) out/demo data/demo data/sample.jsonl
