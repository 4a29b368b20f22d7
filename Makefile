# On a fresh machine: python3, make and the package registries are enough.
#   make demo         distil students from a biased teacher, on handwritten digits
#   make test         the tests, on TensorFlow and on JAX
#   make test-floor   the core's, on the lowest versions that setup.cfg allows
#   make test-torch   the core's, on PyTorch; test-floor-torch: on the lowest Keras
#   make test-dist    the wheel, built and tested as it would be installed
#   make test-rest    a student served by KServe, in an environment of its own
#   make lint         ruff, mypy, and the layers in pyproject.toml
#   make slow         the tests that are left out of `make test`
#   make docs         the site, in docs/_build/html; INTERSPHINX=0: without links
#                     to other projects, looked up where there is a network
#   make docs-test    the site in a browser: Debian's chromium, or CHROMIUM=path
#   make docs-quick   both in two minutes, without running the pages' code
# PYTHON=python3.13 takes another interpreter; `make clean` first.

PYTHON ?= python3
# For test-floor and test-torch, whose wheels need not be there for later ones.
OLDEST_PYTHON ?= python3.11
# The CPU's. An index that lacks it: PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu, or TORCH=torch, with CUDA's libraries.
TORCH ?= torch==2.13.0+cpu
BIN = .venv/bin
CORE = tests/losses tests/proxy tests/search tests/distiller tests/soft_labels \
	tests/test_binary.py tests/test_calibration.py tests/test_checks.py \
	tests/test_correction.py tests/test_metrics.py
# Of the core's, by their markers; see pyproject.toml.
MARKS ?= not slow
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-floor test-floor-torch test-torch test-rest slow lint dist \
	test-dist docs docs-test docs-quick clean
# Nothing is left half-installed by an interrupted run.
.DELETE_ON_ERROR:

demo: .venv/demo.installed
	$(BIN)/python examples/digits.py --output demo-output

test: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n 2 -m "not slow and not rest"
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 -m "not slow and not rest"

test-floor: .venv-floor-tensorflow/installed .venv-floor-jax/installed
	KERAS_BACKEND=tensorflow .venv-floor-tensorflow/bin/python -m pytest -n 2 \
		-m "$(MARKS)" $(CORE)
	KERAS_BACKEND=jax .venv-floor-jax/bin/python -m pytest -n 2 \
		-m "$(MARKS)" $(CORE)

test-floor-torch: .venv-floor-torch/installed
	KERAS_BACKEND=torch .venv-floor-torch/bin/python -m pytest -n 2 \
		-m "$(MARKS)" $(CORE)

# With JAX beside it, to compare with.
test-torch: .venv-torch/installed
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest -n 2 \
		-m "$(MARKS)" $(CORE) tests/test_backends.py \
		tests/test_pytorch.py \
		tests/test_without_tensorflow.py

slow: .venv/test.installed .venv/slow.installed
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
	@! git ls-files --cached --ignored --exclude-standard | grep . \
		|| { echo "these are ignored, and committed"; exit 1; }

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
	  "$$(echo dist/*.whl)[tensorflow,jax,parquet]"
	tar -xzf dist/*.tar.gz -C .venv-dist --strip-components 1 --one-top-level=source
	rm -r .venv-dist/source/keras_ptloss
	cd .venv-dist/source && KERAS_BACKEND=jax ../bin/pytest tests/test_api.py

docs: .venv/docs.installed
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

docs-test: .venv/docs-test.installed docs
	KERAS_BACKEND=jax $(BIN)/python -m pytest docs/browser

docs-quick: .venv/docs-test.installed
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going \
		-D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer \
		docs docs/_build/html
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 -m "not slow" docs/browser

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
	$(call require_python,$(PYTHON))
	$(PYTHON) -m venv .venv

.venv-floor-%/installed: tests/floor-%.txt setup.cfg pyproject.toml
	$(call require_python,$(OLDEST_PYTHON))
	$(OLDEST_PYTHON) -m venv --clear .venv-floor-$*
	.venv-floor-$*/bin/pip install --quiet --constraint $< \
		--editable ".[$*,core-tests]"
	touch $@

.venv-torch/installed: setup.cfg pyproject.toml
	$(call require_python,$(OLDEST_PYTHON))
	$(OLDEST_PYTHON) -m venv --clear .venv-torch
	.venv-torch/bin/pip install --quiet "$(TORCH)" \
		--editable ".[torch,jax,core-tests]"
	touch $@

# Before an environment is made of it, which the next run would take.
require_python = @$(1) -c "import sys; sys.exit( \
	sys.version_info < (3, 11) and '$(1) is Python %d.%d; 3.11 or later is \
	needed: make PYTHON=python3.11' % sys.version_info[:2])"

clean:
	rm -rf .venv .venv-* build dist *.egg-info *-output docs/_build \
		docs/api/generated docs/benchmarks
