"""Several devices: the same result as one (JAX, in a process of its own)."""

import os
import subprocess
import sys

import keras
import pytest

SCRIPT = """
import keras, numpy as np
from keras_ptloss import Distiller, ProxyTeacherSearch, PTLoss

rng = np.random.default_rng(0)
teacher, labels = rng.dirichlet([1, 1, 1], size=500), rng.integers(0, 3, 500)
searches = [
    ProxyTeacherSearch(trials=20, seed=0),
    ProxyTeacherSearch(
        method="gradient", objective="nll", per_class=True, penalty=0.01
    ),
]
x = rng.normal(size=(64, 4)).astype("float32")

def linear(seed):
    init = keras.initializers.GlorotUniform(seed=seed)
    dense = keras.layers.Dense(3, kernel_initializer=init)
    return keras.Sequential([keras.Input((4,)), dense])

def results():
    found = [s.search(teacher, labels).epsilon for s in searches]
    distiller = Distiller(linear(1), linear(2))
    distiller.compile("sgd", loss=PTLoss(0.5, from_logits=True))
    history = distiller.fit(x, epochs=3, shuffle=False, verbose=0).history
    return [*found, history["loss"], *distiller.student.get_weights()]

one = results()
keras.distribution.set_distribution(keras.distribution.DataParallel())
devices = keras.distribution.distribution().device_mesh.devices.size
assert devices == 2, devices
for a, b in zip(one, results(), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
print("same on", devices)
"""


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="keras.distribution needs JAX"
)
def test_search_and_distiller_under_data_parallel():
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "same on 2" in out.stdout
