# Run `make help` for the targets.

PYTHON ?= python3
# For a CPU-only torch, without its 5 GB of GPU libraries: make setup TORCH_BACKEND=cpu
TORCH_BACKEND ?=
BIN := .venv/bin
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python \
	$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))
DEMO := runs/demo

.PHONY: help setup demo test gpu stress format

help:
	@echo "make setup    create .venv and install what users need (TORCH_BACKEND=cpu: no GPU libraries)"
	@echo "make demo     train, evaluate and draw a small ladder on 8x8 digits, in two minutes"
	@echo "make test     check format, lint and types, and run the tests, in five minutes"
	@echo "make gpu      run the tests of training and evaluation on a GPU"
	@echo "make stress   run the kill-and-resume campaigns and the long fuzzing"
	@echo "make format   format the code"

setup: .venv/.installed

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: requirements.txt | .venv/bin/uv
	$(INSTALL) -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(INSTALL) -r requirements-dev.txt
	@touch $@

demo: setup
	@rm -rf $(DEMO)
	@$(BIN)/python train_svi.py --preset digits --out $(DEMO)
	@$(BIN)/python evaluate.py $(DEMO) --samples 1 100
	@echo "monitor   $(BIN)/tensorboard --logdir $(DEMO)"

test: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest -n auto --dist worksteal

# Without the tests that fork.
gpu: .venv/.installed-dev
	LVAE_TEST_GPU=1 $(BIN)/python -m pytest -n 4 tests/networks tests/evaluation tests/story \
		$(addprefix tests/training/test_,cuda_graph.py svi.py muon.py trainer.py fine_tuning.py) \
		$(addprefix tests/scripts/test_,train_svi.py evaluate.py sample.py)

stress: .venv/.installed-dev
	$(BIN)/python -m pytest tests/stress

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
