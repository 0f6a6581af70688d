# Two commands: `make train` and `make test`. Each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads of one process; launched ranks share the cores.
export OMP_NUM_THREADS ?= $(shell n=$$(nproc); echo $$((n > 8 ? 8 : n)))

.PHONY: train test soak clean

train: $(VENV)/.train
	$(BIN)/hybrid-dist synth data/quickstart --train 8000 --val 600 --seed 0 --workers 2
	$(BIN)/accelerate launch --config_file launch/accelerate/single_gpu.yaml train.py --config configs/quickstart.yaml

# One thread: the tests' models are tiny, and their bits are not to depend on the machine's cores. Two files at a time,
# in their order: the long ones don't come last.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST)

# What takes long: the slow tests.
soak: $(VENV)/.test
	$(BIN)/python -m pytest -m slow $(PYTEST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hybrid-dist needs Python 3.11 or newer; PYTHON=… names one")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
