# Every target builds .venv first if it is not there; nothing else needs to be installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test programs capabilities lint bench peers trainers gpu clean

demo: .venv/ready            ## four methods, three seeds, on two cores: table, summary.json, curves.png
	$(BIN)/python -m examples.qwen3_arithmetic --method all --seeds 0 1 2 --jobs 2 --out runs/demo

test: .venv/ready            ## everything, in random order, doctests included, on two cores
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

programs: .venv/ready        ## 20,000 random training programs against brute force; goes on where it was stopped
	mkdir -p runs
	PYTHONPATH=.:kernels:tests/helpers $(BIN)/python -m programs --programs 20000 --jobs 2 --resume runs/programs.json

# What looks at scripts, pages and compilers more than at numbers. Any other file runs, new ones too.
FEW_NUMBERS := tests/benchmarks tests/docs tests/examples tests/integrations tests/test_packaging.py \
	tests/kernels/test_cross_compilation.py tests/kernels/test_interpreter.py

capabilities: .venv/ready    ## whatever compares numbers, as CPUs without vectors and with AVX2 round them
	for capability in default avx2; do \
		ATEN_CPU_CAPABILITY=$$capability $(BIN)/python -m pytest -q -n 2 --dist worksteal \
			$(FEW_NUMBERS:%=--ignore=%) || exit 1; \
	done

lint: .venv/ready            ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready           ## minutes each; then the studies that train: three hours
	$(BIN)/python -m benchmarks.logprob_stats --out runs/bench --plot runs/bench/logprob_stats.png
	$(BIN)/python -m benchmarks.linear_logprob_stats --out runs/bench
	$(BIN)/python -m benchmarks.estimators --out runs/bench
	$(BIN)/python -m benchmarks.attach_overhead --out runs/bench
	$(BIN)/python -m benchmarks.baseline_speed --out runs/bench
	$(BIN)/python -m benchmarks.linear_grad_norms --out runs/bench
	$(BIN)/python -m benchmarks.per_sample_norms --out runs/bench
	$(BIN)/python -m benchmarks.proxy_fidelity --out runs/bench
	$(BIN)/python -m benchmarks.trl_grpo --out runs/bench
	$(BIN)/python -m benchmarks.baseline_variance
	$(BIN)/python -m benchmarks.learning_curves
	$(BIN)/python -m benchmarks.lr_ceilings
	$(BIN)/python -m benchmarks.lr_range

peers: .venv/ready           ## the code bases that `make bench` compares with and `make trainers` tests, where they are missing
	$(BIN)/pip install -q -c constraints.txt trl liger-kernel 'ray[default]' tensordict hydra-core codetiming orjson
	$(BIN)/pip install -q -c constraints.txt torchdata wrapt TransferQueue==0.1.10 cachetools fastapi uvicorn
	$(BIN)/pip install -q -c constraints.txt opacus einops unfoldnd
	$(BIN)/pip install -q --no-deps backpack-for-pytorch==1.7.1 # it wants torchvision, which it needs for examples only
	$(BIN)/pip install -q --no-deps cut-cross-entropy==25.1.1
	$(BIN)/pip install -q --no-deps verl==0.9.1 # its pins are older than ours; what is used of it needs none

trainers: peers              ## the integrations, in verl and in the last three minor releases of TRL
	$(BIN)/python -c 'import trl, wrapt, verl.trainer.ppo.v1' # without them their tests would be skipped
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/integrations tests/examples/test_verl_grpo.py tests/examples/test_trl_grpo.py
	for version in 1.14.2 1.15.0; do \
		export TRITON_INTERPRET=1 PYTHONPATH=.venv/trl-$$version:.:kernels && \
		$(BIN)/pip install -q --no-deps --upgrade --target .venv/trl-$$version trl==$$version && \
		$(BIN)/python -c "import trl; assert trl.__version__ == '$$version', trl.__version__" && \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/integrations/test_trl.py || exit 1; \
	done

gpu: OUT ?= runs/gpu
gpu:                         ## tests and benchmarks on the accelerator of this machine, with its own torch; see docs/gpu.md
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu --device cuda --out $(OUT) $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	touch $@

clean:
	rm -rf .venv runs
