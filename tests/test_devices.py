"""Several devices: the same result as one (JAX, in processes of their own)."""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="keras.distribution needs JAX"
)
TWO_DEVICES = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
}

DATA_PARALLEL = """
import keras, numpy as np
from keras_ptloss import Distiller, PTLoss, ProxyTeacherSearch
from keras_ptloss.search import GradientSearch, RandomSearch

rng = np.random.default_rng(0)
teacher, labels = rng.dirichlet([1, 1, 1], size=500), rng.integers(0, 3, 500)
searches = [
    ProxyTeacherSearch(RandomSearch(trials=20)),
    ProxyTeacherSearch(GradientSearch(per_class=True, penalty=0.01)),
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


def test_search_and_distiller_under_data_parallel():
    out = subprocess.run(
        [sys.executable, "-c", DATA_PARALLEL],
        env=TWO_DEVICES,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "same on 2" in out.stdout


TWO_PROCESSES = """
import json, sys
import keras, numpy as np
import tensorflow as tf
from keras_ptloss import Distiller, PTLoss, ProxyTeacherSearch

address, rank = sys.argv[1], int(sys.argv[2])
devices = 1
if address:
    keras.utils.set_random_seed(0)
    keras.distribution.initialize(address, num_processes=2, process_id=rank)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    devices = keras.distribution.distribution().device_mesh.devices.size

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 4)).astype("float32")
stored = rng.dirichlet([1, 1, 1], size=64).astype("float32")
loss = PTLoss([0.5, -0.2], from_logits=True)

def linear(seed):
    init = keras.initializers.GlorotUniform(seed=seed)
    dense = keras.layers.Dense(3, kernel_initializer=init)
    return keras.Sequential([keras.Input((4,)), dense])

def fit(model, *arrays):
    model.compile("sgd", loss=loss)
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(16)
    return model.fit(data, epochs=3, verbose=0).history

student = linear(1)
distiller = Distiller(linear(1), linear(2))
found = [fit(student, x, stored), fit(distiller, x)]
weights = student.get_weights() + distiller.student.get_weights()
from keras_ptloss.search import GradientSearch
search = ProxyTeacherSearch(
    GradientSearch(order=2, per_class=True, penalty=0.01)
)
result = search.search(stored, np.arange(64) % 3)
found.append([w.tolist() for w in [*weights, result.epsilon]])
print(json.dumps({"devices": devices, "found": found}))
"""


def test_training_by_two_processes():
    """Each with two devices and half of a batch: as one device by itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, *arguments],
            env=TWO_DEVICES,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (("", "0"), (address, "0"), (address, "1"))
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = []
    for process, (out, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    assert [result["devices"] for result in results] == [1, 4, 4]
    (*logs, weights), *others = [result["found"] for result in results]
    assert sorted(logs[1]) == ["loss", "teacher_agreement"]
    for *other_logs, other_weights in others:
        for log, other in zip(logs, other_logs, strict=True):
            for name, values in log.items():
                np.testing.assert_allclose(other[name], values, atol=1e-5)
        for weight, other in zip(weights, other_weights, strict=True):
            np.testing.assert_allclose(other, weight, atol=1e-5)
