"""Argument errors: each names the argument, what was expected, what came."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss._validation import (
    check_choice,
    check_classes,
    check_count,
    check_epsilon,
    check_flag,
    check_labels,
    check_number,
    check_output_form,
    check_probabilities,
    fail,
)


def compiled(function):
    """Compile a function of one tensor as the backend does in `fit`."""
    if keras.backend.backend() == "torch":
        pytest.skip("PyTorch does not compile in `fit`")
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, autograph=False)


def test_wording():
    with pytest.raises(
        ValueError, match=r"^`folds` must be two\. Received: folds='three'$"
    ):
        fail("folds", "two", "three")


class TestChoice:
    def test_good(self):
        check_choice("solver", "newton", ("newton", "fsolve"))

    @pytest.mark.parametrize("value", ["Newton", "", None, 1, ["newton"]])
    def test_wrong(self, value):
        with pytest.raises(
            ValueError,
            match="`solver` must be one of 'fsolve', 'newton'.*solver=",
        ):
            check_choice("solver", value, ("newton", "fsolve"))


class TestFlag:
    @pytest.mark.parametrize("value", [True, False, np.bool_(True)])
    def test_good(self, value):
        flag = check_flag("from_logits", value)
        assert type(flag) is bool
        assert flag == value

    @pytest.mark.parametrize("value", ["no", "False", 0, 1, None, [True]])
    def test_wrong(self, value):
        with pytest.raises(
            ValueError, match="`entropy` must be True or False.*entropy="
        ):
            check_flag("entropy", value)


class TestCount:
    @pytest.mark.parametrize("value", [1, np.int64(7), np.uint8(3)])
    def test_good(self, value):
        count = check_count("order", value)
        assert type(count) is int
        assert count == value

    @pytest.mark.parametrize("value", [0, -2, 1.0, "3", True, None, np.nan])
    def test_wrong(self, value):
        with pytest.raises(
            ValueError,
            match="`order` must be an integer of at least 1.*order=",
        ):
            check_count("order", value)

    def test_at_least(self):
        assert check_count("folds", 2, at_least=2) == 2
        with pytest.raises(ValueError, match="`folds`.*at least 2.*folds=1"):
            check_count("folds", 1, at_least=2)


class TestNumber:
    @pytest.mark.parametrize("value", [0, 0.5, np.float32(2), np.array(3)])
    def test_good(self, value):
        number = check_number("penalty", value, at_least=0.0)
        assert type(number) is float
        assert number == value

    @pytest.mark.parametrize(
        "value", [-1e-9, np.nan, np.inf, [1.0], "much", None]
    )
    def test_wrong(self, value):
        with pytest.raises(ValueError, match="`penalty` must be .*penalty="):
            check_number("penalty", value, at_least=0.0)


class TestEpsilon:
    @pytest.mark.parametrize(
        "epsilon, shape",
        [(2, (1,)), ([1.0, 2.0], (2,)), (np.ones((3, 2)), (3, 2))],
    )
    def test_good(self, epsilon, shape):
        values = check_epsilon(epsilon, max_rank=2, classes=3)
        assert isinstance(values, np.ndarray)
        assert values.dtype == "float64"
        np.testing.assert_array_equal(values, np.reshape(epsilon, shape))

    @pytest.mark.parametrize(
        "epsilon, message",
        [
            (np.nan, "`epsilon` must be finite.*epsilon=nan"),
            ([0.0, -np.inf], r"`epsilon` must be finite.*epsilon=\[0.0, -inf"),
            ([], r"`epsilon` must be of shape .*none.*empty.*epsilon=\[\]"),
            (np.ones((3, 0)), "`epsilon` must be of shape .*epsilon=array"),
            (np.ones((1, 3, 2)), "`epsilon` must be of shape .*epsilon=array"),
            ("big", "`epsilon` must be numbers.*epsilon='big'"),
            ([[1.0], [1.0, 2.0]], "`epsilon` must be numbers.*epsilon="),
            (
                np.ones((4, 2)),
                r"`epsilon` must have one row per class, \(\.\.\., 3, order\).*"
                r"shape \(4, 2\) with 3 classes",
            ),
        ],
    )
    def test_wrong(self, epsilon, message):
        with pytest.raises(ValueError, match=message):
            check_epsilon(epsilon, max_rank=2, classes=3)

    def test_per_example(self):
        epsilon = np.ones((5, 3, 2))
        values = check_epsilon(epsilon, max_rank=3, classes=3, examples=5)
        np.testing.assert_array_equal(values, epsilon)
        with pytest.raises(
            ValueError, match=r"one entry per example, \(4, .*\(5, 3, 2\)"
        ):
            check_epsilon(epsilon, max_rank=3, classes=3, examples=4)

    def test_tensor_stays_one(self):
        tensor = ops.convert_to_tensor([1.0, 2.0])
        assert ops.is_tensor(check_epsilon(tensor, max_rank=2))

    def test_nan_in_a_tensor(self):
        tensor = ops.convert_to_tensor([1.0, np.nan])
        with pytest.raises(ValueError, match="`epsilon` must be finite.*nan"):
            check_epsilon(tensor, max_rank=2)

    def test_shape_is_checked_under_trace(self):
        check = compiled(lambda e: check_epsilon(e, max_rank=2, classes=3))
        assert check(ops.ones((3, 2))).shape == (3, 2)
        with pytest.raises(ValueError, match=r"\(4, 2\) with 3 classes"):
            check(ops.ones((4, 2)))


class TestClasses:
    def test_good(self):
        check_classes("a", np.ones((5, 3)), "b", np.ones((5, 3)))

    def test_other_shape(self):
        with pytest.raises(
            ValueError, match=r"`a` and `b`.*same shape.*\(2, 3\).*\(5, 3\)"
        ):
            check_classes("a", np.ones((2, 3)), "b", np.ones((5, 3)))

    def test_different(self):
        with pytest.raises(
            ValueError,
            match=r"`a` and `b`.*same number of classes.*\(2, 3\).*\(2, 4\)",
        ):
            check_classes("a", np.ones((2, 3)), "b", np.ones((2, 4)))

    def test_unknown_sizes_fit_any(self):
        signature = keras.KerasTensor((None, None))
        check_classes("a", signature, "b", np.ones((5, 3)))
        check_classes("a", keras.KerasTensor((None, 3)), "b", signature)
        with pytest.raises(ValueError, match="same shape"):
            check_classes("a", signature, "b", np.ones((5, 2, 3)))

    def test_no_class_axis(self):
        with pytest.raises(
            ValueError, match=r"`b` must have a class axis.*\(\)"
        ):
            check_classes("a", np.ones(3), "b", np.ones(()))


class TestProbabilities:
    @pytest.mark.parametrize(
        "rows",
        [
            [[1.0, 0.0]],
            [0.25, 0.75],
            np.full((2, 3, 4), 0.25),
            [[0.504, 0.5]],  # rounding of low precision
            np.ones((0, 3)),
        ],
    )
    def test_good(self, rows):
        check_probabilities(
            "y_true", ops.convert_to_tensor(rows), "say logits=True"
        )

    @pytest.mark.parametrize(
        "rows, message",
        [
            ([[0.5, 0.5], [1.5, -0.5]], r"y_true\[1\]=\[ 1\.5 -0\.5\]"),
            ([[np.nan, 1.0]], r"y_true\[0\]=\[nan  1\.\]"),
            ([[np.inf, 0.0]], r"y_true\[0\]=\[inf  0\.\]"),
            ([[0.4, 0.5]], r"sums to 0\.9 \(1 of 1 rows are bad\)"),
            ([[2.0, 3.0], [1.0, 4.0]], r"sums to 5 \(2 of 2 rows are bad\)"),
            ([[[0.5, 0.5]], [[1.0, 1.0]]], r"y_true\[1\]=.*1 of 2 rows"),
        ],
    )
    def test_wrong(self, rows, message):
        with pytest.raises(
            ValueError,
            match="`y_true` must hold probabilities.*say logits=True.*"
            + message,
        ):
            check_probabilities(
                "y_true", ops.convert_to_tensor(rows), "say logits=True"
            )

    def test_cost_nothing_under_trace(self):
        def function(rows):
            check_probabilities("y_true", rows, "say logits=True")
            return rows

        rows = ops.convert_to_tensor([[2.0, 3.0]])
        np.testing.assert_array_equal(compiled(function)(rows), [[2.0, 3.0]])


class TestOutputForm:
    """What a model's last layer tells of its outputs."""

    ENDINGS = {
        "softmax": keras.layers.Dense(3, "softmax"),
        "softmax_layer": keras.layers.Softmax(),
        "sigmoid": keras.layers.Dense(1, "sigmoid"),
    }

    def model(self, layer):
        return keras.Sequential([keras.Input((3,)), layer])

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_probabilities(self, ending):
        model = self.model(self.ENDINGS[ending])
        check_output_form("teacher", model, False, "from_logits")
        name = ending.removesuffix("_layer")
        with pytest.raises(
            ValueError,
            match=f"`from_logits` must be False.*ends in a {name}.*"
            "from_logits=True, with teacher=",
        ):
            check_output_form("teacher", model, True, "from_logits")

    def test_several_sigmoids_tell_nothing(self):
        model = self.model(keras.layers.Dense(3, "sigmoid"))
        check_output_form("teacher", model, True, "from_logits")

    @pytest.mark.parametrize("units", [1, 3])
    def test_logits(self, units):
        model = self.model(keras.layers.Dense(units))
        check_output_form("teacher", model, True, "from_logits")
        with pytest.warns(
            UserWarning, match="`teacher`.*logits.*say from_logits=True"
        ):
            check_output_form("teacher", model, False, "from_logits")


