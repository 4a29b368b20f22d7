"""Corrections of several teachers, and of teachers with other classes."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Correction
from keras_ptloss.layers import CorrectedTeacher, TeachersSideBySide
from keras_ptloss.losses import ProxyKLDivergence

CLASSES, ROWS = 3, 6
RNG = np.random.default_rng(0)
LOGITS = [3.0 * RNG.normal(size=(ROWS, count)) for count in (3, 5)]
MATRIX, BIAS = RNG.normal(size=(CLASSES, 8)) / 2, RNG.normal(size=CLASSES)
STUDENT = RNG.normal(size=(ROWS, CLASSES)).astype("float32")

# What the second teacher gives, and so what stands in a row.
FORMS = {
    "probabilities": (False, False),
    "logits": (True, True),
    "both": (True, False),
}


def outputs_of(form):
    return [
        z if flag else helpers.softmax(z)
        for z, flag in zip(LOGITS, FORMS[form], strict=True)
    ]


def expected(epsilon=None):
    """The matrix on the logarithms of each teacher's probabilities."""
    z = np.concatenate([np.log(helpers.softmax(z)) for z in LOGITS], axis=1)
    return helpers.softmax(z @ MATRIX.T + BIAS)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def make(form, **arguments):
    return Correction(
        scale=MATRIX,
        bias=BIAS,
        teachers=(3, 5),
        teacher_from_logits=FORMS[form],
        **arguments,
    )


class TestCorrection:
    def test_of_a_list_and_side_by_side(self, form):
        outputs, correction = outputs_of(form), make(form)
        joined = np.concatenate(outputs, axis=1)
        for given in (outputs, tuple(outputs), joined):
            np.testing.assert_allclose(correction.teacher(given), expected())
            q = correction.proxy(given).probabilities
            np.testing.assert_allclose(q, expected())

    def test_target(self, form):
        outputs, correction = outputs_of(form), make(form)
        tensors = [ops.convert_to_tensor(o.astype("float32")) for o in outputs]
        for given in (tensors, ops.concatenate(tensors, axis=-1)):
            np.testing.assert_allclose(
                correction.target(given), expected(), rtol=1e-4
            )

    def test_epsilon_follows_the_matrix(self):
        correction = make("logits", epsilon=[2.0, -0.3])
        q = correction.proxy(outputs_of("logits")).probabilities
        np.testing.assert_allclose(
            helpers.fixed_point(expected(), q, [2.0, -0.3]), q, atol=1e-9
        )

    def test_a_shift_of_logits_changes_nothing(self):
        one, two = outputs_of("logits")
        np.testing.assert_allclose(
            make("logits").teacher([one + 50.0, two - 3.0]), expected()
        )

    def test_binary_head(self):
        p = helpers.dirichlet(0, ROWS, 2)
        matrix = RNG.normal(size=(CLASSES, 5))
        correction = Correction(scale=matrix, teachers=(3, 2))
        one = helpers.softmax(LOGITS[0])
        np.testing.assert_allclose(
            correction.teacher([one, p[:, 1:]]), correction.teacher([one, p])
        )

    def test_extreme_logits_and_masked_classes(self):
        rows = np.array([[1e4, -1e4, 0.0], [0.0, -np.inf, 1.0]], "float32")
        other = np.array([[0.0] * 4 + [1.0], [1.0] + [0.0] * 4], "float32")
        correction = make("both")
        target = np.asarray(correction.target([rows, other]))
        assert np.all(np.isfinite(target))
        np.testing.assert_allclose(target.sum(axis=1), 1.0, rtol=1e-5)

    def test_config(self, form):
        correction = make(form, epsilon=0.5)
        config = keras.saving.serialize_keras_object(correction)
        again = keras.saving.deserialize_keras_object(config)
        assert again.teachers == (3, 5)
        assert again.teacher_from_logits == FORMS[form]
        np.testing.assert_array_equal(again.scale, MATRIX)
        assert not again.is_pt_loss

    def test_config_from_before_there_were_several(self):
        config = Correction(0.5, scale=2.0).get_config()
        del config["teachers"]
        again = Correction.from_config(config)
        assert again.teachers is None and again.is_pt_loss


