# make setup   create .venv and install everything into it
# make demo    train, evaluate and draw a small ladder on 8x8 digits
# make test    format, lint, types and tests

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: setup demo test format

setup: .venv/.installed

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@touch $@

demo: setup
	@rm -rf $(DEMO)
	@$(BIN)/python train_svi.py --preset digits --out $(DEMO)
	@$(BIN)/python evaluate.py $(DEMO) --samples 1 100
	@echo "monitor   $(BIN)/tensorboard --logdir $(DEMO)"

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
