"""The public surface: what is in it, that it is documented, that it runs."""

import ast
import doctest
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import keras_ptloss

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = sorted(n for n in vars(keras_ptloss) if not n.startswith("_"))
MODULES = [
    f"keras_ptloss.{m.name}"
    for m in pkgutil.iter_modules(keras_ptloss.__path__)
]


def test_public_names():
    assert PUBLIC == [
        "BrierScore",
        "Distiller",
        "ExpectedCalibrationError",
        "FilteredTeacher",
        "Flooding",
        "FocalLoss",
        "ImportReport",
        "KLToTeacher",
        "LabelPerturbedLoss",
        "LabelSmoothingLoss",
        "PTLoss",
        "ProxyTeacher",
        "ProxyTeacherResult",
        "ProxyTeacherSearch",
        "SearchResult",
        "SoftLabelSpec",
        "SoftLabels",
        "TeacherAgreement",
        "TotalVariationDistance",
        "export_student",
        "focal_epsilon",
        "import_soft_labels",
        "label_smoothing_epsilon",
        "plot_distance_accuracy",
        "plot_loss_curve",
        "plot_proxy_teacher",
        "plot_reliability",
        "plot_search",
        "proxy_teacher",
        "pt_loss",
        "temperature_epsilon",
        "with_retries",
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    """ruff's rules do not look into modules with an underscore."""
    thing = getattr(keras_ptloss, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and callable(function):
                assert inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    module = __import__(name, fromlist=["_"])
    result = doctest.testmod(
        module,
        extraglobs=dict(vars(keras_ptloss)),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0


def test_public_classes_and_functions_have_examples():
    for name in PUBLIC:
        thing = getattr(keras_ptloss, name)
        if name not in ("ProxyTeacherResult", "SearchResult", "ImportReport"):
            assert ">>>" in inspect.getdoc(thing), name


def test_public_keras_only():
    """No private Keras; a backend's own code in few places."""
    backend_code = {"_backend.py", "_export.py"}
    for path in (ROOT / "keras_ptloss").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert not name.startswith("keras.src"), path
                if re.match(r"(tensorflow|jax|torch)(\.|$)", name):
                    assert path.name in backend_code or path.name.startswith(
                        "_soft_label"
                    ), f"{path.name} imports {name}"


def test_import_needs_no_tensorflow_on_jax(tmp_path):
    """TensorFlow takes seconds and memory; on JAX it waits until needed."""
    code = "import sys, keras_ptloss; print('tensorflow' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"KERAS_BACKEND": "jax", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "False"


def test_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