def kl_to_the_corrected():
    q = expected()
    log_p = np.log(helpers.softmax(STUDENT))
    return np.sum(q * (np.log(q) - log_p), axis=1)


class TestLoss:
    def joined(self, form):
        return np.concatenate(outputs_of(form), axis=1).astype("float32")

    def test_no_reduction(self, form):
        loss = make(form).loss(from_logits=True, reduction=None)
        assert isinstance(loss, ProxyKLDivergence)
        assert loss.teacher_classes == (3, 5)
        values = loss(self.joined(form), STUDENT)
        np.testing.assert_allclose(values, kl_to_the_corrected(), rtol=1e-4)

    def test_sample_weighted_and_padded(self, form):
        """Rows at weight 0 may hold anything: each teacher's are replaced."""
        rows = self.joined(form)
        rows[3] = np.nan
        weight = np.arange(ROWS) * (np.arange(ROWS) != 3)
        loss = make(form).loss(from_logits=True)
        np.testing.assert_allclose(
            loss(rows, STUDENT, sample_weight=weight),
            np.mean(weight * kl_to_the_corrected()),
            rtol=1e-4,
        )

    def test_compiled(self, form):
        loss = make(form).loss(from_logits=True)
        value = helpers.compiled(loss)(self.joined(form), STUDENT)
        np.testing.assert_allclose(
            value, kl_to_the_corrected().mean(), rtol=1e-4
        )

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_students(self, form, dtype):
        student = ops.cast(STUDENT, dtype)
        value = make(form).loss(from_logits=True)(self.joined(form), student)
        np.testing.assert_allclose(
            value, kl_to_the_corrected().mean(), rtol=2e-2
        )

    def test_config(self, form):
        loss = make(form).loss(from_logits=True)
        config = keras.saving.serialize_keras_object(loss)
        again = keras.saving.deserialize_keras_object(config)
        assert again.teacher_from_logits == FORMS[form]
        rows = self.joined(form)
        assert float(again(rows, STUDENT)) == float(loss(rows, STUDENT))

    def test_fit_on_stored_outputs_and_saving(self, form, tmp_path):
        x = RNG.normal(size=(ROWS, 5)).astype("float32")
        model = helpers.linear_model(CLASSES)
        model.compile("adam", loss=make(form).loss(from_logits=True))
        model.fit(x, self.joined(form), verbose=0)
        model.save(tmp_path / "student.keras")
        again = keras.saving.load_model(tmp_path / "student.keras")
        np.testing.assert_allclose(
            model.evaluate(x, self.joined(form), verbose=0),
            again.evaluate(x, self.joined(form), verbose=0),
            rtol=1e-6,
        )

    def test_other_width(self, form):
        loss = make(form).loss(from_logits=True)
        with pytest.raises(ValueError, match=r"`y_true` must have.*3 \+ 5 = 8"):
            loss(self.joined(form)[:, :7], STUDENT)


