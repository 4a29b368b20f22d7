"""Examples of several positions: weights and epsilon belong to the example."""

import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import Correction, Distiller, PTLoss, pt_loss
from keras_ptloss.losses import (
    Flooding,
    FocalLoss,
    LabelSmoothingLoss,
    ProxyKLDivergence,
    TopKPTLoss,
)
from keras_ptloss.metrics import KLToTeacher

CLASSES = 4
WEIGHTS = np.array([1.0, 0.0, 5.0])


def rows(positions, seed=0):
    """The teacher's probabilities and the student's logits, of 3 examples."""
    generator = np.random.default_rng(seed)
    shape = (len(WEIGHTS), positions)
    teacher = generator.dirichlet(np.ones(CLASSES), size=shape)
    student = generator.normal(size=(*shape, CLASSES))
    return teacher.astype("float32"), student.astype("float32")


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "weights"])
@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "(N, T)", "(N, T, 1)"])
@pytest.mark.parametrize("positions", [2, 3])
def test_weights_of_a_leading_part(positions, shape, reduction):
    """Keras lays axes side by side from the last: (3,) was the positions'."""
    teacher, student = rows(positions)
    log_p = scipy.special.log_softmax(student.astype("float64"), axis=-1)
    each = (teacher * (np.log(teacher) - log_p)).sum(-1)
    whole = np.broadcast_to(WEIGHTS[:, None], each.shape)
    divisor = {"sum": 1, "sum_over_batch_size": each.size}
    expected = (whole * each).sum() / divisor.get(reduction, whole.sum())
    given = {
        "(N,)": WEIGHTS,
        "(N, 1)": WEIGHTS[:, None],
        "(N, T)": whole,
        "(N, T, 1)": whole[..., None],
    }[shape]
    if reduction == "weights":
        reduction = "mean_with_sample_weight"
    loss = PTLoss(
        0.0, from_logits=True, teacher_from_logits=False, reduction=reduction
    )
    found = float(loss(teacher, student, sample_weight=given.astype("float32")))
    assert found == pytest.approx(expected, rel=1e-5)


def test_weights_in_evaluate_are_the_metrics():
    size = 6  # as many examples as positions
    generator = np.random.default_rng(0)
    x = generator.normal(size=(size, size, 3)).astype("float32")
    models = [keras.Sequential([keras.layers.Dense(CLASSES)]) for _ in range(2)]
    distiller = Distiller(
        *models, teacher_metrics=[KLToTeacher(from_logits=True)]
    )
    distiller.compile("sgd", loss=PTLoss(0.0, from_logits=True))
    weights = np.arange(size) / (size - 1) * 2  # of mean 1
    labels = np.zeros((size, size))
    logs = distiller.evaluate(
        x, labels, sample_weight=weights, verbose=0, return_dict=True
    )
    assert float(logs["loss"]) == pytest.approx(
        float(logs["kl_to_teacher"]), rel=1e-5
    )


def test_lists_with_weights():
    loss = PTLoss(0.0)
    found = loss([[0.5, 0.5]], [[0.4, 0.6]], sample_weight=[2.0])
    assert float(found) == pytest.approx(
        2 * float(loss([[0.5, 0.5]], [[0.4, 0.6]])), rel=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4,), (3, 1, 4)])
def test_weights_do_not_spread_a_row(shape):
    """A `where` by the weights would make a batch of it."""
    teacher, student = np.full(shape, 0.25), np.full((3, 4), 0.25)
    with pytest.raises(ValueError, match="`y_true`.*y_pred|`y_pred`.*y_true"):
        PTLoss(0.0)(teacher, student, sample_weight=np.ones(3))


FLAGS = {"from_logits": True, "teacher_from_logits": False}
MASKED = {
    "pt_loss": lambda: PTLoss([0.5, 0.2], **FLAGS),
    "proxy": lambda: ProxyKLDivergence(
        Correction(0.5, proxy_scale=0.7), from_logits=True
    ),
    "focal": lambda: FocalLoss(2.0, **FLAGS),
    "smoothed": lambda: LabelSmoothingLoss(0.1, **FLAGS),
    "flooded": lambda: Flooding(PTLoss(0.5, **FLAGS), 0.01),
    "top_k": lambda: TopKPTLoss(0.5, from_logits=True),
}


@pytest.mark.parametrize("padding", [np.nan, 0.0])
@pytest.mark.parametrize("eagerly", [True, False])
@pytest.mark.parametrize("name", sorted(MASKED))
def test_masked_positions_may_be_anything(name, eagerly, padding):
    """0 * NaN is NaN, for every weight; rows of zeros are no probabilities."""
    tokens = np.array([[1, 2, 0], [3, 0, 0], [1, 1, 2]])
    teacher, _ = rows(3)
    teacher[tokens == 0] = 1 / CLASSES
    if name == "top_k":
        ids = np.tile(np.arange(2.0), (3, 3, 1))
        teacher = np.stack([ids, np.log(teacher[..., :2] / 2)], axis=-1)
    padded = teacher.copy()
    padded[tokens == 0] = padding
    trained = []
    for y in (teacher, padded):
        embed = keras.layers.Embedding(4, CLASSES, mask_zero=True)
        model = keras.Sequential([embed])
        model.build((None, 3))
        table = np.random.default_rng(0).normal(size=(4, CLASSES))
        model.set_weights([table])
        model.compile("sgd", loss=MASKED[name](), run_eagerly=eagerly)
        model.train_on_batch(tokens, y)
        trained.append(model.get_weights()[0])
    assert np.all(np.isfinite(trained[0]))
    assert np.any(trained[0] != table.astype("float32"))
    np.testing.assert_array_equal(*trained)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("positions", [2, 3])
def test_epsilon_of_an_example_holds_at_its_positions(positions, constant):
    teacher, student = rows(positions)
    epsilon = np.random.default_rng(1).normal(size=(3, CLASSES, 2))
    given = epsilon if constant else keras.ops.convert_to_tensor(epsilon)
    flags = {"from_logits": True, "teacher_from_logits": False}
    found = keras.ops.convert_to_numpy(
        pt_loss(teacher, student, given, **flags)
    )
    expected = [
        keras.ops.convert_to_numpy(pt_loss(*pair, own, **flags))
        for *pair, own in zip(teacher, student, epsilon, strict=True)
    ]
    assert found == pytest.approx(np.stack(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("value", ["no", 3])
@pytest.mark.parametrize(
    "flag", ["from_logits", "teacher_from_logits", "entropy"]
)
def test_flags_of_the_function(flag, value):
    with pytest.raises(ValueError, match=f"`{flag}` must"):
        pt_loss([[0.5, 0.5]], [[0.4, 0.6]], 0.0, **{flag: value})
