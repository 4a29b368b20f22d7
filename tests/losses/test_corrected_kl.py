"""CorrectedKLDivergence: SciPy's KL to the corrected teacher."""

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from keras import ops

from keras_ptloss import Correction
from keras_ptloss.losses import CorrectedKLDivergence

ONE = Correction(
    0.7, 1.5, np.eye(3) + 0.3, [0.1, 0.0, -0.4], 0.2, 0.5, kept_classes=(1,)
)
SEVERAL = Correction(
    0.7,
    (2.0, float("inf")),
    np.random.default_rng(0).normal(size=(3, 5)),
    teacher_classes=(3, 2),
)


def data(correction, *axes):
    teachers = [
        np.random.default_rng(k).dirichlet(np.ones(count), axes or 16)
        for k, count in enumerate(correction.teacher_classes or (3,))
    ]
    y_true = np.concatenate(teachers, axis=-1).astype("float32")
    logits = np.random.default_rng(9).normal(size=(*y_true.shape[:-1], 3))
    return y_true, logits.astype("float32")


def kl(q, logits):
    return scipy.special.rel_entr(q, helpers.softmax(logits)).sum(-1)


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("correction", [Correction(), ONE, SEVERAL])
def test_values(correction, from_logits):
    y_true, logits = data(correction)
    loss = CorrectedKLDivergence(
        correction, from_logits=from_logits, reduction="none"
    )
    y_pred = logits if from_logits else helpers.softmax(logits)
    expected = kl(correction.correct(y_true), logits)
    np.testing.assert_allclose(
        loss(y_true, y_pred), expected, rtol=1e-5, atol=2e-6
    )


def test_gradient():
    """With respect to the logits: p - q, and nothing for the teacher."""
    y_true, logits = data(ONE)
    loss = CorrectedKLDivergence(ONE, from_logits=True)
    expected = helpers.softmax(logits) - ONE.correct(y_true)
    found = helpers.gradient_of(loss.call, y_true, logits, argument=1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("correction", [Correction(0.5), SEVERAL])
def test_padding_costs_nothing(correction):
    y_true, logits = data(correction, 2, 4)
    loss = CorrectedKLDivergence(correction, from_logits=True, reduction="none")
    full = ops.convert_to_numpy(loss(y_true, logits))
    y_true[0, 1:] = 0.0
    found = ops.convert_to_numpy(loss(y_true, logits))
    assert (found[0, 1:] == 0.0).all()
    np.testing.assert_allclose(found[1], full[1], rtol=1e-6)
    gradient = helpers.gradient_of(loss.call, y_true, logits, argument=1)
    assert np.isfinite(gradient).all()
    assert (gradient[0, 1:] == 0.0).all()


def test_rows_of_weight_0_may_hold_anything():
    y_true, logits = data(SEVERAL)
    loss = CorrectedKLDivergence(SEVERAL, from_logits=True)
    weight = np.ones(16, "float32")
    weight[3:] = 0.0
    expected = kl(SEVERAL.correct(y_true), logits)[:3].sum() / 16
    y_true[3:] = np.nan
    found = float(loss(y_true, logits, weight))
    assert found == pytest.approx(expected, rel=1e-5)


def test_rows_that_are_no_probabilities():
    """An error eagerly, NaN in a compiled step; of any teacher."""
    y_true, logits = data(SEVERAL)
    y_true[2, 3:] = 2.0, -1.0
    loss = CorrectedKLDivergence(SEVERAL, from_logits=True)
    with pytest.raises(ValueError, match="apply a softmax to them first"):
        loss(y_true, logits)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    on_jax = keras.backend.backend() == "jax"  # elsewhere XLA compiles longer
    model.compile(loss=loss, jit_compile=on_jax)
    if keras.backend.backend() != "torch":  # runs eagerly unless asked
        assert np.isnan(model.test_on_batch(logits, y_true))
    others = np.arange(16) != 2
    model.reset_metrics()  # Keras 3.12 would keep the NaN.
    value = model.test_on_batch(logits[others], y_true[others])
    expected = kl(SEVERAL.correct(y_true[others]), logits[others]).mean()
    assert value == pytest.approx(expected, rel=1e-5)


def test_another_number_of_classes():
    y_true, logits = data(ONE)
    loss = CorrectedKLDivergence(SEVERAL, from_logits=True)
    with pytest.raises(ValueError, match="as many classes as the correction"):
        loss(y_true, logits)


def test_only_a_correction():
    with pytest.raises(ValueError, match="`correction` must be a keras_ptloss"):
        CorrectedKLDivergence(0.5)
    loss = CorrectedKLDivergence(ONE)
    with pytest.raises(AttributeError, match="cannot be changed"):
        loss.correction = SEVERAL


@pytest.mark.parametrize("from_logits", [False, True])
def test_fit_to_the_corrected_teacher(from_logits, tmp_path):
    """A table of logits ends at the corrected teacher, saved or not."""
    y_true, _ = data(SEVERAL)
    x = np.eye(16, dtype="float32")
    dense = keras.layers.Dense(
        3,
        None if from_logits else "softmax",
        use_bias=False,
        kernel_initializer="zeros",
    )
    model = keras.Sequential([keras.Input((16,)), dense])
    loss = CorrectedKLDivergence(SEVERAL, from_logits=from_logits)
    model.compile(keras.optimizers.Adam(0.3), loss=loss)
    many = np.tile(x, (40, 1)), np.tile(y_true, (40, 1))
    model.fit(*many, batch_size=16, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.learning_rate = 0.03
    history = loaded.fit(*many, batch_size=16, shuffle=False, verbose=0)
    assert history.history["loss"][-1] < 2e-3
    outputs = loaded.predict(x, verbose=0)
    p = helpers.softmax(outputs) if from_logits else outputs
    np.testing.assert_allclose(p, SEVERAL.correct(y_true), atol=0.03)


def test_config():
    loss = CorrectedKLDivergence(
        SEVERAL, from_logits=True, reduction="sum", name="mine", dtype="float64"
    )
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(loss)
    )
    assert again.correction == SEVERAL
    assert again.get_config() == loss.get_config()
    assert again.dtype == "float64"
    assert again.teacher_classes == (3, 2)
