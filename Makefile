# Every target sets up what it needs, on a machine with nothing but Python (>= 3.11) and make.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-slow check fuzz bench clean help

help:
	@echo "make demo       fine-tune a real 135M model on who it is, export it, and ask it"
	@echo "make test       the tests, JOBS=2 files at a time (10 to 20 minutes on two cores)"
	@echo "make test-slow  the tests marked slow too"
	@echo "make check      ruff, mypy and the generated pages"
	@echo "make fuzz       200 random parallel layouts against one process"
	@echo "make bench      our training step beside transformers' own, on this machine"

# torch is pinned and installed first: an open range may fetch another build of several GB.
$(VENV)/torch.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

$(VENV)/demo.ready: $(VENV)/torch.ready pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[demo]"
	@touch $@

$(VENV)/dev.ready: $(VENV)/torch.ready pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[demo,dev]"
	@touch $@

demo: $(VENV)/demo.ready
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

# Whole files at a time: what a file's tests share is made once.
test: $(VENV)/dev.ready
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(VENV)/dev.ready
	$(BIN)/python -m pytest

check: $(VENV)/dev.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python -m megatron_swift.args.reference | cmp - docs/parameters.md || { echo "docs/parameters.md is stale: $(BIN)/python -m megatron_swift.args.reference > docs/parameters.md"; exit 1; }

# FUZZ_SEED=<seed> repeats a run; without it a new seed is drawn and printed.
fuzz: $(VENV)/dev.ready
	@seed=$${FUZZ_SEED:-$$(date +%s)}; echo "FUZZ_SEED=$$seed"; \
	FUZZ_SEED=$$seed FUZZ_DRAWS=$${FUZZ_DRAWS:-200} $(BIN)/python -m pytest tests/parallel/test_fuzz.py

bench: $(VENV)/dev.ready
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) demo_output megatron_output
