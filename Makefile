# megakor: make demo · test · test-cluster · matrix · lint · bench · docs. Each installs what it needs into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
CORPUS ?=
ARGS ?=
BENCH ?= train_step
CLUSTER_PACKAGES := iproute2 openssh-client openssh-server pdsh openmpi-bin munge slurmctld slurmd slurm-client

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test test-cluster matrix drill lint format bench docs clean requirements

help:
	@echo "make demo    the whole arc on two CPU cores: text in; a trained, resumed, exported, tuned model out"
	@echo "             CORPUS='path/*.jsonl.gz' uses your text; ARGS='num_steps=200' changes the demo's keys"
	@echo "make test    the tests          make lint    ruff and mypy"
	@echo "make test-cluster  the launchers on several hosts, made of Linux namespaces; needs root, and installs ssh,"
	@echo "             pdsh, Open MPI and Slurm where apt-get is there"
	@echo "make bench   the training benchmark; BENCH=parallel, memory, loader, shuffle or checkpoint another"
	@echo "make docs    the documentation, into site/"
	@echo "make drill   a short training disturbed fifty times: killed ranks, damaged files, full disks, other layouts"
	@echo "make matrix  every layout against one process, into docs/layouts.md (about an hour on two CPU cores)"

requirements:
	@command -v $(PYTHON) >/dev/null || { echo "megakor needs Python 3.10 or newer, and '$(PYTHON)' is not there:" \
	  "install it (Debian: apt-get install python3 python3-venv) or name another: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "megakor needs Python 3.10 or newer," \
	  "and '$(PYTHON)' is $$($(PYTHON) -V): name a newer one: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "megakor needs Python's venv module:" \
	  "install it (Debian: apt-get install python3-venv)"; exit 1; }

$(BIN)/python: | requirements
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; a changed setup.cfg or constraints.txt installs again.
$(VENV)/.installed: setup.cfg constraints.txt | $(BIN)/python
	@echo "installing megakor into $(VENV) (once; a few minutes)"
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "installing the extra '$*' into $(VENV) (once)"
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m megakor demo $(if $(CORPUS),'corpus=$(CORPUS)') $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m alone $(ARGS) || [ $$? -eq 5 ]  # 5: none of them is asked for
	$(BIN)/python -m pytest -m 'not alone' -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# What tests find missing they say when they skip.
test-cluster: $(VENV)/.installed-test
	@[ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
	  export DEBIAN_FRONTEND=noninteractive; get="apt-get -qq install -y --no-install-recommends --no-upgrade"; \
	  $$get $(CLUSTER_PACKAGES) || { apt-get -qq update && $$get $(CLUSTER_PACKAGES); }; } >/dev/null 2>&1 \
	  || echo "not all of these could be installed: $(CLUSTER_PACKAGES)"
	$(BIN)/python -m pytest tests/cluster $(ARGS)

matrix: $(VENV)/.installed-test
	$(BIN)/python -m tests.distributed.matrix

drill: $(VENV)/.installed
	$(BIN)/python -m megakor drill faults=50 $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# litdata asks for torchvision, for images alone; the one that pip finds breaks a CPU-only torch.
$(VENV)/.installed-litdata: $(VENV)/.installed-bench
	$(PIP) --no-deps litdata
	@touch $@

bench: $(VENV)/.installed-test $(VENV)/.installed-litdata
	$(BIN)/python -m tests.benchmarks.$(BENCH) $(ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
