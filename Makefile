# One command each: `make demo` and `make test` work from nothing on Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
BIN := $(VENV)/bin
# uv does not read pip's settings: pass on where pip is configured to look for wheels.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test test-slow explore mutants trace-cuda lint format proto lock clean

help:
	@echo "make demo       from nothing to streamed answers of both tiers, with prices and metrics"
	@echo "make test       the test suite, from nothing"
	@echo "make test-slow  the tests that take long and rarely break"
	@echo "make explore    property tests on new random examples, for as long as that takes"
	@echo "make mutants    which small changes to the core no test notices; MUTANTS='--sample 100' is a start"
	@echo "make trace-cuda the CUDA path without a GPU: no mismatch, no wait, launches counted (5 GB)"
	@echo "make lint       ruff, mypy --strict, buf"
	@echo "make proto      regenerate sage_fed/v1 from proto/"
	@echo "make lock       resolve constraints.txt anew"

# Bytecode is made once, here: a service's user may not write it, and without it each start would
# compile torch anew, which takes seconds.
setup: $(VENV)/.ready

# The stamp is made last, so that an interrupted set-up is done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3,11) <= sys.version_info[:2] <= (3,13) else "sage-fed needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d; set PYTHON=python3.11 or newer" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv -c constraints.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[dev]"
	$(BIN)/python -m compileall -q sage_fed
	@touch $@

demo: setup
	$(BIN)/sage-fed demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Never part of CI: it fails by chance, which is its purpose. A failure prints the example; keep
# it as an @example of its property, fix the fault, and CI tries it for ever.
explore: setup
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile explore --timeout 0 -n auto $(EXPLORE)

# The tool is fetched here and is no part of the environment: it brings a terminal interface along.
mutants: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt mutmut==3.8.1
	$(BIN)/python bench/mutants.py $(MUTANTS)

# The other packages are those of the environment above; only torch is another build. "===" takes
# the index's own, which is for CUDA, and not a "+cpu" that lies nearby.
trace-cuda: $(CUDA_VENV)/.ready
	$(CUDA_VENV)/bin/python bench/cuda_trace.py $(TRACE)

$(CUDA_VENV)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet "torch===$$(sed -n 's/^torch==//p' constraints.txt)"
	for python in $(CUDA_VENV)/bin/python $(BIN)/python; do \
		$$python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done \
		| { read -r own; { echo "$(CURDIR)"; cat; } > "$$own/sage_fed.pth"; }
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

proto: setup
	$(BIN)/buf format -w
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. --pyi_out=. proto/sage_fed/v1/*.proto

# torch stays at the one version that installs the same here, in CI and on a laptop.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev \
		--constraint constraints.in --no-header --no-annotate \
		--no-emit-index-url pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info
