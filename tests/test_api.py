"""The public surface: documented, in the reference, and its examples run."""

import ast
import doctest
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_ptloss
from keras_ptloss import Correction, Distiller, losses, metrics

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(keras_ptloss.__file__).parent  # installed, or here
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    "keras_ptloss",
    *sorted(
        module.name
        for module in pkgutil.walk_packages(
            keras_ptloss.__path__, "keras_ptloss."
        )
    ),
]
PUBLIC_MODULES = [
    "callbacks",
    "correction",
    "distiller",
    "losses",
    "metrics",
    "plots",
    "proxy",
    "search",
    "serving",
    "soft_labels",
    "targets",
]
# Objects that users are given, interfaces for new losses and searches, and
# functions whose examples are those of `read_answers` and `read_tokens`.
WITHOUT_EXAMPLE = {
    "Answers",
    "DistillationTargets",
    "Examples",
    "Found",
    "ProxyTeacherResult",
    "SearchMethod",
    "SearchResult",
    "Table",
    "TeacherLoss",
    "TokenAnswers",
}
# Files that use a backend's own code, and why `keras.ops` is not enough.
BACKEND_CODE = {
    "_backend.py": "what differs between backends",
    "serving.py": "SavedModels are TensorFlow's format",
}


def public_objects():
    """Public classes and functions by name."""
    return {
        name: getattr(module, name)
        for module in map(
            importlib.import_module,
            (f"keras_ptloss.{name}" for name in PUBLIC_MODULES),
        )
        for name in module.__all__
        if callable(getattr(module, name))
    }


def test_names_at_the_top_are_public_in_their_modules():
    own = {
        name
        for name in keras_ptloss.__all__
        if name not in PUBLIC_MODULES and name != "__version__"
    }
    assert own <= set(public_objects())


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_reference_lists_every_public_name(name):
    page = ROOT / "docs" / "api" / f"{name}.rst"
    listed = re.findall(r"^   (\w+)$", page.read_text(), re.MULTILINE)
    module = importlib.import_module(f"keras_ptloss.{name}")
    assert sorted(listed) == sorted(module.__all__)


def test_docstrings():
    for name, thing in public_objects().items():
        text = inspect.getdoc(thing) or ""
        assert ">>>" in text or name in WITHOUT_EXAMPLE, (
            f"{name} has no example"
        )
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and (
                    function.__module__.startswith("keras_ptloss")
                    and not method.startswith("_")
                ):
                    assert inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    # On a busy machine, too, they print what they say.
    monkeypatch.setattr("keras_ptloss._progress.QUIET_SECONDS", 1e9)
    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs=public_objects(),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0


def imported_modules(path):
    """Yield the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_backend_code_stands_in_few_files():
    found = set()
    for path in FILES:
        for name in imported_modules(path):
            assert not name.startswith("keras.src"), path
            if re.match(r"(tensorflow|jax|torch)(\.|$)", name):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == set(BACKEND_CODE)


def test_import_loads_no_more_than_keras_on_jax(tmp_path):
    """TensorFlow takes seconds and memory; the extras may be absent."""
    code = (
        "import sys, keras; before = set(sys.modules); import keras_ptloss;"
        "extras = {'tensorflow', 'pyarrow', 'matplotlib', 'sklearn'};"
        "print(extras & (set(sys.modules) - before), 'tensorflow' in"
        " sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        env={"KERAS_BACKEND": "jax", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "set() False"


@pytest.mark.ci
def test_readme_example(tmp_path, monkeypatch):
    """The README's code runs as it stands."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="TensorFlow is the backend"
)
def test_search_and_training_without_tensorflow(tmp_path):
    """JAX and PyTorch users need not install TensorFlow."""
    code = """
import sys
sys.modules["tensorflow"] = None
import keras, numpy as np
from keras_ptloss import Distiller, ProxyTeacherSearch

rng = np.random.default_rng(0)
x = rng.normal(size=(256, 4)).astype("float32")
labels = (x[:, 0] > 0).astype(int) + (x[:, 1] > 1)
outputs = keras.layers.Dense(3, "softmax")
teacher = keras.Sequential([keras.Input((4,)), outputs])
result = ProxyTeacherSearch().search(teacher, labels, inputs=x, verbose=0)
student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
distiller = Distiller(student=student, teacher=teacher)
distiller.compile("adam", loss=result.loss(from_logits=True))
history = distiller.fit(x, epochs=3, verbose=0).history["loss"]
assert history[-1] < history[0], history
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=PACKAGE.parent,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_saved_models_load_in_another_process(tmp_path):
    """With keras_ptloss imported; to predict, also without it."""
    x, labels = np.ones((8, 4), "float32"), np.arange(8) % 3

    def network():
        dense = keras.layers.Dense(3, "softmax")
        model = keras.Sequential([keras.Input((4,)), dense])
        model.compile("sgd", losses.PTLoss([0.5, 0.1]))
        return model

    student, teacher = network(), network()
    student.fit(x, teacher.predict(x, verbose=0), verbose=0)
    student.save(tmp_path / "student.keras")
    distiller = Distiller(student=network(), teacher=teacher)
    correction = Correction(0.5, temperature=2.0)
    loss = losses.CorrectedKLDivergence(correction)
    distiller.compile("sgd", loss, metrics=[metrics.BrierScore()])
    distiller.fit(x, labels, verbose=0)
    distiller.save(tmp_path / "distiller.keras")

    def loaded(name, code, options=""):
        code = f"""
import sys, keras, numpy as np
{code}
model = keras.models.load_model({name!r} {options})
np.save("outputs.npy", model.predict(np.ones((8, 4), "float32"), verbose=0))
print(type(model).__name__, type(model.loss).__name__)
"""
        out = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        return out.stdout.split(), np.load(tmp_path / "outputs.npy")

    for model, name, code, options, expected in [
        (student, "student", "import keras_ptloss", "", "Sequential PTLoss"),
        (
            student,
            "student",
            "sys.modules['keras_ptloss'] = None",
            ", compile=False",
            "Sequential NoneType",
        ),
        (
            distiller,
            "distiller",
            "import keras_ptloss",
            "",
            "Distiller CorrectedKLDivergence",
        ),
    ]:
        types, outputs = loaded(f"{name}.keras", code, options)
        assert types == expected.split()
        np.testing.assert_allclose(
            outputs, model.predict(x, verbose=0), atol=1e-6
        )