class TestLabels:
    @pytest.mark.parametrize(
        "labels", [[0, 2, 1], np.array([[0], [2], [1]], "uint8"), (0, 2, 1)]
    )
    def test_good(self, labels):
        array = check_labels(labels, examples=3, classes=3)
        assert array.dtype == "int64"
        np.testing.assert_array_equal(array, [0, 2, 1])

    @pytest.mark.parametrize(
        "labels, message",
        [
            ([], r"non-empty.*labels of shape \(0,\)"),
            (np.eye(3), r"one class per example.*labels of shape \(3, 3\)"),
            (2, r"labels of shape \(\)"),
            ([0.0, 1.0, 2.0], "be integers.*labels of dtype float64"),
            (["a", "b", "c"], "be integers.*labels of dtype <U1"),
            ([True, False, True], "be integers.*labels of dtype bool"),
            ([0, 1], "one entry for each.*, 3.*labels of length 2"),
            ([0, 1, 2, 0], "one entry for each.*, 3.*labels of length 4"),
            ([0, 3, 1], r"be in \[0, 3\).*labels\[1\]=3"),
            ([0, 1, -1], r"be in \[0, 3\).*labels\[2\]=-1"),
        ],
    )
    def test_wrong(self, labels, message):
        with pytest.raises(ValueError, match="`labels` must .*" + message):
            check_labels(labels, examples=3, classes=3)
