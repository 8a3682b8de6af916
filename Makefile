# Two commands set everything up: make demo, make test. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: help demo test bench lint gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   accuracy, a picture and a stopwatch on real images (four minutes, no GPU needed)"
	@echo "make test   all tests (half an hour on two cores, no GPU needed)"
	@echo "make bench  all benchmarks that this machine can run"
	@echo "make lint   formatting, lint and types"
	@echo "make gpu    on a machine with a GPU: its tests, the tuning sweep, the benchmarks"
	@echo "make clean  remove .venv and what was built"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m attnk demo

# The kernels run in Triton's interpreter, which excludes its compiler: the second run compiles them ahead of time.
# One thread a worker: with more, threads of tiny operators wait for each other, and everything takes half as long again.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) tests
	TRITON_INTERPRET=0 $(BIN)/python -m pytest --numprocesses $(WORKERS) tests/test_aot.py

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# with the Python that has the GPU's torch, which .venv need not have
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build *.egg-info out .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
