# make demo: train, evaluate, judge and sample a small model on bundled data.  make test: the tests.
# make browser: report.html in a Chromium, installed where there is none (as root, by apt-get).
# make faults: the fault campaign, which writes benchmarks/FAULTS.md; half an hour or so on 2 cores.
# make bench NANOGPT=path/of/a/nanoGPT/checkout: our speed beside others' on this CPU.
# make bench-gpu NANOGPT=...: the same on a GPU, for config/1b.py and config/500m.py.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles what is imported anyway; pip would compile all there is, and take twice as long.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
BENCHMARKS := $(RUN) -m benchmarks
NANOGPT ?= ../nanoGPT

.PHONY: demo test browser faults bench bench-gpu lint venv clean

demo: $(VENV)/.runtime
	rm -rf out/demo
	$(RUN) data/make_sample.py --to=data/sample.jsonl
	$(RUN) prepare.py --source=data/sample.jsonl --data_dir=data/demo
	$(RUN) train.py config/demo.py
	$(RUN) eval_ppl.py --run=out/demo
	$(RUN) -m verdict --run=out/demo --max_new_tokens=16 --tasks=
	$(RUN) sample.py --run=out/demo --prompts=data/demo/val.bin --temperature=0 --max_new_tokens=12

test: $(VENV)/.development lint
	$(RUN) -m pytest -n 2 --dist worksteal

browser: $(VENV)/.development
	command -v chromium || apt-get install -y --no-install-recommends chromium
	$(RUN) -m pytest tests/verdict/test_browser.py

faults: $(VENV)/.development
	$(RUN) -m pytest tests/faults --campaign

bench: $(VENV)/.benchmarks
	$(BENCHMARKS).compare_training --nanogpt=$(NANOGPT)
	$(BENCHMARKS).compare_sampling --nanogpt=$(NANOGPT)
	$(BENCHMARKS).compare_evaluation
	$(BENCHMARKS).compare_startup --nanogpt=$(NANOGPT)

bench-gpu: $(VENV)/.benchmarks
	for size in 500m 1b; do \
	  $(BENCHMARKS).step config/$$size.py --micro_batch_size=auto --json=out/bench-$$size.json \
	    --profile=out/bench-$$size && \
	  $(BENCHMARKS).step config/$$size.py --micro_batch_size=auto --dtype=bfloat16 \
	    --json=out/bench-$$size-bfloat16.json && \
	  $(BENCHMARKS).step config/$$size.py --micro_batch_size=auto --optimizer=muon \
	    --json=out/bench-$$size-muon.json && \
	  $(BENCHMARKS).compare_training --nanogpt=$(NANOGPT) --device=cuda --pairs=3 \
	    --config=config/$$size.py --json=out/training-$$size.json || exit 1; \
	done
	$(BENCHMARKS).compare_sampling --nanogpt=$(NANOGPT) --device=cuda --config=config/500m.py
	$(BENCHMARKS).compare_evaluation --device=cuda --config=config/500m.py

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
