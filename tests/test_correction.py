"""Correction: one value from the search to the loss, against NumPy."""

import copy
import json
import pickle

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Correction, PTLoss, proxy_teacher
from keras_ptloss.layers import CorrectedTeacher
from keras_ptloss.losses import ProxyKLDivergence

ROWS, CLASSES = 12, 3
EPSILON = np.array([[2.0, 0.5], [-0.5, 0.1], [0.0, 1.0]])
MATRIX = np.array([[0.8, 0.1, 0.0], [-0.2, 0.9, 0.3], [0.0, 0.0, 1.1]])
BIAS = np.array([0.1, 0.0, -0.4])


@pytest.fixture(scope="module")
def teacher():
    return helpers.dirichlet(0, ROWS, CLASSES)


def composed(**arguments):
    return Correction(
        EPSILON,
        scale=0.7,
        proxy_scale=MATRIX,
        proxy_bias=BIAS,
        **arguments,
    )


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def by_hand(z):
    """Temperature, epsilon, then a matrix: with a solver that is tested."""
    t = helpers.softmax(0.7 * z)
    q = proxy_teacher(t, EPSILON).probabilities
    return helpers.softmax(np.log(q) @ MATRIX.T + BIAS)


class TestValues:
    @pytest.mark.parametrize("scale", [0.5, [0.5, 1.0, 2.0], MATRIX])
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_teacher(self, teacher, scale, from_logits):
        outputs = 3.0 * np.log(teacher) if from_logits else teacher
        z = outputs if from_logits else np.log(teacher)
        scale = np.asarray(scale)
        moved = z @ scale.T if scale.ndim == 2 else z * scale
        correction = Correction(
            scale=scale, bias=BIAS, teacher_from_logits=from_logits
        )
        np.testing.assert_allclose(
            correction.teacher(outputs), helpers.softmax(moved + BIAS)
        )

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_composition(self, teacher, from_logits):
        z = np.log(teacher)
        outputs = z + 2.0 if from_logits else teacher
        correction = composed(teacher_from_logits=from_logits)
        expected = by_hand(z)
        np.testing.assert_allclose(
            correction.proxy(outputs).probabilities, expected, rtol=1e-9
        )
        target = correction.target(ops.convert_to_tensor(outputs, "float32"))
        np.testing.assert_allclose(target, expected, atol=2e-6)

    def test_identity(self, teacher):
        assert Correction().is_identity
        np.testing.assert_allclose(
            Correction().proxy(teacher).probabilities, teacher
        )
        assert not Correction(scale=0.5).is_identity
        assert not Correction(0.1).is_identity
        assert not Correction(proxy_bias=BIAS).is_identity

    def test_several_teachers_side_by_side(self, teacher):
        """`A` may be rectangular: `z` of two teachers in one row."""
        second = helpers.dirichlet(1, ROWS, CLASSES)
        z = np.log(np.concatenate([teacher, second], axis=1))
        wide = np.concatenate([MATRIX, 0.5 * np.eye(CLASSES)], axis=1)
        correction = Correction(
            0.5, scale=wide, bias=BIAS, teacher_from_logits=True
        )
        t = helpers.softmax(z @ wide.T + BIAS)
        np.testing.assert_allclose(correction.teacher(z), t)
        np.testing.assert_allclose(
            correction.target(ops.convert_to_tensor(z, "float32")),
            proxy_teacher(t, 0.5).probabilities,
            atol=2e-6,
        )

    def test_binary_head(self):
        p = np.array([[0.2], [0.9]])
        two = np.concatenate([1 - p, p], axis=1)
        correction = Correction([0.5, 0.1], scale=0.5)
        np.testing.assert_allclose(
            correction.proxy(p).probabilities,
            correction.proxy(two).probabilities,
        )
        np.testing.assert_allclose(
            correction.target(ops.convert_to_tensor(p, "float32")),
            correction.proxy(two).probabilities,
            atol=2e-6,
        )

    @pytest.mark.parametrize("zeros", [1, 2])
    def test_exact_zeros(self, zeros):
        row = np.zeros((1, CLASSES))
        row[0, zeros:] = 1.0 / (CLASSES - zeros)
        q = composed().proxy(row).probabilities
        assert np.all(np.isfinite(q))
        np.testing.assert_allclose(q.sum(axis=1), 1.0)
        target = composed().target(ops.convert_to_tensor(row, "float32"))
        np.testing.assert_allclose(target, q, atol=1e-5)

    def test_huge_logits(self):
        logits = np.array([[1e4, -1e4, 0.0]])
        correction = composed(teacher_from_logits=True)
        target = correction.target(ops.convert_to_tensor(logits, "float32"))
        np.testing.assert_allclose(
            target, correction.proxy(logits).probabilities, atol=1e-5
        )


