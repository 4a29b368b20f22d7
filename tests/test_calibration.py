"""The calibration `softmax(A z + b)` against a loop in NumPy, in float64."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss._calibration import (
    Calibration,
    check_bias,
    check_scale,
    teacher_calibration,
)

CLASSES = 4
RNG = np.random.default_rng(0)
BIAS = RNG.normal(size=CLASSES)
SCALES = {
    "number": 0.4,
    "vector": RNG.uniform(0.2, 3, CLASSES),
    "matrix": RNG.normal(size=(CLASSES, CLASSES)),
    "wider": RNG.normal(size=(CLASSES, 7)),
    "narrower": RNG.normal(size=(CLASSES, 2)),
}
BIASES = {"none": 0.0, "number": 3.0, "vector": BIAS}


def reference(z, scale, bias):
    """`softmax(A z + b)`, with `A` written out, a row and a class at a time."""
    z, scale = np.asarray(z, "float64"), np.asarray(scale, "float64")
    if scale.ndim < 2:
        scale = np.diag(np.broadcast_to(scale, z.shape[-1:]))
    bias = np.broadcast_to(bias, len(scale))
    flat = z.reshape(-1, z.shape[-1])
    out = np.empty((len(flat), len(scale)))
    for n, row in enumerate(flat):
        for c, weights in enumerate(scale):
            out[n, c] = (weights * row).sum() + bias[c]
    return helpers.softmax(out).reshape(*z.shape[:-1], -1)


def logits_for(scale, rows=(6,)):
    scale = np.asarray(scale)
    classes = scale.shape[1] if scale.ndim == 2 else CLASSES
    rng = np.random.default_rng(1)
    return (2 * rng.normal(size=(*rows, classes))).astype("float32")


every_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
every_bias = pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
numpy_and_tensors = pytest.mark.parametrize(
    "convert", [np.asarray, ops.convert_to_tensor], ids=["numpy", "tensor"]
)


def as_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


class TestValue:
    @numpy_and_tensors
    @every_scale
    @every_bias
    @pytest.mark.parametrize("rows", [(6,), (2, 3)])
    def test_logits(self, convert, scale, bias, rows):
        z = logits_for(scale, rows)
        t = Calibration(scale, bias)(convert(z), from_logits=True)
        assert isinstance(t, np.ndarray) == (convert is np.asarray)
        np.testing.assert_allclose(t, reference(z, scale, bias), atol=2e-6)

    @numpy_and_tensors
    @every_scale
    @every_bias
    def test_probabilities(self, convert, scale, bias):
        p = helpers.softmax(logits_for(scale)).astype("float32")
        t = Calibration(scale, bias)(convert(p), from_logits=False)
        expected = reference(np.log(p), scale, bias)
        np.testing.assert_allclose(t, expected, atol=2e-6)

    @every_scale
    def test_numpy_and_tensors_alike(self, scale):
        z = logits_for(scale)
        calibration = Calibration(scale, BIAS)
        np.testing.assert_allclose(
            calibration(z, from_logits=True),
            calibration(ops.convert_to_tensor(z), from_logits=True),
            atol=1e-6,
        )

    @every_scale
    def test_float64_stays(self, scale):
        z = logits_for(scale).astype("float64")
        t = Calibration(scale, BIAS)(z, from_logits=True)
        assert t.dtype == "float64"
        np.testing.assert_allclose(t, reference(z, scale, BIAS), rtol=1e-12)

    @every_scale
    def test_jit(self, scale):
        z = logits_for(scale)
        calibration = Calibration(scale, BIAS)
        t = helpers.compiled(lambda x: calibration(x, from_logits=True))(z)
        np.testing.assert_allclose(t, reference(z, scale, BIAS), atol=2e-6)

    @every_scale
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, scale, dtype):
        z = ops.cast(logits_for(scale), dtype)
        t = Calibration(scale, BIAS)(z, from_logits=True)
        assert keras.backend.standardize_dtype(t.dtype) == dtype
        expected = reference(as_numpy(z), scale, BIAS)
        np.testing.assert_allclose(as_numpy(t), expected, atol=5e-2)

    def test_of_several_teachers(self):
        """Two teachers side by side, half of each: their geometric mean."""
        one, other = (helpers.dirichlet(seed, 5, 3) for seed in (0, 1))
        scale = np.concatenate([np.eye(3), np.eye(3)], axis=1) / 2
        both = np.concatenate([one, other], axis=1)
        expected = np.sqrt(one * other)
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(
            Calibration(scale)(both, from_logits=False), expected, rtol=1e-9
        )


class TestGradient:
    @every_scale
    def test_against_differences(self, scale):
        z, upstream = logits_for(scale), RNG.normal(size=(6, CLASSES))
        calibration = Calibration(scale, BIAS)
        upstream = upstream.astype("float32")
        gradient = helpers.gradient_of(
            lambda x: ops.multiply(upstream, calibration(x, from_logits=True)),
            z,
        )
        expected = helpers.numerical_gradient(
            lambda x: np.sum(upstream * reference(x, scale, BIAS)), z
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


class TestEdgeCases:
    @numpy_and_tensors
    @every_scale
    def test_zeros(self, convert, scale):
        """A class at 0 counts as `keras.config.epsilon()`, and can move."""
        width = logits_for(scale).shape[-1]
        p = np.eye(width, dtype="float32")
        t = Calibration(scale, BIAS)(convert(p), from_logits=False)
        floored = np.log(np.maximum(p, keras.config.epsilon()))
        expected = reference(floored, scale, BIAS)
        np.testing.assert_allclose(t, expected, atol=1e-5)

    @numpy_and_tensors
    @every_scale
    def test_huge_logits(self, convert, scale):
        width = logits_for(scale).shape[-1]
        sign = np.random.default_rng(2).choice([-1.0, 1.0], (6, width))
        z = (1e4 * sign).astype("float32")
        t = Calibration(scale, BIAS)(convert(z), from_logits=True)
        expected = reference(z, scale, BIAS)
        # Float32 has 1e-3 left at 1e4: enough where no two classes tie.
        np.testing.assert_allclose(t, expected, atol=3e-3)
        gradient = helpers.gradient_of(
            lambda x: Calibration(scale, BIAS)(x, from_logits=True), z
        )
        assert np.all(np.isfinite(gradient))

    @pytest.mark.parametrize("bias", [0.0, 3.0, [2.0, 2.0, 2.0, 2.0]])
    def test_identity(self, bias):
        """Probabilities come back as they are, zeros among them."""
        calibration = Calibration(1.0, bias)
        assert calibration.is_identity
        p = np.eye(CLASSES)
        assert calibration(p, from_logits=False) is p
        z = logits_for(1.0)
        np.testing.assert_allclose(
            calibration(z, from_logits=True), helpers.softmax(z), atol=1e-6
        )

    @pytest.mark.parametrize(
        "arguments", [(2.0,), (1.0, BIAS), (np.eye(CLASSES),)]
    )
    def test_no_identity(self, arguments):
        assert not Calibration(*arguments).is_identity


class TestClasses:
    @pytest.mark.parametrize(
        ("arguments", "going_in", "coming_out"),
        [
            ((2.0,), None, None),
            ((2.0, BIAS), CLASSES, CLASSES),
            ((SCALES["vector"],), CLASSES, CLASSES),
            ((SCALES["wider"],), 7, CLASSES),
        ],
    )
    def test_counts(self, arguments, going_in, coming_out):
        calibration = Calibration(*arguments)
        assert calibration.input_classes == going_in
        assert calibration.classes == coming_out
        calibration.check_input("inputs", None)  # an unknown size
        calibration.check_input("inputs", going_in or 9)
        if going_in is not None:
            with pytest.raises(
                ValueError,
                match=rf"`inputs` must have the {going_in} classes that its "
                r"calibration \(temperature, scale, bias\).*with 9 classes",
            ):
                calibration.check_input("inputs", 9)

    @pytest.mark.parametrize("scale", [np.ones(3), np.ones((3, CLASSES))])
    def test_other_counts(self, scale):
        with pytest.raises(
            ValueError, match=r"`scale` and `bias`.*same classes.*\(4,\)"
        ):
            Calibration(scale, BIAS)


class TestChecks:
    @pytest.mark.parametrize(
        "value", [0.1, [1.0, 2.0, 3.0], [[-1.0, 0.0, 2.0]], np.int64(2)]
    )
    def test_scale(self, value):
        array = check_scale("scale", value)
        assert array.dtype == "float64"
        np.testing.assert_array_equal(array, value)

    @pytest.mark.parametrize(
        "value",
        [
            0.0, -1.0, [1.0, 0.0], np.nan, np.inf, [], [[np.nan]],
            np.ones((2, 2, 2)), "hot", None,
        ],
    )  # fmt: skip
    def test_wrong_scale(self, value):
        with pytest.raises(ValueError, match="`scale` must be .*scale="):
            Calibration(value)

    def test_bias(self):
        assert check_bias("bias", None) == 0.0
        assert check_bias("bias", -1.0) == -1.0
        np.testing.assert_array_equal(check_bias("bias", [1, -2]), [1.0, -2.0])

    @pytest.mark.parametrize(
        "value", [np.nan, [0.0, np.inf], [], [[0.0]], "none"]
    )
    def test_wrong_bias(self, value):
        with pytest.raises(ValueError, match="`bias` must be .*bias="):
            Calibration(1.0, value)


class TestTeacherCalibration:
    """The user's words: `softmax(A z / temperature + b)`."""

    @pytest.mark.parametrize("temperature", [2.5, [0.5, 1.0, 2.0, 4.0]])
    @every_scale
    def test_temperature_divides_what_the_scale_gives(self, temperature, scale):
        z = logits_for(scale)
        calibration = teacher_calibration(temperature, scale, BIAS)
        full = np.asarray(scale)
        if full.ndim < 2:
            full = np.diag(np.broadcast_to(full, CLASSES))
        expected = helpers.softmax(
            (z.astype("float64") @ full.T) / temperature + BIAS
        )
        np.testing.assert_allclose(
            calibration(z, from_logits=True), expected, atol=2e-6
        )

    @pytest.mark.parametrize(
        "value",
        [0.0, -1.0, [1.0, 0.0], np.nan, np.inf, [[1.0]], "hot", None],
    )
    def test_wrong_temperature(self, value):
        with pytest.raises(
            ValueError,
            match="`teacher_temperature` must be a finite number above 0, or "
            "one a class. Received: teacher_temperature=",
        ):
            teacher_calibration(value, 1.0, 0.0)

    @pytest.mark.parametrize(
        "arguments",
        [
            (np.ones(3), np.ones((4, 4)), 0.0),
            (np.ones(3), np.ones(4), 0.0),
            (np.ones(3), 1.0, np.ones(4)),
            (1.0, np.ones((3, 4)), np.ones(4)),
        ],
    )
    def test_other_class_counts(self, arguments):
        with pytest.raises(
            ValueError,
            match=r"`teacher_temperature`, `teacher_scale` and `teacher_bias` "
            r"must be of the same classes. Received.*\(3",
        ):
            teacher_calibration(*arguments)
