PYTHON ?= python3
VENV   ?= .venv
# Processes that the fast tests are dealt to.
WORKERS ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# bitsandbytes beside the environment, for the tests of it alone: in it, peft would load it into every process.
QUANTIZE := $(VENV)/quantize

.PHONY: setup demo test test-slow faults soak fuzz coverage lint clean

setup: $(STAMP)

# Everything is pinned by constraints.txt, so that a fresh clone is the tested one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(QUANTIZE): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $@ bitsandbytes
	touch $@

demo: $(STAMP)
	$(BIN)/splitfl demo $(if $(MODEL),--model $(MODEL))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint $(QUANTIZE)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --ignore tests/integration/test_quantize.py
	PYTHONPATH=$(abspath $(QUANTIZE))$(if $(PYTHONPATH),:$(PYTHONPATH)) $(BIN)/python -m pytest -q tests/integration/test_quantize.py

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# Another search of the decoders with hostile bytes: make fuzz INPUTS=10000000
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),1000000)

# Branches and lines of the decoders that the fuzzer's corpus and their tests reach: 95 % of each, or it fails.
coverage: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt coverage
	$(BIN)/python -m tests.fuzz.branches

# Each fault at each place, with real processes; about a quarter of an hour. Full disks are mounted, which needs root.
faults: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/faults

# A run of 16 clients that come and go, with faults all the while: make soak MINUTES=60. Without root no disk is full.
soak: $(STAMP)
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) runs
