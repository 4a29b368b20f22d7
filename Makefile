# On a fresh machine: python3, make and the package registries are enough.
#   make demo   distil students from a biased teacher, on handwritten digits
#   make test   the tests, on TensorFlow and on JAX
#   make lint   ruff, mypy, and the layers in pyproject.toml
#   make slow   the tests that are left out of `make test`
#   make test-rest   a student served by KServe, in an environment of its own

PYTHON ?= python3
BIN = .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test slow test-rest lint wheel clean
# Nothing is left half-installed by an interrupted run.
.DELETE_ON_ERROR:

demo: .venv/demo.installed
	$(BIN)/python examples/digits.py --output demo-output

test: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n 2 -m "not slow and not rest"
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 -m "not slow and not rest"

slow: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m "slow and not rest"
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m "slow and not rest"

test-rest: .venv/test.installed .venv-rest/rest.installed
	KERAS_BACKEND=jax KSERVE_PYTHON=.venv-rest/bin/python \
	  $(BIN)/python -m pytest -m rest

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

# KServe wants older releases of pandas and protobuf than the tests have.
.venv-rest/rest.installed:
	$(PYTHON) -m venv .venv-rest
	.venv-rest/bin/pip install --quiet kserve tensorflow
	touch $@

.venv/bin/pip:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-rest build dist *.egg-info demo-output
