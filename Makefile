# Each target makes .venv when it must. ARGS passes options on: make test ARGS="-k newton".
PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# pyright would ask the network whether a newer version exists.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: test demo bench certificates hard bounds maid study rates memory equilibrium kills steady tuning heldout training lint constraints clean
.NOTPARALLEL: # two installs must not write to .venv at once

# All tests but the slow ones. For every test: make test ARGS='-m ""'
test: $(VENV)/dev.stamp
	$(PY) -m pytest -m "not slow" $(ARGS)

demo: $(VENV)/demo.stamp
	$(PY) -m bilevax.demo $(ARGS)

bench: $(VENV)/dev.stamp
	$(PY) benchmarks/overhead.py $(ARGS)

# The error of hypergradients at inexact inner solutions, against theory: a table and figures.
certificates: $(VENV)/dev.stamp
	$(PY) benchmarks/certificates.py $(ARGS)

# How loose proven bounds are, beside certificates that estimate.
bounds: $(VENV)/dev.stamp
	$(PY) benchmarks/bounds.py $(ARGS)

# Requests of an accuracy where certificates are easily fooled: is CONVERGED ever wrong?
hard: $(VENV)/dev.stamp
	$(PY) benchmarks/hard_requests.py $(ARGS)

study: $(VENV)/dev.stamp
	$(PY) benchmarks/efficiency.py $(ARGS)

# Fitted rates of iterative, implicit and stochastic differentiation beside those of theory.
rates: $(VENV)/dev.stamp
	$(PY) benchmarks/rates.py $(ARGS)

memory: $(VENV)/dev.stamp
	$(PY) benchmarks/memory.py $(ARGS)

equilibrium: $(VENV)/dev.stamp
	$(PY) benchmarks/equilibrium.py $(ARGS)

# A training run that is killed 20 times, beside one that is not: the same bits at the end.
kills: $(VENV)/dev.stamp
	$(PY) benchmarks/kills.py $(ARGS)

# The share of a training run that is spent inside of compiled steps.
steady: $(VENV)/dev.stamp
	$(PY) benchmarks/steady_state.py $(ARGS)

# Penalties tuned by the command line beside grids, and beside scikit-learn's.
tuning: $(VENV)/dev.stamp
	$(PY) benchmarks/tuning.py $(ARGS)

# What the command line writes by default, judged by rows that it has not seen.
heldout: $(VENV)/dev.stamp
	$(PY) benchmarks/tuning_held_out.py $(ARGS)

# Whole training runs, by start, schedule and rule, and beside the plain recipe of peers.
training: $(VENV)/dev.stamp
	$(PY) benchmarks/training.py $(ARGS)

# Descent without a step size, beside one whose step is tuned by hand.
maid: $(VENV)/dev.stamp
	$(PY) benchmarks/maid.py $(ARGS)

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright

# Pins what the dev extra installs into an empty environment. Run it with the oldest supported Python.
constraints:
	@$(call check_python)
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" $(PIP_INSTALL) --editable '.[dev]'; \
	{ echo '# Everything the dev extra installs. Made by: make constraints PYTHON=python3.11'; \
	  "$$tmp/venv/bin/python" -m pip freeze --exclude-editable; } > "$$tmp/constraints.txt"; \
	cp "$$tmp/constraints.txt" constraints.txt

# Removes what the other targets wrote. The environment stays, and is checked by the next target.
clean:
	rm -rf $(VENV)/*.stamp build dist demo-output benchmarks/output .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# A stamp says that .venv holds an extra. It is written last, so a broken install runs again,
# and an environment without a working pip is made anew.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(call check_python) && $(PYTHON) -m venv --clear $(VENV); }
	$(PY) $(PIP_INSTALL) --editable '.[$*]' --constraint constraints.txt
	@touch $@

# When the interpreter is gone, the stamps no longer count.
$(PY): ;

check_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"bilevax needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
