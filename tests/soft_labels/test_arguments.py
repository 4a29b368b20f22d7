"""Wrong arguments of the store."""

import numpy as np
import pytest
from stores import (
    Batches,
    C,
    N,
    Teacher,
    features,
    tf_dataset,
    write,
)

from keras_ptloss.soft_labels import SoftLabels, SoftLabelSpec


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_examples": 0}, "`num_examples` must be an integer"),
        ({"class_names": ("a",)}, "`class_names` must be at least two"),
        ({"class_names": ("a", "a")}, "`class_names` must be at least two"),
        ({"class_names": "ab"}, "`class_names` must be at least two"),
        ({"from_logits": 1}, "`from_logits` must be True or False"),
        ({"temperature": 0}, "`temperature` must be a positive number"),
        ({"dtype": "int8"}, "`dtype` must be one of 'float16', 'float32'"),
        ({"top_k": 0}, "`top_k` must be an integer"),
        ({"num_classes": 1}, "`num_classes` must be an integer of at least 2"),
        (
            {"num_classes": 3, "class_names": ("a", "b")},
            "`num_classes` must be the 2 class names'",
        ),
        ({"top_k": 2, "from_logits": True}, "`top_k` must be None for logits"),
    ],
)
def test_spec_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SoftLabelSpec(**kwargs)


def test_write_arguments(path):
    with pytest.raises(ValueError, match="`teacher` must be"):
        write(path, 3)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        SoftLabels.write(Teacher(), features(), path, batch_size=0)
    with pytest.raises(ValueError, match="`verbose` must be"):
        SoftLabels.write(Teacher(), features(), path, verbose=3)
    with pytest.raises(ValueError, match="`num_examples` must be given"):
        write(path, dataset=Batches(features()))
    with pytest.raises(ValueError, match="`num_examples` must be the data"):
        write(path, num_examples=3)
    for n in (N - 1, N + 1):
        with pytest.raises(ValueError, match=f"must hold {n} examples"):
            write(
                path.with_suffix(f".{n}"),
                None,
                Batches(features()),
                num_examples=n,
            )
    with pytest.raises(ValueError, match="`dataset` must be finite"):
        write(path, dataset=tf_dataset(features()).repeat(), num_examples=N)
    for wrong in (3.0, {"a": features(), "b": features(3)}, np.zeros((0, 3))):
        with pytest.raises(ValueError, match="`dataset` must be a tf.data"):
            write(path, dataset=wrong)
    for shard in (1, (1, 1), (-1, 2), (0, N + 1), (0, 0)):
        with pytest.raises(ValueError, match="`shard` must be"):
            SoftLabels.write_shard(Teacher(), features(), path, shard=shard)
    with pytest.raises(ValueError, match="`top_k` must be below the 4"):
        write(path, top_k=C)
    with pytest.raises(ValueError, match="4 classes, not 2"):
        write(path.with_suffix(".names"), class_names=("a", "b"))
