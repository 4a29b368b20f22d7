"""What a search is given: forms that NumPy, a model or a store may have."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Correction, ProxyTeacherSearch
from keras_ptloss.search import CalibrationSearch
from keras_ptloss.search._progress import Progress

ROWS, CLASSES = 200, 3
TEMPERATURE = ProxyTeacherSearch(CalibrationSearch("temperature"))
# Teachers at random are.
at_random = pytest.mark.filterwarnings("ignore:.*worse than a constant")


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    truth = generator.dirichlet(np.ones(CLASSES), size=ROWS)
    labels = np.array([generator.choice(CLASSES, p=row) for row in truth])
    teacher = truth * [1.0, 0.3, 0.3]
    return teacher / teacher.sum(-1, keepdims=True), labels


def weighted(q, labels):
    """Negative log-likelihood in which class 2 counts ten times."""
    weights = np.where(labels == 2, 10.0, 1.0) / len(labels)
    right = np.arange(len(labels)), labels
    slope = np.zeros_like(q)
    slope[right] = -weights / q[right]
    return -float(weights @ np.log(q[right])), slope


def test_an_objective_of_a_users_may_be_called_nll(problem):
    def nll(q, labels):
        return weighted(q, labels)

    method = CalibrationSearch("vector")
    one, two = (
        ProxyTeacherSearch(method, objective=objective).search(*problem)
        for objective in (weighted, nll)
    )
    assert two.score == one.score
    assert np.array_equal(two.correction.scale, one.correction.scale)


def test_bfloat16(problem):
    teacher, labels = problem
    rows = ops.convert_to_tensor(teacher, dtype="bfloat16")
    exact = ops.convert_to_numpy(ops.cast(rows, "float32"))
    found = TEMPERATURE.search(rows, labels)
    assert found.score == TEMPERATURE.search(exact, labels).score
    proxy = Correction(0.5).proxy(rows).probabilities
    assert np.array_equal(proxy, Correction(0.5).proxy(exact).probabilities)


def test_rows_without_an_order(problem, tmp_path):
    pytest.importorskip("pyarrow")
    from keras_ptloss import SoftLabels

    teacher, labels = problem
    x = np.arange(ROWS)
    store = SoftLabels.write(lambda rows: teacher[rows], x, tmp_path / "ours")
    TEMPERATURE.search(store, labels)
    store.to_parquet(tmp_path / "parquet")
    with pytest.raises(ValueError, match=r"in the order of the labels.*import"):
        TEMPERATURE.search(SoftLabels.open(tmp_path / "parquet"), labels)


def make_model(outputs=1):
    inputs = keras.Input((None, 4))
    dense = keras.layers.Dense
    heads = [dense(CLASSES + k, "softmax")(inputs) for k in range(outputs)]
    return keras.Model(inputs, heads if outputs > 1 else heads[0])


@at_random
def test_batches_padded_to_other_lengths():
    generator = np.random.default_rng(0)
    model = make_model()
    batches = [
        (
            generator.normal(size=(8, length, 4)).astype("float32"),
            generator.integers(CLASSES, size=(8, length)),
        )
        for length in (5, 7)
    ]
    found = TEMPERATURE.search(model, iter(batches))
    rows = [
        model.predict(x, verbose=0).reshape(-1, CLASSES) for x, _ in batches
    ]
    labels = np.concatenate([y.ravel() for _, y in batches])
    expected = TEMPERATURE.search(np.concatenate(rows), labels)
    assert found.score == pytest.approx(expected.score, rel=1e-6)


@pytest.mark.parametrize("batches", [True, False])
def test_model_of_several_outputs(batches):
    x, y = np.zeros((4, 2, 4), "float32"), np.zeros((4, 2), int)
    given = (
        {"labels": iter([(x, y)])} if batches else {"labels": y, "inputs": x}
    )
    with pytest.raises(ValueError, match="one tensor.*list of 2"):
        TEMPERATURE.search(make_model(outputs=2), **given)


@at_random
@pytest.mark.parametrize("several", [True, False])
def test_proxy_model_under_a_mixed_policy(several):
    generator = np.random.default_rng(0)
    x = 1000 + generator.normal(size=(64, 4)).astype("float32")
    y = generator.integers(CLASSES, size=64)
    teachers = []
    for _ in range(2):
        inputs = keras.Input((4,))
        centred = keras.layers.Rescaling(1.0, offset=-1000.0)(inputs)
        outputs = keras.layers.Dense(CLASSES, "softmax")(centred)
        teachers.append(keras.Model(inputs, outputs))
    rows = [model.predict(x, verbose=0) for model in teachers]
    if not several:
        teachers, rows = teachers[0], rows[0]
    search = ProxyTeacherSearch(CalibrationSearch("matrix"))
    result = search.search(teachers, y, inputs=x)
    expected = result.proxy_teacher(rows).probabilities
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = result.proxy_model(teachers)
        found = model.predict(x, verbose=0), ops.convert_to_numpy(model(x))
    finally:
        keras.config.set_dtype_policy(before)
    for rows in found:
        assert rows == pytest.approx(expected, abs=1e-5)


def test_bar_ends_its_line(capsys):
    """Few runs need all the steps that they may take."""
    progress = Progress(verbose=1)
    progress.update(3, 10)
    assert not capsys.readouterr().out.endswith("\n")
    progress.close()
    assert capsys.readouterr().out.endswith("\n")
