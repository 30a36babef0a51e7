# Each target sets up what it needs in the project's own virtual environment. A second run installs
# nothing, downloads nothing and converts nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what is never imported need not be compiled: that takes as long as installing the rest; what is, is kept compiled
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-faults test-federation test-privacy test-report audit docs check format bench clean

demo: $(VENV)/.demo                ## install what the main job needs and run it; ARGS="--quick" for a few minutes
	$(BIN)/crosslm demo $(ARGS)

test: $(VENV)/.dev check           ## install what the tests need and pass them
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-federation: $(VENV)/.dev      ## the tests of separate machines alone; `make test` runs them too
	$(BIN)/python -m pytest tests/test_federation.py tests/test_federation_faults.py tests/test_federated_run.py \
		tests/test_federation_live.py tests/test_silo_app.py tests/test_silo_rounds.py tests/test_closing.py $(ARGS)

test-faults: $(VENV)/.dev          ## only: crashes, hostile uploads, the gate, attacks on whole runs
	$(BIN)/python -m pytest tests/test_crash.py tests/test_intake.py tests/test_gate.py tests/test_acceptance.py \
		tests/test_attacks.py $(ARGS)

test-report: $(VENV)/.browser      ## the report in headless Chromium, which must be installed, with axe
	REQUIRE_BROWSER=1 $(BIN)/python -m pytest tests/test_report.py tests/test_report_browser.py $(ARGS)

docs: $(VENV)/.docs                ## the documentation site in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

test-privacy: $(VENV)/.dev         ## the tests of DP, attacks, canaries and the leak check alone; `make test` runs them too
	$(BIN)/python -m pytest tests/test_private_fit.py tests/test_private_layers.py tests/test_accounting.py \
		tests/test_membership.py tests/test_leaks.py tests/test_audit.py tests/test_security.py $(ARGS)

audit: $(VENV)/.audit              ## look the pinned dependencies up among known vulnerabilities
	$(BIN)/python .ci/audit.py

check: $(VENV)/.dev                ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev               ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev                ## measure speed and memory again (an hour); ARGS="--quick" for minutes, ARGS=--keep to write benchmarks/results/, TRL=PYTHON of an environment with trl and peft
	@failed=; for script in generation "update $(if $(TRL),--trl $(TRL))" families leads selection slm busy arrival federation; do \
		set -- $$script; name=$$1; shift; $(BIN)/python benchmarks/$$name.py "$$@" $(ARGS) || failed="$$failed $$name"; done; \
		test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

clean:                             ## remove the virtual environment
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.dev
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.browser: pyproject.toml constraints.txt $(VENV)/.dev
	$(PIP) --editable '.[browser]'
	touch $@

$(VENV)/.ci: pyproject.toml constraints.txt | $(BIN)/python # all of the above at once, which takes less time
	$(PIP) --editable '.[dev,docs,browser]'
	touch $@ $(VENV)/.dev $(VENV)/.demo $(VENV)/.docs $(VENV)/.browser

$(VENV)/.audit: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[audit]'
	touch $@