class TestLoss:
    def test_pt_loss_where_it_can_carry_it(self, teacher):
        correction = Correction(EPSILON, scale=MATRIX, bias=BIAS)
        loss = correction.loss(from_logits=True, reduction=None)
        assert isinstance(loss, PTLoss)
        student = np.random.default_rng(0).normal(size=(ROWS, CLASSES))
        t = helpers.softmax(np.log(teacher) @ MATRIX.T + BIAS)
        np.testing.assert_allclose(
            loss(teacher, student),
            helpers.pt_loss_of_logits(t, student, EPSILON),
            rtol=1e-4,
        )

    def test_kl_where_it_cannot(self, teacher):
        loss = composed().loss(from_logits=True, reduction=None)
        assert isinstance(loss, ProxyKLDivergence)
        student = np.random.default_rng(0).normal(size=(ROWS, CLASSES))
        np.testing.assert_allclose(
            loss(teacher, student),
            helpers.pt_loss_of_logits(by_hand(np.log(teacher)), student, 0.0),
            atol=2e-5,
        )


class TestConfig:
    def test_round_trip(self, teacher):
        correction = composed(teacher_from_logits=True)
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(correction)
        )
        assert again.teacher_from_logits
        for name in ("epsilon", "scale", "bias", "proxy_scale", "proxy_bias"):
            np.testing.assert_array_equal(
                getattr(again, name), getattr(correction, name)
            )

    @pytest.mark.parametrize(
        "argument, value",
        [
            ("epsilon", np.nan),
            ("scale", 0.0),
            ("scale", [1.0, -1.0]),
            ("scale", [[np.inf]]),
            ("bias", "much"),
            ("bias", [[1.0]]),
            ("proxy_scale", -1.0),
            ("proxy_bias", np.inf),
            ("epsilon", 1j),
            ("scale", np.array([1.0, 1j])),
            ("bias", 0j),
            ("scale", "2.0"),
        ],
    )
    def test_wrong(self, argument, value):
        with pytest.raises(ValueError, match=f"`{argument}` must be.*Received"):
            Correction(**{argument: value})

    def test_classes_that_differ(self):
        with pytest.raises(
            ValueError, match="`scale` and `bias`.*same classes"
        ):
            Correction(scale=[1.0, 2.0], bias=[0.0, 0.0, 0.0])
        with pytest.raises(ValueError, match="`epsilon`.*one row a class"):
            Correction(EPSILON, scale=[1.0, 2.0])

    @pytest.mark.parametrize(
        "arguments",
        [
            {"epsilon": EPSILON, "proxy_scale": [1.0, 2.0]},
            {"scale": [1.0, 1.0, 1.0], "proxy_scale": [1.0, 2.0]},
            {"bias": BIAS, "proxy_bias": [1.0, 2.0]},
            {"scale": MATRIX, "proxy_scale": np.ones((3, 2))},
        ],
    )
    def test_classes_that_differ_after_epsilon(self, arguments):
        match = "`proxy_scale` and `proxy_bias` must be of the 3 classes"
        with pytest.raises(ValueError, match=match):
            Correction(**arguments)

    @pytest.mark.parametrize("scale", [[2.0], [1.0, 2.0], np.ones((3, 4))])
    @pytest.mark.parametrize("method", ["proxy", "target"])
    def test_input_of_other_classes_after_epsilon(self, teacher, scale, method):
        correction = Correction(proxy_scale=scale)
        match = "`outputs` must have the [124] classes"
        with pytest.raises(ValueError, match=match):
            getattr(correction, method)(teacher.astype("float32"))

    @pytest.mark.parametrize("columns", [2, 4])
    def test_input_of_other_classes(self, columns):
        rows = np.full((4, columns), 1 / columns)
        with pytest.raises(ValueError, match="`outputs` must have the 3"):
            Correction(scale=[1.0, 2.0, 3.0]).proxy(rows)

    @pytest.mark.parametrize("method", ["teacher", "proxy", "target"])
    def test_logits_by_mistake(self, method):
        match = "`outputs` must hold prob.*say teacher_from_logits=True"
        with pytest.raises(ValueError, match=match):
            getattr(Correction(), method)(np.array([[2.0, -1.0, 0.5]]))


