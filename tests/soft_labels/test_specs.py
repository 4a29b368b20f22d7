"""Specs: what they refuse, and that what they keep can be written."""

import json

import helpers
import numpy as np
import pytest
import stores
import token_stores
from imports import lines

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    TokenLabels,
    TokenLabelSpec,
    import_soft_labels,
    import_token_labels,
)

pytestmark = helpers.slow_but_on_one()

NUMPY = [
    {"num_classes": np.int64(4)},
    {"top_k": np.int64(2)},
    {"from_logits": np.bool_(True)},
    {"temperature": np.float32(2)},
    {"num_examples": np.int64(stores.N)},
    {"class_names": np.array(["a", "b", "c", "d"])},
    {"class_names": (name for name in "abcd")},
    {"teacher_name": np.str_("it"), "dtype": np.str_("float32")},
]


@pytest.mark.parametrize("kwargs", NUMPY)
def test_numpy_numbers_are_stored(path, kwargs):
    """A batch is paid for once: it is stored, and the second call resumes."""
    dataset = stores.features()
    if "num_examples" in kwargs:
        dataset = stores.Batches(dataset)
    spec = SoftLabelSpec(**kwargs)
    teacher = stores.Teacher(logits=bool(kwargs.get("from_logits")))
    for _ in range(2):
        labels = SoftLabels.write(teacher, dataset, path, spec=spec, verbose=0)
    assert teacher.asked == stores.N
    manifest = json.loads(next(path.glob("*/manifest.json")).read_text())
    stored = labels.spec
    for name in kwargs:
        assert getattr(stored, name) == getattr(spec, name)
        written = manifest["spec"][name]
        written = tuple(written) if name == "class_names" else written
        assert written == getattr(spec, name)
        assert type(written) is type(getattr(spec, name))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"vocabulary_size": np.int64(token_stores.V)},
        {"top_k": np.int64(3)},
        {"from_logits": np.bool_(True)},
        {"temperature": np.float32(2)},
    ],
)
def test_numpy_numbers_of_tokens_are_stored(path, kwargs):
    spec = TokenLabelSpec(
        **{"top_k": 3, "vocabulary_size": token_stores.V, **kwargs}
    )
    teacher = token_stores.Teacher(entries=3)
    for _ in range(2):
        labels = TokenLabels.write(
            teacher, token_stores.texts(), path, spec=spec, verbose=0
        )
    assert teacher.asked == len(labels) == len(token_stores.texts())
    assert labels.spec == spec


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"temperature": "a"}, "`temperature` must be a positive number"),
        ({"temperature": None}, "`temperature` must be a positive number"),
        ({"temperature": True}, "`temperature` must be a positive number"),
        ({"temperature": np.nan}, "`temperature` must be .*temperature=nan"),
        ({"temperature": 10**400}, "`temperature` must be a positive number"),
        ({"teacher_name": ("a", 1)}, r"`teacher_name` .*=\('a', 1\)"),
        ({"teacher_name": 5}, "`teacher_name` must be a text, or None"),
        ({"from_logits": "no"}, "`from_logits` must be True or False"),
    ],
)
@pytest.mark.parametrize("kind", [SoftLabelSpec, TokenLabelSpec])
def test_notes_of_either_kind(kind, kwargs, match):
    needed = {"top_k": 2} if kind is TokenLabelSpec else {}
    with pytest.raises(ValueError, match=match):
        kind(**needed, **kwargs)


@pytest.mark.parametrize("names", [5, 3.5, ("a", 1), [["a"], "b"]])
def test_class_names(names):
    with pytest.raises(ValueError, match="`class_names` must be at least two"):
        SoftLabelSpec(class_names=names)


@pytest.mark.parametrize("spec", [{"top_k": 2}, {}, "x"])
def test_a_spec_is_no_dictionary(path, spec):
    source = path.with_suffix(".jsonl")
    source.write_text(lines([0.5, 0.5]))
    teacher = stores.Teacher()
    match = r"`spec` must be a (SoftLabel|TokenLabel)Spec. Received: spec="
    for call in (
        lambda: SoftLabels.write(teacher, stores.features(), path, spec=spec),
        lambda: SoftLabels.open(path, spec=spec),
        lambda: import_soft_labels(source, ["a"], path, spec=spec),
        lambda: TokenLabels.write(teacher, [[1]], path, spec=spec),
        lambda: import_token_labels(source, path, spec=spec, format="vllm"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert not teacher.asked
    assert not path.exists()


def test_names_of_earlier_versions_are_read(path):
    """Which stored whatever JSON can hold; what is paid for stays."""
    rows = stores.write(path)[:]
    file = next(path.glob("*/manifest.json"))
    manifest = json.loads(file.read_text())
    manifest["spec"]["teacher_name"] = ["a", 1]
    del manifest["checksum"]
    file.write_text(json.dumps(manifest))
    labels = SoftLabels.open(path)
    assert labels.spec.teacher_name == "['a', 1]"
    np.testing.assert_array_equal(labels[:], rows)
    stores.write(path, teacher_name="['a', 1]")
