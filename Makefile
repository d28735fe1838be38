# Every target that needs the environment makes it first; nothing but Python 3.11 with venv, make and (optionally) a C++ compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install node demo test check format bench protos clean

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard experts/native/*.cpp experts/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=80"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m experts.native.build
	touch $(STAMP)

# What a machine of a cluster needs: no tools for development.
node: $(VENV)/.node

$(VENV)/.node: pyproject.toml $(wildcard experts/native/*.cpp experts/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=80"
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/python -m experts.native.build
	touch $@

demo: install
	$(BIN)/python -m cluster.demo

test: install
	$(BIN)/python -m pytest tests

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_house.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: install
	$(BIN)/python -m protos.generate

bench: install
	$(BIN)/python -m tests.benchmarks.run_all

clean:
	rm -rf $(VENV) build *.egg-info experts/native/_build
