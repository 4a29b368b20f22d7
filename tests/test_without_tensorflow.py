"""What needs no TensorFlow does without it, and what does names the extra.

In processes of their own: one that cannot import it, and one that could.
"""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="the backend is TensorFlow"
)

BLOCKED = "import sys; sys.modules['tensorflow'] = None\n"

TRAIN = """
import sys, tempfile
import keras, numpy as np
from keras_ptloss import Distiller, ProxyTeacherSearch, SoftLabels
from keras_ptloss.search import GradientSearch

rng = np.random.default_rng(0)
x = rng.normal(size=(256, 4)).astype("float32")
labels = (x[:, 0] > 0).astype(int) + (x[:, 1] > 1)
outputs = keras.layers.Dense(3, "softmax")
teacher = keras.Sequential([keras.Input((4,)), outputs])
method = GradientSearch(order=1)
result = ProxyTeacherSearch(method).search(teacher, labels, inputs=x)

student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
distiller = Distiller(student, teacher)
distiller.compile("adam", loss=result.loss(from_logits=True))
history = distiller.fit(x, epochs=5, verbose=0).history["loss"]
assert history[-1] < history[0], history
"""

STORE = """
store = tempfile.mkdtemp() + "/store"
stored = SoftLabels.write(teacher, x, store, verbose=0)
student.compile("adam", loss=result.loss(from_logits=True))
history = student.fit(stored.attach(x), epochs=5, verbose=0).history["loss"]
assert history[-1] < history[0], history
student.save(store + "/student.keras")
again = keras.saving.load_model(store + "/student.keras")
np.testing.assert_array_equal(
    again.predict(x, verbose=0), student.predict(x, verbose=0)
)
"""

EXPORT = """
import os, tempfile
import keras
from keras_ptloss import export_student

student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
served = tempfile.mkdtemp() + "/served"
try:
    export_student(student, served, from_logits=True)
except ImportError as error:
    print(error)
assert not os.path.exists(served)
"""


def run(code):
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def test_search_training_and_stored_labels():
    assert run(BLOCKED + TRAIN + STORE + "print('done')") == "done\n"


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no other backend exports"
)
def test_export_names_the_extra():
    assert "pip install 'keras_ptloss[tensorflow]'" in run(BLOCKED + EXPORT)


def test_it_is_not_imported_where_it_is_installed():
    """It takes seconds and memory: search and training do not wait for it."""
    check = "print('tensorflow' in sys.modules)"
    assert run(TRAIN + check) == "False\n"
