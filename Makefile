# On a fresh machine: python3, make and the package registries are enough.
#   make demo   distil students from a biased teacher, on handwritten digits
#   make test   the tests, on TensorFlow and on JAX
#   make lint   ruff, mypy, and the layers in pyproject.toml
#   make slow   the tests that are left out of `make test`
#   make test-dist   the wheel, built and tested as it would be installed
#   make test-rest   a student served by KServe, in an environment of its own
#   make docs   the site, in docs/_build/html; INTERSPHINX=0: without links to
#               other projects, which are looked up where there is a network
#   make docs-test   the site in a browser: Debian's chromium, or CHROMIUM=path

PYTHON ?= python3
BIN = .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test slow test-rest dist test-dist lint docs docs-test clean
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

# What would be published: complete, and readable where it is shown.
dist: .venv/release.installed
	rm -rf dist
	$(BIN)/check-manifest
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The wheel in an environment of its own, the tests from the source
# distribution: pytest, without `python -m`, sees no other copy of the package.
test-dist: dist
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/pip install --quiet pytest matplotlib scikit-learn \
	  "$$(echo dist/*.whl)[tensorflow,jax]"
	tar -xzf dist/*.tar.gz -C .venv-dist --strip-components 1 --one-top-level=source
	rm -r .venv-dist/source/keras_ptloss
	cd .venv-dist/source && KERAS_BACKEND=jax ../bin/pytest tests/test_api.py

docs: .venv/docs.installed
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

docs-test: .venv/docs_test.installed docs
	KERAS_BACKEND=jax $(BIN)/python -m pytest docs/browser

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
	rm -rf .venv .venv-* build dist *.egg-info demo-output docs/_build \
		docs/api/generated docs/benchmarks
