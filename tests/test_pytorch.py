"""PyTorch: its dtypes and symbols, and what it cannot do, which it says."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Distiller, PTLoss, export_student, proxy_teacher
from keras_ptloss._backend import maximum, minimum, visible_values

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="about PyTorch"
)


class TestDtype:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_larger_and_smaller(self, dtype):
        """Keras's own make float32 of float64."""
        x = np.array([-1.0, 1 / 3, np.nan], dtype)
        tensor = ops.convert_to_tensor(x)
        for ours, numpys, other in (
            (maximum, np.maximum, 0.0),
            (minimum, np.minimum, 0.0),
            (maximum, np.maximum, ops.convert_to_tensor(x[::-1].copy())),
        ):
            got = ops.convert_to_numpy(ours(tensor, other))
            assert got.dtype == dtype
            np.testing.assert_array_equal(
                got, numpys(x, ops.convert_to_numpy(other))
            )


class TestVisibleValues:
    def test_recorded_for_a_gradient(self):
        x = ops.convert_to_tensor([1.0, 2.0]).requires_grad_()
        np.testing.assert_array_equal(visible_values(2 * x), [2.0, 4.0])

    def test_symbols(self):
        with keras.device("meta"):
            assert visible_values(ops.zeros((2, 3))) is None
        assert visible_values(keras.KerasTensor((2, 3))) is None

    def test_an_error_of_the_user_is_the_one_that_is_raised(self):
        """Keras infers shapes by ones, which are not called no rows."""
        student = helpers.linear_model(4)
        loss = PTLoss(np.ones((3, 2)), from_logits=True)
        student.compile("sgd", loss=loss)
        with pytest.raises(ValueError, match="one row a class"):
            student.fit(*helpers.soft_labelled(4), verbose=0)

    def test_ones_are_no_probabilities(self):
        with pytest.raises(ValueError, match="must hold probabilities"):
            PTLoss(0.5)(np.ones((2, 3)), np.full((2, 3), 1 / 3))


def test_the_teacher_is_not_recorded():
    teacher = helpers.linear_model(3, activation="softmax", seed=1)
    student = helpers.linear_model(3, activation="softmax")
    recorded = []

    class Loss(PTLoss):
        def call(self, y_true, y_pred):
            recorded.append((y_true.requires_grad, y_pred.requires_grad))
            return super().call(y_true, y_pred)

    distiller = Distiller(student, teacher)
    distiller.compile("sgd", loss=Loss(0.5))
    distiller.fit(helpers.soft_labelled(3)[0], verbose=0)
    assert recorded[-1] == (False, True)
    assert all(weight.value.grad is None for weight in teacher.weights)


@pytest.mark.parametrize("format", ["tf_saved_model", "litert", "onnx"])
def test_export(format, tmp_path):
    with pytest.raises(
        ValueError,
        match="can write with the torch backend.*KERAS_BACKEND=.*tensorflow",
    ):
        export_student(
            helpers.linear_model(3),
            tmp_path / "served",
            from_logits=True,
            format=format,
        )
    assert not (tmp_path / "served").exists()


def test_distribution():
    """Keras's own training passes over it in silence."""
    x, soft_labels = helpers.soft_labelled(3)
    distiller = Distiller(helpers.linear_model(3), helpers.linear_model(3))
    distiller.compile("sgd", loss=PTLoss(0.5, from_logits=True))
    devices = keras.distribution.DataParallel(devices=["cpu:0"])
    keras.distribution.set_distribution(devices)
    try:
        for call in (
            lambda: distiller.fit(x, verbose=0),
            lambda: proxy_teacher(soft_labels, 0.5),
        ):
            with pytest.raises(ValueError, match="`keras.distribution` must"):
                call()
    finally:
        keras.distribution.set_distribution(None)
