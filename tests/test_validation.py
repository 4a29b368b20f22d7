"""Argument errors: each names the argument, what was expected, what came."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss._validation import (
    as_probabilities,
    check_choice,
    check_classes,
    check_count,
    check_epsilon,
    check_flag,
    check_head,
    check_number,
    fail,
    valid_probs,
)


def test_wording():
    with pytest.raises(
        ValueError, match=r"^`folds` must be two\. Received: folds='three'$"
    ):
        fail("folds", "two", "three")


@pytest.mark.parametrize(
    "check, good, wrong",
    [
        (
            lambda name, value: check_choice(name, value, ("a", "b")) or value,
            ["a", "b"],
            ["A", "", None, 1, ["a"]],
        ),
        (
            check_flag,
            [True, False, np.bool_(True)],
            ["no", "False", 0, 1, None, [True]],
        ),
        (
            check_count,
            [1, np.int64(7), np.uint8(3)],
            [0, -2, 1.0, "3", True, None, np.nan],
        ),
        (
            lambda name, value: check_number(name, value, at_least=0.0),
            [0, 0.5, np.float32(2), np.array(3)],
            [-1e-9, np.nan, np.inf, [1.0], "much", None],
        ),
    ],
    ids=["choice", "flag", "count", "number"],
)
def test_settings(check, good, wrong):
    for value in good:
        assert check("order", value) == value
    for value in wrong:
        with pytest.raises(ValueError, match="`order` must be .*order="):
            check("order", value)


@pytest.mark.parametrize(
    "epsilon, shape",
    [(2, (1,)), ([1.0, 2.0], (2,)), (np.ones((3, 2)), (3, 2))],
)
def test_epsilon(epsilon, shape):
    values = check_epsilon(epsilon, max_rank=2, classes=3)
    assert values.dtype == "float64"
    np.testing.assert_array_equal(values, np.reshape(epsilon, shape))
    tensor = ops.convert_to_tensor(epsilon, "float32")
    values = check_epsilon(tensor, max_rank=2, classes=3)
    assert ops.is_tensor(values) and values.shape == shape


@pytest.mark.parametrize(
    "epsilon, message",
    [
        (np.nan, "be finite.*epsilon=nan"),
        (ops.convert_to_tensor([1.0, np.nan]), "be finite.*nan"),
        ([], r"be of shape .*none.*empty.*epsilon=\[\]"),
        (np.ones((3, 0)), "be of shape .*epsilon=array"),
        (np.ones((1, 3, 2)), "be of shape .*epsilon=array"),
        ("big", "be numeric.*epsilon='big'"),
        ([[1.0], [1.0, 2.0]], "be numeric.*epsilon="),
        (np.ones((4, 2)), r"have shape \(3, None\).*shape \(4, 2\)"),
    ],
)
def test_wrong_epsilon(epsilon, message):
    with pytest.raises(ValueError, match="`epsilon` must " + message):
        check_epsilon(epsilon, max_rank=2, classes=3)


def test_epsilon_per_example():
    epsilon = np.ones((5, 3, 2))
    values = check_epsilon(epsilon, max_rank=3, classes=3, examples=5)
    np.testing.assert_array_equal(values, epsilon)
    with pytest.raises(ValueError, match=r"\(4, 3, None\).*\(5, 3, 2\)"):
        check_epsilon(epsilon, max_rank=3, classes=3, examples=4)


def test_classes():
    """Unknown sizes fit any."""
    unknown = keras.KerasTensor((None, None))
    check_classes("a", np.ones((5, 3)), "b", np.ones((5, 3)))
    check_classes("a", keras.KerasTensor((None, 3)), "b", unknown)
    for shape, message in {
        (2, 4): r"same number of classes.*\(2, 3\).*\(2, 4\)",
        (5, 3): r"same shape.*\(2, 3\).*\(5, 3\)",
        (2, 1, 3): r"same shape.*\(2, 3\).*\(2, 1, 3\)",
    }.items():
        with pytest.raises(ValueError, match="`a` and `b`.*" + message):
            check_classes("a", np.ones((2, 3)), "b", np.ones(shape))


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0]],
        [0.25, 0.75],
        np.full((2, 3, 4), 0.25),
        [[0.504, 0.5]],  # rounding of low precision
    ],
)
def test_probabilities(rows):
    probs = as_probabilities("t", rows, False, "pass from_logits=True")
    np.testing.assert_allclose(probs, rows, rtol=5e-3)
    np.testing.assert_allclose(probs.sum(axis=-1), 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[0.5, 0.5], [1.5, -0.5]], r"say logits=True.*t\[1\]=\[ 1\.5 -0\.5\]"),
        ([[np.inf, 0.0]], r"t\[0\]=\[inf  0\.\]"),
        ([[0.4, 0.5]], r"sums to 0\.9 \(1 of 1 rows are invalid\)"),
        ([[[0.5, 0.5]], [[1.0, 1.0]]], r"t\[1\]=.*1 of 2 rows"),
        # A softmax of percentages would be a wrong number without any sign.
        ([[40.0, 60.0], [99.0, 1.0]], "percentages: divide them by 100"),
    ],
)
def test_no_probabilities(rows, message):
    message = "`t` must hold probabilities.*" + message
    with pytest.raises(ValueError, match=message):
        as_probabilities("t", rows, False, "say logits=True")
    with pytest.raises(ValueError, match=message):
        valid_probs("t", ops.convert_to_tensor(rows), "say logits=True")


@pytest.mark.parametrize(
    "layer, shown",
    [
        (keras.layers.Dense(3, "softmax"), False),
        (keras.layers.Softmax(), False),
        (keras.layers.Dense(1, "sigmoid"), False),
        (keras.layers.Dense(1), True),
        (keras.layers.Lambda(ops.softmax), None),
    ],
)
def test_last_layer(layer, shown):
    """What it shows must be what is said; an operation shows nothing."""
    model = keras.Sequential([keras.Input((3,)), layer])
    for said in (None, True, False):
        if None in (said, shown) or said == shown:
            assert check_head("teacher", model, said, "logits") is shown
        else:
            with pytest.raises(
                ValueError, match=f"`logits` must be {shown}.*teacher="
            ):
                check_head("teacher", model, said, "logits")


def test_last_layer_of_another_form():
    for layer, message in {
        keras.layers.Dense(3, "sigmoid"): "3 independent sigmoids",
        keras.layers.Dense(3, "tanh"): "tanh does not give prob",
    }.items():
        model = keras.Sequential([keras.Input((3,)), layer])
        with pytest.raises(ValueError, match="`teacher` must.*" + message):
            check_head("teacher", model, None, "from_logits")
