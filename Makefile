# On a fresh machine: python3, make and the package registries are enough.
#   make demo         distil students from a biased teacher, on handwritten digits
#   make test         the tests, on TensorFlow and on JAX
#   make test-floor   the core's, on the lowest versions that setup.cfg allows
#   make lint         ruff, mypy, and the layers in pyproject.toml
#   make slow         the tests that are left out of `make test`
# PYTHON=python3.13 takes another interpreter; `make clean` first.

PYTHON ?= python3
# Of the lowest versions TensorFlow has wheels for 3.11 and 3.12, JAX for more.
FLOOR_PYTHON ?= python3.11
BIN = .venv/bin
CORE = tests/losses tests/proxy tests/search tests/distiller tests/soft_labels \
	tests/test_calibration.py tests/test_correction.py tests/test_metrics.py
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-floor slow lint wheel clean
# Nothing is left half-installed by an interrupted run.
.DELETE_ON_ERROR:

demo: .venv/demo.installed
	$(BIN)/python examples/digits.py --output demo-output

test: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n 2 -m "not slow"
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 -m "not slow"

test-floor: .venv-floor-tensorflow/installed .venv-floor-jax/installed
	KERAS_BACKEND=tensorflow .venv-floor-tensorflow/bin/python -m pytest -n 2 \
		-m "not slow" $(CORE)
	KERAS_BACKEND=jax .venv-floor-jax/bin/python -m pytest -n 2 \
		-m "not slow" $(CORE)

slow: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m slow
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m slow

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

wheel: .venv/test.installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# Installing one extra leaves the other in place.
.venv/%.installed: setup.cfg pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

.venv/bin/pip:
	$(call require_python,$(PYTHON))
	$(PYTHON) -m venv .venv

.venv-floor-%/installed: tests/floor-%.txt setup.cfg pyproject.toml
	$(call require_python,$(FLOOR_PYTHON))
	$(FLOOR_PYTHON) -m venv --clear .venv-floor-$*
	.venv-floor-$*/bin/pip install --quiet --constraint $< \
		--editable ".[$*,core_tests]"
	touch $@

# Before an environment is made of it, which the next run would take.
require_python = @$(1) -c "import sys; sys.exit( \
	sys.version_info < (3, 11) and '$(1) is Python %d.%d; 3.11 or later is \
	needed: make PYTHON=python3.11' % sys.version_info[:2])"

clean:
	rm -rf .venv .venv-* build dist *.egg-info demo-output
