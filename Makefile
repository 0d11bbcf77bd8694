# make demo        the whole system on a synthetic city, from raw check-ins to Acc@k (6 minutes on 2 cores)
# make test        the tests; of nearly alike cases a drawn tenth (tests/conftest.py)
# make test-all    all tests; make test-rest: those that make test leaves out
# make soak        the long part of the tests: hundreds of kills, and what only repeats others
# make env         the environment of them all, in .venv
#
# On a GPU node use environment.yml. TORCH may name another build: make env TORCH=torch==2.13.0+cu130
# With another Python or other versions, in an environment of their own (.venv-3.12-oldest):
#     make test PYTHON=python3.12 CONSTRAINTS=constraints/oldest.txt

SHELL := /bin/bash
PYTHON ?= python3
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
NEWEST := $(ROOT)constraints/newest.txt
CONSTRAINTS ?= $(NEWEST)
TORCH ?= torch
VENV := $(ROOT).venv
ifneq ($(PYTHON) $(abspath $(CONSTRAINTS)),python3 $(NEWEST))
VENV := $(VENV)-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$(basename $(notdir $(CONSTRAINTS)))
endif

# Two processes whose threads spin while they wait stop each other on a small machine.
export OMP_WAIT_POLICY = PASSIVE
export PATH := $(VENV)/bin:$(PATH)

PYTEST := cd $(ROOT) && python -m pytest
IN_TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: env demo test test-rest test-all soak
env: $(VENV)/.complete

# The stamp is written last: after an interruption pip runs again and finishes what is missing.
$(VENV)/.complete: $(ROOT)pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	cd $(ROOT) && python -m pip install --quiet --disable-pip-version-check -c $(abspath $(CONSTRAINTS)) \
		$(TORCH) -e '.[full,test,deepspeed,quantization]'
	touch $@

demo: env
	cd $(ROOT) && bash demo.sh

test: env
	$(PYTEST) --part drawn $(IN_TWO)

test-rest: env
	$(PYTEST) --part rest $(IN_TWO)

test-all: env
	$(PYTEST) $(IN_TWO)

soak: env
	$(PYTEST) -m soak
