# make demo: a training run on embedded data, from nothing.   make test: every test.   All can be repeated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo results test lint clean help
help:
	@echo "make demo   environment, packed digits, a training run with two ranks (runs/digits)"
	@echo "make results plain training against AutoDO, 20 runs; goes on after a stop"
	@echo "make test   environment, lint, all tests"
	@echo "make lint   ruff and mypy"
	@echo "make clean  removes the environment, packed data and runs"

# The stamp is newer than requirements.txt once everything in it is installed.
.venv/installed: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON). Get it: sudo apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10. Get a newer one and run: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "missing: Python's venv module. Get it: sudo apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

data/digits/manifest.json: | .venv/installed
	$(BIN)/autodo pack digits data/digits

demo: .venv/installed data/digits/manifest.json
	$(BIN)/python launcher/submit.py --config configs/digits.yaml

results: .venv/installed data/digits/manifest.json
	$(BIN)/python -m benchmarks.results --json docs/results/digits.json --readme README.md

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# These measure time or need both cores; the others share the cores, a file on each at a time.
ALONE := $(wildcard tests/slurm tests/test_launcher.py tests/test_end_to_end.py tests/test_surviving.py tests/test_bench_*.py)
JOBS ?= 2
test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(addprefix --ignore=,$(ALONE))
	$(BIN)/python -m pytest $(ALONE)

clean:
	rm -rf .venv data/digits runs
