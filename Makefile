# make demo: a training run on embedded data, from nothing.   make test: every test.   All can be repeated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo results test lint slurm browser clean help
help:
	@echo "make demo   environment, packed digits, a training run with two ranks (runs/digits)"
	@echo "make results plain training against AutoDO, 20 runs; goes on after a stop"
	@echo "make test   environment, lint, all tests"
	@echo "make lint   ruff and mypy"
	@echo "make slurm  installs Slurm by apt for tests/slurm, which are skipped without (root)"
	@echo "make browser  installs Chromium by apt for tests/test_browser.py, which are skipped without (root)"
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

# For tests/slurm/cluster.py: Slurm, its accounting, and what a snapshot of the code needs. A mirror may be out for a
# moment: apt-get update gets a second try.
SLURM_PACKAGES := slurm-wlm munge rsync git slurmdbd mariadb-server
slurm:
	@if dpkg -s $(SLURM_PACKAGES) >/dev/null 2>&1; then echo "Slurm is installed"; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "missing: Slurm. Get it, as root: apt-get install --no-install-recommends $(SLURM_PACKAGES)"; exit 1; \
	else export DEBIAN_FRONTEND=noninteractive; \
		(apt-get update -qq || { sleep 5; apt-get update -qq; }) && \
		apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); \
	fi

# For tests/test_browser.py.
browser:
	@if dpkg -s chromium >/dev/null 2>&1; then echo "Chromium is installed"; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "missing: Chromium. Get it, as root: apt-get install --no-install-recommends chromium"; exit 1; \
	else export DEBIAN_FRONTEND=noninteractive; \
		(apt-get update -qq || { sleep 5; apt-get update -qq; }) && \
		apt-get install -y -qq --no-install-recommends chromium; \
	fi

# These measure time or need both cores; the others share the cores, a file on each at a time.
ALONE := $(wildcard tests/slurm tests/test_launcher.py tests/test_end_to_end.py tests/test_surviving.py tests/test_bench_*.py)
JOBS ?= 2
test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(addprefix --ignore=,$(ALONE))
	$(BIN)/python -m pytest $(ALONE)

clean:
	rm -rf .venv data/digits runs
