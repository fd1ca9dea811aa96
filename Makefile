PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test slow faults nemesis fuzz up check bench board format
setup: $(STAMP)  ## create .venv with everything, ready to run

$(STAMP): requirements.lock pyproject.toml
	@PYTHON="$(PYTHON)" bash .ci/setup $(VENV)

demo: setup  ## set up everything and run the main job end to end
	@$(BIN)/python -m app.demo

test: setup  ## set up everything and run the whole test suite
	@bash .ci/test $(BIN)

slow: setup  ## the tests that take long
	@bash .ci/test $(BIN) -m slow

faults: setup  ## the whole fault matrix, with real kills, stalls and restarts; see tests/faults/RESULTS.md
	@bash .ci/test $(BIN) tests/faults -m "not gpu"

nemesis: setup  ## random faults on a fleet of real workers, judged by an independent checker; SEEDS=50
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.nemesis --seeds $(or $(SEEDS),50)

fuzz: setup  ## schemathesis against a real server for five minutes; FUZZ="--seconds 60 --seed 2" for another run
	@$(BIN)/python -m tests.fuzz $(FUZZ)

up: setup  ## run the whole stack on http://127.0.0.1:8000 until interrupted
	@$(BIN)/retain up

check: setup  ## format, lint, types, import contracts, migration drift
	@bash .ci/check $(BIN)

bench: setup  ## side-by-side speed ratios; see tests/benchmarks/RESULTS.md
	@$(BIN)/pip install -q --no-deps -r tests/benchmarks/requirements.lock
	@$(BIN)/python -m tests.benchmarks

board: setup  ## every strategy and combination on one board; goes on where it was interrupted
	@$(BIN)/python -m tests.benchmarks.board $(BOARD)

format: setup
	@$(BIN)/ruff check --fix-only --quiet app workers tests migrations; $(BIN)/ruff format app workers tests migrations
