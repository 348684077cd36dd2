# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
QUICKSTART := $(patsubst %,recipes/quickstart/%.toml,teacher phase1 phase2 midtrain sft_general sft_reasoning)

.PHONY: quickstart test test-slow check benchmarks clean-outputs

quickstart: .venv/ready
	$(BIN)/cheaptrain prepare $(QUICKSTART)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no launch/run.py $(QUICKSTART)

test: .venv/ready
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -n 2 -m slow

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The exact versions tested stand in constraints.txt. torch first and by itself: a build for the CPU if one is at hand (a
# wheel folder that pip knows, then PyTorch's own index), because the default one brings gigabytes of CUDA. torchao lies apart,
# for its tests alone: wherever it is installed transformers imports it, and on a CPU it complains in every run. On a GPU
# machine install as README says instead.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-deps --no-index -c constraints.txt torch 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --no-deps --retries 1 --timeout 10 --index-url $(TORCH_CPU_INDEX) -c constraints.txt torch 2>/dev/null \
	  || echo "no CPU build of torch at hand: taking the default one"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/apart -c constraints.txt torchao
	touch .venv/ready
