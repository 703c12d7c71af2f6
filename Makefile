# Everything starts with `make setup`, which the other targets call: a virtual environment in .venv, made once.
# PIP_ARGS is passed on to pip, for another build of torch: make setup PIP_ARGS="--extra-index-url …"
PYTHON ?= python3
PIP_ARGS ?=
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
DEMO ?= nextword-demo

.PHONY: help setup demo test test-all chromium check bench calibration soak clean

help:
	@echo "make demo    the whole life of a small GPT, offline, in under 5 minutes"
	@echo "make test    the tests; one line at the end says what was not tested"
	@echo "make test-all    the same with Chromium, lm-eval, Ray and llama.cpp, which it installs: nothing that they need is skipped"
	@echo "make check   lint, types, tests"
	@echo "make bench   the figures of docs/benchmarks.md (some three hours)"
	@echo "make calibration    coverage of every interval and error rates of every decision, by simulation (some twenty minutes)"
	@echo "make soak    fifty kills of a longer run, half inside a save; every fault of docs/reliability.md; odd requests and 512 hostile clients to the server"
	@echo "make setup   the virtual environment in .venv; PIP_ARGS goes to pip"

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'nextword needs Python 3.11 or newer; say which by PYTHON=…')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" $(PIP_ARGS)
	$(BIN)/python -m pip install --quiet --group test --editable ".[all]" $(PIP_ARGS)
	touch .venv/ready

demo: setup
	$(BIN)/nextword demo --out $(DEMO)

test: setup
	$(BIN)/python -m pytest

test-all: .venv/ready-for-all chromium
	NEXTWORD_SLOW_TESTS=1 $(BIN)/python -m pytest --all-needs

# llama.cpp is built for AVX2 only: AMX, which a native build uses, crashes where the system does not permit it.
LLAMA_FLAGS := -DGGML_NATIVE=OFF -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF
ifneq ($(filter x86_64 amd64 AMD64,$(shell uname -m)),)
LLAMA_FLAGS += -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF
endif

.venv/ready-for-all: .venv/ready
	CMAKE_ARGS="$(LLAMA_FLAGS)" $(BIN)/python -m pip install --quiet --group test-all $(PIP_ARGS)
	touch .venv/ready-for-all

# The browser for the tests of pages: from the system's packages where this may install them, and else by hand.
chromium: setup
	@cd tests && ../$(BIN)/python -c "import sys, needs; sys.exit(not needs.chromium())" || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -qy chromium; \
	else echo "Install a Chromium first: sudo apt-get install chromium, or $(BIN)/playwright install --with-deps chromium"; exit 1; fi

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.scaling_laws validate
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.time_limits

calibration: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration $(CALIBRATION_ARGS)

soak: setup
	NEXTWORD_KILLS=50 NEXTWORD_KILL_STEPS=3000 $(BIN)/python -m pytest -n 0 -s tests/test_pretraining.py -k test_killed_and_resumed --timeout 7200
	NEXTWORD_SLOW_TESTS=1 NEXTWORD_RESTARTS=20 $(BIN)/python -m pytest -n 0 -s tests/test_distributed.py -k killed --timeout 3600
	NEXTWORD_SLOW_TESTS=1 NEXTWORD_FLIPS=200 NEXTWORD_EVERY_WRITE=1 $(BIN)/python -m pytest -n 0 -s tests/test_faults.py tests/test_foreign.py --timeout 7200
	NEXTWORD_KILLS=3 $(BIN)/python -m pytest -n 0 tests/test_sharded_preparation.py -k killed --timeout 1800
	NEXTWORD_SLOW_TESTS=1 $(BIN)/python -m pytest -n 0 -s tests/test_serving_attacks.py -k many_clients --timeout 1800
	NEXTWORD_CASES=2400 $(BIN)/python -m pytest -n 0 tests/test_serving_fuzz.py --timeout 1800

clean:
	rm -rf .venv