class TestValue:
    """A correction does not change, and equals what is alike."""

    NAMES = ("epsilon", "scale", "bias", "proxy_scale", "proxy_bias")

    @pytest.mark.parametrize("name", NAMES)
    def test_is_not_the_array_that_it_was_given(self, name):
        given = np.array([1.0, 2.0, 3.0])
        correction = Correction(**{name: given})
        given[0] = -9.0
        assert getattr(correction, name)[0] == 1.0

    @pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, through_pickle])
    @pytest.mark.parametrize("name", NAMES)
    def test_cannot_be_written_to(self, made, name):
        correction = made(composed(bias=BIAS))
        with pytest.raises(ValueError, match="read-only"):
            getattr(correction, name)[...] = np.nan
        with pytest.raises(ValueError, match="read-only"):
            correction.calibration.scale[...] = np.nan

    @pytest.mark.parametrize(
        "made",
        [
            copy.deepcopy,
            through_pickle,
            lambda one: Correction.from_config(
                json.loads(json.dumps(one.get_config()))
            ),
        ],
    )
    @pytest.mark.parametrize("several", [False, True])
    def test_equal(self, made, several):
        one = composed()
        if several:
            one = Correction(scale=np.ones((2, 4)), teachers=(2, 2))
        again = made(one)
        assert again == one
        assert hash(again) == hash(one)
        assert len({one, again}) == 1

    @pytest.mark.parametrize(
        "changed",
        [{name: 0.5} for name in NAMES] + [{"teacher_from_logits": True}],
    )
    def test_not_equal(self, changed):
        assert Correction(**changed) != Correction()
        assert Correction() != 0.0

    def test_zeros_of_both_signs(self):
        assert Correction(0.0) == Correction(-0.0)
        assert hash(Correction(0.0)) == hash(Correction(-0.0))

    def test_pt_loss_is_not_the_array_that_it_was_given(self):
        scale = np.array([1.0, 2.0])
        loss = PTLoss(0.5, teacher_scale=scale)
        scale[0] = -9.0
        assert loss.teacher_scale[0] == 1.0


class TestLayer:
    def test_saved_in_a_model(self, teacher, tmp_path):
        model = keras.Sequential(
            [keras.Input((CLASSES,)), CorrectedTeacher(composed())]
        )
        assert model.output_shape == (None, CLASSES)
        expected = model.predict(teacher, verbose=0)
        np.testing.assert_allclose(
            expected, by_hand(np.log(teacher)), atol=2e-6
        )
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(
            loaded.predict(teacher, verbose=0), expected
        )

    def test_needs_a_correction(self):
        match = "`correction` must be a keras_ptloss.Correction"
        with pytest.raises(ValueError, match=match):
            CorrectedTeacher(0.5)

    @pytest.mark.parametrize(
        "row, match",
        [
            ([0.4, 0.6], "`inputs` must have the 3 classes"),
            ([2.0, -1.0, 0.5], "`inputs` must hold probabilities"),
        ],
    )
    def test_inputs(self, row, match):
        layer = CorrectedTeacher(Correction(scale=[1.0, 2.0, 3.0]))
        with pytest.raises(ValueError, match=match):
            layer(np.array([row], "float32"))
