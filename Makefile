# Each target makes an environment when it must. ARGS passes options on: make test ARGS="-k newton".
# Another interpreter, or other pins of constraints/, have an environment of their own:
#   make test PYTHON=python3.13      what pip installs there
#   make test PINS=oldest            the oldest versions that pyproject.toml allows
PYTHON ?= python3
PINS ?=
ARGS ?=

version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
SUFFIX := $(or $(PINS),$(if $(filter-out file,$(origin PYTHON)),$(call version_of,$(PYTHON))))
VENV := .venv$(SUFFIX:%=-%)
PY := $(VENV)/bin/python
PINNED := constraints/$(or $(PINS),$(call version_of,$(or $(wildcard $(PY)),$(PYTHON)))).txt
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# pyright would ask the network whether a newer version exists.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: test lowest demo bench certificates hard price bounds maid study rates memory equilibrium kills steady tuning heldout training lint constraints clean
.NOTPARALLEL: # two installs must not write to .venv at once

# All tests but the slow ones. For every test: make test ARGS='-m ""'
test: $(VENV)/dev.stamp
	$(PY) -m pytest -m "not slow" $(ARGS)

# The same with the oldest versions that pyproject.toml allows.
lowest:
	$(MAKE) test PINS=oldest

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

# A requested accuracy beside the tolerance that is best in hindsight: seconds and products.
price: $(VENV)/dev.stamp
	$(PY) benchmarks/price.py $(ARGS)

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
	$(PY) -m pyright --pythonpath $(PY)

# Pins what the dev extra installs into an empty environment: for the Python that is given, or with
# PINS=oldest and the oldest Python at the lower bounds of pyproject.toml.
constraints:
	@$(call check_python)
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	touch "$$tmp/bounds"; \
	if [ '$(PINS)' = oldest ]; then "$$tmp/venv/bin/python" .ci/lower_bounds.py > "$$tmp/bounds"; fi; \
	"$$tmp/venv/bin/python" $(PIP_INSTALL) --editable '.[dev]' --constraint "$$tmp/bounds"; \
	mkdir -p constraints; \
	version=$(call version_of,$(PYTHON)); \
	{ echo "# Everything the dev extra installs. Made by:" \
	    "make constraints PYTHON=python$$version$(PINS:%= PINS=%)"; \
	  "$$tmp/venv/bin/python" -m pip freeze --exclude-editable; } > "$$tmp/pins"; \
	cp "$$tmp/pins" constraints/$(or $(PINS),$$version).txt

# Removes what the other targets wrote. The environment stays, and is checked by the next target.
clean:
	rm -rf .venv*/*.stamp build dist demo-output benchmarks/output .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# A stamp says that an environment holds an extra. It is written last, so a broken install runs
# again, and an environment without a working pip is made anew. A Python without pins gets what pip
# finds.
$(VENV)/%.stamp: pyproject.toml $(wildcard $(PINNED)) $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(call check_python) && $(PYTHON) -m venv --clear $(VENV); }
	$(PY) $(PIP_INSTALL) --editable '.[$*]' $(addprefix --constraint ,$(wildcard $(PINNED)))
	@touch $@

# When the interpreter is gone, the stamps no longer count.
$(PY): ;

check_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"bilevax needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
