# `make` checks everything; `make demo` raises a model from nothing.
# PIP_ARGS goes to pip, as in: make demo PIP_ARGS="--extra-index-url URL" with the URL of CPU wheels of PyTorch.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
# Clients of `fledge serve`: their requirements conflict, so each has an environment of its own.
CLIENTS := .venv-clients
CLIENT_STAMPS := $(patsubst %,$(CLIENTS)/%/installed,openai langchain llm lm_eval garak schemathesis)

.PHONY: all demo test test-all lint types bench docs
# The checks fill the same screen and the same cores: one after the other.
.NOTPARALLEL:

all: lint types test

demo: $(VENV)/installed
	$(BIN)/fledge demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-peers $(CLIENT_STAMPS)
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(VENV)/installed-dev
	$(BIN)/mypy

bench: $(VENV)/installed
	for bench in tokenise train memory constraints char; do $(BIN)/python bench/$$bench.py || exit 1; done

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py

# A stamp is newer than what it was installed from; the package itself is linked, not copied.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

$(VENV)/installed-peers: $(VENV)/installed-dev
	$(PIP_INSTALL) -e '.[dev,peers]'
	touch $@

# A client's file names all that it needs. These two find torch and transformers in the peers' environment;
# bench/serve.py measures the second.
$(CLIENTS)/lm_eval/installed $(CLIENTS)/transformers/installed: $(VENV)/installed-peers

$(CLIENTS)/%/installed: tests/clients/%.txt | $(BIN)/python
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install $(PIP_ARGS) --no-deps -r $<
	$(if $(filter %-peers,$^),$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    >$$(echo $(@D)/lib/python3*/site-packages)/peers.pth)
	touch $@
