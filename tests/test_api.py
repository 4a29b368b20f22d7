"""The public surface: what is in it, that it is documented, that it runs."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import keras
import pytest

import keras_ptloss

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(keras_ptloss.__file__).parent  # installed, or here
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(keras_ptloss.__path__, "keras_ptloss.")
)

SURFACE = {
    "keras_ptloss": [
        "Correction",
        "Distiller",
        "PTLoss",
        "ProxyTeacher",
        "ProxyTeacherSearch",
        "SearchResult",
        "SoftLabels",
        "__version__",
        "callbacks",
        "distiller",
        "export_student",
        "layers",
        "losses",
        "metrics",
        "plots",
        "proxy",
        "proxy_teacher",
        "pt_loss",
        "search",
        "serving",
        "soft_labels",
    ],
    "keras_ptloss.callbacks": ["FilteredTeacher"],
    "keras_ptloss.distiller": ["Distiller"],
    "keras_ptloss.losses": [
        "Flooding",
        "FocalLoss",
        "LabelPerturbedLoss",
        "LabelSmoothingLoss",
        "PTLoss",
        "ProxyKLDivergence",
        "TopKPTLoss",
        "focal_epsilon",
        "fused_top_k_pt_loss",
        "label_smoothing_epsilon",
        "pt_loss",
        "temperature_epsilon",
        "top_k_pt_loss",
    ],
    "keras_ptloss.metrics": [
        "BrierScore",
        "ExpectedCalibrationError",
        "KLToTeacher",
        "TeacherAgreement",
        "TotalVariationDistance",
    ],
    "keras_ptloss.plots": [
        "plot_classes",
        "plot_distance_accuracy",
        "plot_loss_curve",
        "plot_proxy_teacher",
        "plot_reliability",
        "plot_search",
    ],
    "keras_ptloss.proxy": [
        "ProxyTeacher",
        "ProxyTeacherResult",
        "proxy_teacher",
    ],
    "keras_ptloss.layers": ["CorrectedTeacher", "TeachersSideBySide"],
    "keras_ptloss.search": [
        "CalibrationSearch",
        "CrossValidatedSearch",
        "GradientSearch",
        "ProxyTeacherSearch",
        "RandomSearch",
        "SearchResult",
        "top_k_events",
    ],
    "keras_ptloss.serving": ["export_student"],
    "keras_ptloss.soft_labels": [
        "ImportReport",
        "SoftLabelSpec",
        "SoftLabels",
        "TokenImportReport",
        "TokenLabelSpec",
        "TokenLabels",
        "attach_several",
        "fingerprint",
        "import_soft_labels",
        "import_token_labels",
        "with_retries",
    ],
}
# What users are given, never build: nothing to show.
RECORDS = {
    "ImportReport",
    "ProxyTeacherResult",
    "SearchResult",
    "TokenImportReport",
}

# A backend's own code, by file: why `keras.ops` does not serve.
BACKEND_CODE = {
    "_backend.py": "what differs between backends stands here",
    "_xla.py": "the bits of a number, which keras.ops do not give",
    "serving/_saved_model.py": "SavedModels are TensorFlow's format",
    "serving/_stablehlo.py": "what TensorFlow has to read of JAX's SavedModels",
}

# Private attributes of Keras, by file: why there is no public way.
PRIVATE_KERAS = {
    ("_keras.py", "_flatten_layers"): "whether all layers can be compiled",
    ("_keras.py", "_jax_state"): "an error leaves a state that would come back",
    ("_keras.py", "_direction"): "Keras's callbacks read it",
    ("distiller/_distiller.py", "_update_teacher_metrics"): "the package's own",
}


def public_names(module):
    """What `import *` brings."""
    return sorted(module.__all__)


def public_things():
    """Public classes and functions by name, each once."""
    return {
        name: getattr(importlib.import_module(module), name)
        for module, names in SURFACE.items()
        for name in names
        if callable(getattr(importlib.import_module(module), name))
    }


def test_files_and_functions_fit_a_reader():
    """At most 400 lines a file, 60 a function without its docstring."""
    for path in (ROOT / "keras_ptloss").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                first = node.body[0]
                if ast.get_docstring(node) is not None:
                    lines -= first.end_lineno - first.lineno + 1
                assert lines <= 60, (path, node.name)


def test_rooms():
    """Modules without an underscore are the rooms, one dot away."""
    public = [m for m in MODULES if "._" not in m]
    assert ["keras_ptloss", *public] == sorted(SURFACE)
    for module in public:
        importlib.import_module(module)
        assert module.removeprefix("keras_ptloss.") in keras_ptloss.__all__


@pytest.mark.parametrize("module", SURFACE)
def test_public_names(module):
    assert public_names(importlib.import_module(module)) == SURFACE[module]


@pytest.mark.parametrize("name", sorted(public_things()))
def test_docstrings(name):
    """ruff's rules do not look into modules with an underscore."""
    thing = public_things()[name]
    assert inspect.getdoc(thing)
    assert name in RECORDS or ">>>" in inspect.getdoc(thing)
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and callable(function):
                assert inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize("name", ["keras_ptloss", *MODULES])
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs=public_things(),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0


def imported(tree):
    """Yield the modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_read(tree):
    """Yield the private attributes that a file reads: `x._y`, `"_y"`.

    As a string because `getattr(x, "_y")` reads too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"_[a-z]\w*", node.value):
                yield node.value


def private_defined(tree):
    """Yield the private names that a file defines itself.

    An attribute is set on `self`: on another thing, `x._y = ...`, it is of
    whatever `x` is.
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if own and isinstance(node.ctx, ast.Store):
                yield node.attr
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                yield node.id


def test_no_private_modules_and_no_backend_outside_its_places():
    found = set()
    for path in FILES:
        file = path.relative_to(PACKAGE).as_posix()
        for name in imported(ast.parse(path.read_text())):
            assert not name.startswith("keras.src"), file
            if re.match(r"(tensorflow|jax|torch)(\.|$)", name):
                found.add(file)
    assert found == set(BACKEND_CODE)


def test_no_private_attributes_of_keras():
    """A private attribute that is read is one that the package defines.

    In the file that reads it or, for the solver's records, one that it imports
    from; setting it does not make it ours where Keras has it already.
    """
    trees = {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
        for path in FILES
    }
    own = {file: set(private_defined(tree)) for file, tree in trees.items()}
    keras_own = set(dir(keras.Model)) | set(dir(keras.losses.Loss))
    keras_own |= set(dir(keras.metrics.Metric)) | set(dir(keras.Layer))
    foreign = {
        (file, name)
        for file, tree in trees.items()
        for name in private_read(tree)
        if name not in own[file] or name in keras_own
    }
    assert foreign == set(PRIVATE_KERAS)


def test_import_needs_no_tensorflow_on_jax(tmp_path):
    """TensorFlow takes seconds and memory; on JAX it waits until needed."""
    code = "import sys, keras_ptloss; print('tensorflow' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        env={"KERAS_BACKEND": "jax", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "False"


# Its teacher has never seen four of the ten classes.
@pytest.mark.filterwarnings("ignore:the teacher")
def test_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
