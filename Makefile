# `make demo`: write a mixed data set, train the tiny model on it, show the result (under 10 minutes on 2 cores).
# `make test`: all tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo

.PHONY: demo test lint clean

.venv/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 13) else "error: Python %d.%d: sat_ext needs 3.10 to 3.12; try make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: .venv/.installed
	rm -rf $(RUN)
	$(BIN)/sat-ext demo $(RUN)/data --clips 960 --stills 960 --held-out 48
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(BIN)/deepspeed --num_gpus 2 train_video.py --base configs/model/tiny.yaml configs/data/demo.yaml configs/zero/zero2.yaml configs/train/demo.yaml
	$(BIN)/sat-ext sample $(RUN) --sheet $(RUN)/samples.png --clip $(RUN)/samples.mp4
	OMP_NUM_THREADS=1 $(BIN)/sat-ext score $(RUN)
	@cat $(RUN)/result.json

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs
