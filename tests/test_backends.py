"""A search gives the same result on every backend."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_ptloss._backend import float64
from keras_ptloss._xla import log

SCRIPT = """
import json, numpy as np
from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import (
    CrossValidatedSearch,
    GradientSearch,
    RandomSearch,
)

rng = np.random.default_rng(0)
truth = rng.dirichlet([1.0, 1.0, 1.0, 1.0], size=400)
labels = np.array([rng.choice(4, p=row) for row in truth])
teacher = truth * [4.0, 1.0, 0.5, 1.0]
teacher /= teacher.sum(axis=1, keepdims=True)
found = []
for method, objective in (
    (RandomSearch(trials=30), None),
    (RandomSearch(trials=30, per_class=True), "brier"),
    (GradientSearch(per_class=True, calibration="vector", penalty=0.01), None),
    (GradientSearch(starts=3, penalty=0.001), None),
    (CrossValidatedSearch(order=2, folds=3), None),
):
    search = ProxyTeacherSearch(method, objective=objective, seed=1)
    result = search.search(teacher, labels)
    found.append(
        [
            result.epsilon.ravel().tolist(),
            np.ravel(result.correction.scale).tolist(),
            [result.score],
            result.trials["score"],
        ]
    )
print(json.dumps(found))
"""


OTHERS = {"jax": "tensorflow", "torch": "jax"}


@pytest.mark.skipif(
    keras.backend.backend() not in OTHERS, reason="JAX's run compares with it"
)
def test_same_seed_same_result_on_another_backend(capsys):
    other = OTHERS[keras.backend.backend()]
    pytest.importorskip(other)
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "KERAS_BACKEND": other},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    exec(SCRIPT, {})
    texts = (capsys.readouterr().out, out.stdout)
    results = [json.loads(text.splitlines()[-1]) for text in texts]
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logarithm(dtype):
    """Of the whole range, and next to 1, where it is small."""
    info = np.finfo(dtype)
    near = 1.0 - 10.0 ** np.linspace(-16, -0.1, 500)
    wide = 10.0 ** np.linspace(np.log10(info.tiny) + 0.01, 4.0, 2000)
    x = np.concatenate([near, 2.0 - near, wide]).astype(dtype)
    with float64():
        got = keras.ops.convert_to_numpy(log(keras.ops.convert_to_tensor(x)))
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got, np.log(x.astype("float64")), rtol=8 * info.eps, atol=0
    )