class TestLayer:
    def test_values(self, form):
        layer = CorrectedTeacher(make(form))
        outputs = [o.astype("float32") for o in outputs_of(form)]
        for given in (outputs, np.concatenate(outputs, axis=1)):
            np.testing.assert_allclose(layer(given), expected(), rtol=1e-4)
        assert layer.compute_output_shape([(None, 3), (None, 5)]) == (None, 3)
        assert layer.compute_output_shape((None, 8)) == (None, 3)

    def test_live_teachers_as_a_saved_model(self, form, tmp_path):
        teachers = [
            helpers.linear_model(c, seed=c, activation=None if f else "softmax")
            for c, f in zip((3, 5), FORMS[form], strict=True)
        ]
        beside = TeachersSideBySide(teachers, (3, 5), from_logits=FORMS[form])
        model = keras.Sequential([beside, CorrectedTeacher(make(form))])
        x = RNG.normal(size=(ROWS, 5)).astype("float32")
        outputs = [teacher.predict(x, verbose=0) for teacher in teachers]
        np.testing.assert_allclose(
            model.predict(x, verbose=0),
            make(form).teacher(outputs),
            rtol=1e-4,
        )
        model.save(tmp_path / "proxy.keras")
        again = keras.saving.load_model(tmp_path / "proxy.keras")
        np.testing.assert_allclose(
            again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6
        )

    def test_errors(self):
        with pytest.raises(ValueError, match="`teachers` must be the outputs"):
            TeachersSideBySide([helpers.linear_model(3)], (3, 5))
        for wrong in ([helpers.linear_model(3), "five"], None, 3):
            with pytest.raises(ValueError, match="`teachers` must be a list"):
                TeachersSideBySide(wrong, (3, 5))
        two = [helpers.linear_model(3), helpers.linear_model(3)]
        layer = TeachersSideBySide(two, (3, 5))
        with pytest.raises(ValueError, match=r"`teachers\[1\]`.*5 classes"):
            layer(np.ones((2, 5), "float32"))
        for counts in (3, (3, 1), (3, "five")):
            with pytest.raises(ValueError, match="`counts` must be"):
                TeachersSideBySide(two, counts)
        for flags in ("x", [True], [True, "x"]):
            with pytest.raises(ValueError, match="`from_logits` must be"):
                TeachersSideBySide(two, (3, 5), from_logits=flags)


class TestErrors:
    @pytest.mark.parametrize("scale", [1.0, np.ones(3), np.ones((3, 7))])
    def test_matrix_of_other_columns(self, scale):
        match = r"`scale` must be a matrix with.*3 \+ 5 = 8.*Received: scale"
        with pytest.raises(ValueError, match=match):
            Correction(scale=scale, teachers=(3, 5))

    @pytest.mark.parametrize("teachers", [(), 8, (3, 1)])
    def test_teachers(self, teachers):
        with pytest.raises(ValueError, match="`teachers` must be"):
            Correction(scale=np.ones((3, 8)), teachers=teachers)

    def test_flags(self):
        match = "`teacher_from_logits` must be one flag, or one for each of 2"
        with pytest.raises(ValueError, match=match):
            Correction(
                scale=MATRIX, teachers=(3, 5), teacher_from_logits=[True]
            )

    def test_number_of_teachers(self):
        outputs = outputs_of("logits")
        with pytest.raises(ValueError, match="outputs of 2 teachers.*1 of"):
            make("logits").teacher(outputs[:1])

    def test_classes_of_a_teacher(self):
        outputs = outputs_of("logits")[::-1]
        match = r"with 3 classes. Received: outputs\[0\] of shape \(6, 5\)$"
        with pytest.raises(ValueError, match=match):
            make("logits").teacher(outputs)

    def test_other_examples(self):
        one, two = outputs_of("logits")
        match = r"`outputs\[1\]` must be of the same examples.*\(5, 5\)"
        with pytest.raises(ValueError, match=match):
            make("logits").teacher([one, two[:-1]])

    def test_width(self):
        with pytest.raises(ValueError, match=r"3 \+ 5 = 8. Received.*with 3"):
            make("logits").teacher(np.zeros((2, 3)))

    @pytest.mark.parametrize("as_list", [True, False])
    def test_missing_answers_name_the_teacher(self, form, as_list):
        outputs = outputs_of(form)
        outputs[1][2] = np.nan
        outputs[1][4] = np.nan
        given = outputs if as_list else np.concatenate(outputs, axis=1)
        match = r"`outputs\[1\]` must answer every.*NaN in 2 of 6.*\[1\]\[2\]"
        with pytest.raises(ValueError, match=match):
            make(form).proxy(given)

    def test_logits_for_probabilities_name_the_teacher(self):
        outputs = outputs_of("logits")
        with pytest.raises(ValueError, match=r"`outputs\[0\]` must hold prob"):
            make("probabilities").proxy(outputs)
        rows = np.concatenate(outputs, axis=1).astype("float32")
        with pytest.raises(ValueError, match="`outputs, teacher 0` must hold"):
            make("probabilities").target(ops.convert_to_tensor(rows))
        with pytest.raises(ValueError, match="`y_true, teacher 0` must hold"):
            make("probabilities").loss()(rows, helpers.softmax(STUDENT))
