# make setup   creates .venv with the versions of constraints.txt, the tools for tests, and an MPI
# make demo    prepares the text in demo/ and trains a tiny looped mixture-of-experts model in two processes
# make test    runs the whole test suite
# make lint    checks style and types
# make gpu-check   runs the checks of docs/gpu.md on a GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DATA := demo/data
DEMO_RUN := runs/demo
DEMO_STEPS := 200
# Threads of each process: two processes share the cores of a small machine.
export OMP_NUM_THREADS ?= 1

# The suite runs as three pytest processes at a time, so that two cores are busy to the end: tests of faults, tests of
# launchers and of Slurm, which often wait for processes to start and to end, tests of training, and all the others.
TESTS_OF_FAULTS := tests/faults
TESTS_OF_LAUNCHERS := tests/slurm tests/launch
TESTS_OF_TRAINING := tests/engine tests/train tests/model tests/checkpoint tests/ranks

.PHONY: setup demo test test-faults test-launchers test-training test-rest lint gpu-check
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,mpi]'
	touch $@

DEMO_TEXT := demo/sotu.parquet
DEMO_TOKENIZER := $(DEMO_DATA)-tokenizer.json

$(DEMO_TOKENIZER): $(DEMO_TEXT) | setup
	$(BIN)/mythos data tokenizer $< --vocabulary-size 4096 --validation-percent 5 --output $@

$(DEMO_DATA)/manifest.json: $(DEMO_TOKENIZER)
	$(BIN)/mythos data prepare $(DEMO_TEXT) --tokenizer $< --sequence-length 256 --output $(DEMO_DATA)
	touch $@

demo: setup $(DEMO_DATA)/manifest.json
	$(BIN)/mpiexec -n 2 $(BIN)/mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml \
		data.directory=$(DEMO_DATA) run.directory=$(DEMO_RUN) train.steps=$(DEMO_STEPS)

test: setup
	@$(MAKE) --no-print-directory --jobs=3 test-rest test-faults test-launchers test-training

test-faults: setup
	$(BIN)/python -m pytest $(TESTS_OF_FAULTS)

test-launchers: setup
	$(BIN)/python -m pytest $(TESTS_OF_LAUNCHERS)

test-training: setup
	$(BIN)/python -m pytest $(TESTS_OF_TRAINING)

test-rest: setup
	$(BIN)/python -m pytest $(patsubst %,--ignore=%,$(TESTS_OF_FAULTS) $(TESTS_OF_LAUNCHERS) $(TESTS_OF_TRAINING))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The checks that need a GPU; their results replace those in docs/gpu.md. PYTHON has torch and DeepSpeed: nothing is
# installed, because such a machine may have no network.
gpu-check:
	PYTHONPATH=$(CURDIR) MYTHOS_GPU_REPORT=docs/gpu.md $(PYTHON) -m pytest tests/gpu -m gpu
