# On a fresh machine: python3, make and the package registries are enough.
#   make demo   distil students from a biased teacher, on handwritten digits
#   make test   the tests, on TensorFlow and on JAX
#   make lint   ruff, mypy, and the layers in pyproject.toml
#   make slow   the tests that are left out of `make test`
#   make docs   the site, in docs/_build/html; INTERSPHINX=0: without links to
#               other projects, which are looked up where there is a network
#   make docs-test   the site in a browser: Debian's chromium, or CHROMIUM=path

PYTHON ?= python3
BIN = .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test slow lint docs docs-test wheel clean
# Nothing is left half-installed by an interrupted run.
.DELETE_ON_ERROR:

demo: .venv/demo.installed
	$(BIN)/python examples/digits.py --output demo-output

test: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n 2 -m "not slow"
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 -m "not slow"

slow: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m slow
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m slow

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: .venv/docs.installed
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

docs-test: .venv/docs_test.installed docs
	KERAS_BACKEND=jax $(BIN)/python -m pytest docs/browser

wheel: .venv/test.installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# Installing one extra leaves the other in place.
.venv/%.installed: setup.cfg pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

.venv/bin/pip:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info demo-output docs/_build \
		docs/api/generated docs/benchmarks
