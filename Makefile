# Everything runs in .venv, made here on first use from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/stamp
PINS := pyproject.toml constraints.txt
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help pretrain tiny_vl test test-slow test-matrix matrix-one lint format clean

help:
	@echo "make pretrain   latent pretraining of the embedded model on the embedded dataset, into runs/pretrain"
	@echo "make test       the tests; make test-slow adds the slow ones"
	@echo "make test-matrix  training, evaluation and checkpoints on those of $(MATRIX) that are here"
	@echo "make lint       ruff's rules and format, mypy's types; make format applies the first two"
	@echo "make tiny_vl    trains the embedded model anew, into latent_jax/assets/tiny_vl"
	@echo "make clean      removes .venv, those of test-matrix and caches; runs/ stays"

pretrain: $(STAMP)/run
	$(RUN) -m latent_jax.main --config=configs/pretrain.py --workdir=runs/pretrain

tiny_vl: $(STAMP)/run
	$(RUN) -m latent_jax.main --config=configs/tiny_vl.py:captions --workdir=runs/tiny_vl_captions
	$(RUN) -m latent_jax.main --config=configs/tiny_vl.py:questions --workdir=runs/tiny_vl_questions \
	  --config.model.path=runs/tiny_vl_captions/hf
	$(RUN) -m latent_jax.convert --checkpoint=runs/tiny_vl_questions --output=latent_jax/assets/tiny_vl
	rm -f latent_jax/assets/tiny_vl/README.md
	mv latent_jax/assets/tiny_vl/checksums.json latent_jax/assets/tiny_vl.checksums.json  # copies are there to be changed

test: $(STAMP)/test
	$(RUN) -m pytest

test-slow: $(STAMP)/test
	$(RUN) -m pytest -m "slow or not slow"

# Other interpreters, each with the versions that constraints.txt has for it (the newest jax), in .venv-NAME. Only tests that
# need no torch, whose CPU build pip may not find for them. An interpreter that is not here is said, and is no error.
MATRIX ?= python3.12 python3.13
MATRIX_TESTS ?= tests/test_main.py tests/test_train.py tests/test_evaluate.py tests/runtime/test_checkpoints.py
test-matrix:
	@for python in $(MATRIX); do \
	  if ! $$python -c "" 2>/dev/null; then echo "$$python: not here, not tested"; continue; fi; \
	  echo "$$python:"; \
	  $(MAKE) --no-print-directory PYTHON=$$python VENV=.venv-$$python matrix-one || exit 1; \
	done

matrix-one: $(STAMP)/run
	@$(PIP) beartype hypothesis matplotlib pytest pytest-xdist
	$(RUN) -m pytest $(MATRIX_TESTS)

lint: $(STAMP)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)/lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .venv-* .cache .pytest_cache .ruff_cache build *.egg-info

# A stamp is newer than the pins that it was installed from, so that only a change of pins installs again.
$(STAMP)/run: $(PINS) | $(STAMP)
	@echo "installing latent_jax into $(VENV) ..."
	@$(PIP) --editable .
	@touch $@

$(STAMP)/test: $(PINS) | $(STAMP)
	@echo "installing latent_jax and what its tests need into $(VENV) ..."
	@$(PIP) --editable ".[test]"
	@touch $@ $(STAMP)/run

$(STAMP)/lint: $(PINS) | $(STAMP)
	@echo "installing latent_jax and what checks it into $(VENV) ..."
	@$(PIP) --editable ".[lint]"
	@touch $@ $(STAMP)/run

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, " \
	  + sys.executable + " is " + sys.version.split()[0] + "; use make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMP)
