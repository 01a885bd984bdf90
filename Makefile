# Holdfast: `make train-chinese` trains a small Chinese model; `make test` checks everything.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
SERVE_PORT ?= 8000

.DEFAULT_GOAL := help
.PHONY: help install train-chinese test test-all browser faults lint i18n bench dist serve clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Says in words what is missing, instead of pip's or venv's own complaint.
$(VENV)/.checked:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "holdfast: $(PYTHON) is not installed; install Python 3.10 or newer, or: make PYTHON=/path/to/python3"; \
	  echo "holdfast: 没有找到 $(PYTHON)；请安装 Python 3.10 或更新版本，或者：make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "holdfast: $(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12"; \
	  echo "holdfast: $(PYTHON) 版本低于 3.10；请指定更新的版本：make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "holdfast: Python's venv module is missing; on Debian and Ubuntu: sudo apt install python3-venv"; \
	  echo "holdfast: 缺少 Python 的 venv 模块；Debian 和 Ubuntu 上：sudo apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

# torch alone first: the pinned build satisfies everything that comes after it.
$(VENV)/.train: $(VENV)/.checked pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,desk,web]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.train  ## make .venv with everything that training needs

train-chinese: install  ## train a small Chinese model on data/zh_sample.txt; again: go on
	$(BIN)/python train_chinese.py --preset quick $(ARGS)

test: $(VENV)/.dev lint  ## the test suite (about 14 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/.dev lint  ## the same with the slow tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

browser:  ## a browser for the tests of the pages, which are skipped without one (Debian, Ubuntu; as root)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk; }

faults: $(VENV)/.dev  ## the whole matrix of faults, peers beside us (about half an hour); best as root
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m tests.faults --out benchmarks/results $(ARGS)

lint: $(VENV)/.dev  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

i18n: $(VENV)/.dev  ## collect the strings again and compile the catalogues
	$(BIN)/python tests/catalogues.py update

bench: $(VENV)/.train  ## saving and training beside the peers; hours; NANOGPT=DIR: nanoGPT too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.engine --out benchmarks/results $(ARGS)
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/prepare_speed.py data/zh_sample.txt

dist: $(VENV)/.dev  ## build wheel and sdist into dist/, install each into an empty environment, train with it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build uv
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/dist.py dist

serve: $(VENV)/.serve  ## serve a trained model: LLM_CHECKPOINT=checkpoints/best_model.pt make serve
	@$(BIN)/holdfast serve --port $(SERVE_PORT) $(ARGS)

$(VENV)/.serve: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]'
	@touch $@

clean:  ## remove .venv and caches; never a checkpoint
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
