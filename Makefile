# Every target builds .venv first if it is not there; nothing else needs to be installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench gpu clean

demo: .venv/ready            ## four methods, three seeds, on two cores: table, summary.json, curves.png
	$(BIN)/python examples/qwen3_arithmetic.py --method all --seeds 0 1 2 --jobs 2 --out runs/demo

test: .venv/ready            ## everything, in random order, doctests included
	$(BIN)/python -m pytest -q

lint: .venv/ready            ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready           ## the study behind the learning rates of the demo
	$(BIN)/python -m benchmarks.lr_ceilings

gpu: OUT ?= runs/gpu
gpu:                         ## the tests and a run of the example on the accelerator of this machine, with its own torch
	mkdir -p $(OUT)
	$(PYTHON) -m pytest -q tests/test_device.py
	PYTHONPATH=. $(PYTHON) examples/qwen3_arithmetic.py --device cuda --steps 50 --out $(OUT)/qwen3_arithmetic

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	touch $@

clean:
	rm -rf .venv runs
