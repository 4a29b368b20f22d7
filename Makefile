# On a fresh machine, python3, make and the package registries are enough.
#   make demo       distil students from a biased teacher, on handwritten digits
#   make test       what to run after a change: TensorFlow in full, JAX in part
#   make test-all   what CI runs: linters, `make test`, and the targets below
#   make nightly    everything slower
#   make lint       ruff, mypy, and the import layers in pyproject.toml
#   make docs       build the site in docs/_build/html, running its code
# PYTHON=python3.13 uses another interpreter; run `make clean` first.

PYTHON ?= python3
# The lowest supported versions have no wheels for later Pythons.
OLDEST_PYTHON ?= python3.11
# The CPU build of PyTorch. If your index lacks it, use
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu or TORCH=torch.
TORCH ?= torch==2.13.0+cpu
BIN = .venv/bin
QUICK = -m "not ci and not nightly"
# What can behave differently on another backend.
BACKEND_TESTS = tests/losses tests/test_proxy.py tests/test_correction.py \
	tests/test_distiller.py tests/test_metrics.py
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-all nightly lint test-ci test-torch test-floor dist \
	test-dist docs docs-quick docs-test clean
.DELETE_ON_ERROR:

demo: .venv/demo.installed
	KERAS_BACKEND=jax $(BIN)/python examples/digits.py

test: .venv/test.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n 2 $(QUICK)
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 $(QUICK) $(BACKEND_TESTS) \
		tests/test_serving.py tests/search/test_search.py

test-all: lint test test-ci test-torch test-floor test-dist docs-quick

test-ci: .venv/test.installed .venv/ray.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n 2 -m ci
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 -m ci $(BACKEND_TESTS)

# A smoke run: losses, solver and distiller on PyTorch.
test-torch: .venv-torch/installed
	KERAS_PTLOSS_REQUIRE_ALL=0 KERAS_BACKEND=torch .venv-torch/bin/python -m pytest -n 2 $(QUICK) \
		$(BACKEND_TESTS)

# The same on the lowest versions that setup.cfg allows.
test-floor: .venv-floor-tensorflow/installed .venv-floor-jax/installed
	KERAS_PTLOSS_REQUIRE_ALL=0 KERAS_BACKEND=tensorflow .venv-floor-tensorflow/bin/python -m pytest -n 2 \
		$(QUICK) $(BACKEND_TESTS)
	KERAS_PTLOSS_REQUIRE_ALL=0 KERAS_BACKEND=jax .venv-floor-jax/bin/python -m pytest -n 2 \
		$(QUICK) $(BACKEND_TESTS)

nightly: .venv/test.installed .venv/ray.installed .venv-rest/installed \
		.venv-torch/installed .venv-floor-tensorflow/installed \
		.venv-floor-jax/installed docs-test
	KSERVE_PYTHON=.venv-rest/bin/python KERAS_BACKEND=tensorflow \
		$(BIN)/python -m pytest -m nightly
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2
	KERAS_PTLOSS_REQUIRE_ALL=0 KERAS_BACKEND=torch .venv-torch/bin/python -m pytest -n 2
	KERAS_PTLOSS_REQUIRE_ALL=0 KERAS_BACKEND=tensorflow .venv-floor-tensorflow/bin/python -m pytest -n 2
	KERAS_PTLOSS_REQUIRE_ALL=0 KERAS_BACKEND=jax .venv-floor-jax/bin/python -m pytest -n 2

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	@! git ls-files --cached --ignored --exclude-standard | grep . \
		|| { echo "these files are committed although ignored"; exit 1; }

dist: .venv/release.installed
	rm -rf dist
	$(BIN)/check-manifest
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The wheel in an environment of its own, with the tests of the source
# distribution. Plain `pytest` does not put the checkout on the path.
test-dist: dist
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/pip install --quiet pytest hypothesis \
		"$$(echo dist/*.whl)[tensorflow,demo,arrow]"
	tar -xzf dist/*.tar.gz -C .venv-dist --strip-components 1 --one-top-level=source
	rm -r .venv-dist/source/keras_ptloss
	cd .venv-dist/source && KERAS_BACKEND=tensorflow ../bin/pytest tests/test_api.py

# Pages of functions that were renamed would fail.
docs: .venv/docs.installed
	rm -rf docs/api/generated
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

# Without running the pages' code.
docs-quick: .venv/docs.installed
	rm -rf docs/api/generated
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going \
		-D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer \
		docs docs/_build/html

# In a browser: Debian's chromium, or CHROMIUM=path.
docs-test: .venv/docs-test.installed docs
	KERAS_BACKEND=jax $(BIN)/python -m pytest docs/browser

# Installing one extra leaves the others in place.
.venv/%.installed: setup.cfg pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

.venv/bin/pip:
	$(call require_python,$(PYTHON))
	$(PYTHON) -m venv .venv

# KServe needs older releases of pandas and protobuf than the tests.
.venv-rest/installed:
	$(PYTHON) -m venv --clear .venv-rest
	.venv-rest/bin/pip install --quiet kserve tensorflow
	touch $@

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
		--editable ".[torch,core-tests]"
	touch $@

# Checked before an environment is made with it.
require_python = @$(1) -c "import sys; sys.exit( \
	sys.version_info < (3, 11) and '$(1) is Python %d.%d; 3.11 or later is \
	needed: make PYTHON=python3.11' % sys.version_info[:2])"

clean:
	rm -rf .venv .venv-* build dist *.egg-info *-output docs/_build \
		docs/api/generated
