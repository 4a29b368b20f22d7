"""PTLoss on k + 1 events, against merged distributions in NumPy float64."""

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_ptloss.losses import PTLoss, TopKPTLoss, top_k_pt_loss

CLASSES, K, ROWS = 12, 3, 6
EPSILON = [0.5, -0.2, 0.3]
WEIGHT = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")
TAILS = ["event", "renormalize", "teacher_only", "spread"]


def largest(teacher, k):
    """The k largest of rows `(..., C)`, as a loss's `y_true`."""
    ids = np.argsort(-teacher, axis=-1, kind="stable")[..., :k]
    with np.errstate(divide="ignore"):
        logs = np.log(np.take_along_axis(teacher, ids, axis=-1))
    return np.stack([ids, logs], axis=-1)


def merged(rows, ids):
    """Rows `(N, C)` with all but `ids`, `(N, k)`, added up, one at a time."""
    out = []
    for row, chosen in zip(np.asarray(rows, "float64"), ids, strict=True):
        others = [c for c in range(len(row)) if c not in set(chosen)]
        out.append([*(row[c] for c in chosen), sum(row[c] for c in others)])
    return np.array(out)


def reference(y_true, logits, epsilon, tail="event"):
    """Eq. 7 as each tail says, in float64."""
    y_true = np.asarray(y_true, "float64")
    ids, t = y_true[..., 0].astype(int), np.exp(y_true[..., 1])
    student = helpers.softmax(logits)
    rest = 1.0 - t.sum(axis=-1, keepdims=True)
    if ids.shape[-1] == student.shape[-1]:
        rest = 0.0 * rest  # there are no others, whatever t's rounding
    p = np.take_along_axis(student, ids, axis=-1)
    if tail == "event":
        teacher = np.concatenate([t, np.maximum(rest, 0.0)], axis=-1)
        return helpers.pt_loss(teacher, merged(student, ids), epsilon)
    if tail == "spread":
        teacher = np.zeros_like(student)
        teacher += rest / max(student.shape[-1] - ids.shape[-1], 1)
        np.put_along_axis(teacher, ids, t, axis=-1)
        return helpers.pt_loss(teacher, student, epsilon)
    t = t / t.sum(axis=-1, keepdims=True)
    if tail == "renormalize":
        p = p / p.sum(axis=-1, keepdims=True)
    return helpers.pt_loss(t, p, epsilon)


def draw(seed, rows=ROWS, classes=CLASSES, k=K, scale=3.0):
    teacher = helpers.dirichlet(seed, rows, classes, 0.5)
    logits = np.random.default_rng(seed).normal(size=(rows, classes)) * scale
    y_true = largest(teacher, k).astype("float32")
    return y_true, logits.astype("float32"), teacher


@pytest.fixture
def rows():
    return draw(0)[:2]


# Each shape is compiled anew.
EVENTS = st.sampled_from([1, 2, 7, CLASSES - 1, CLASSES])


class TestIdentity:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        k=EVENTS,
        scale=st.sampled_from([0.1, 3.0, 30.0]),
        epsilon=st.sampled_from([1, 4]).flatmap(
            lambda order: st.lists(
                st.floats(-0.3, 3.0), min_size=order, max_size=order
            )
        ),
    )
    def test_is_pt_loss_of_the_merged(self, seed, k, scale, epsilon):
        y_true, logits, _ = draw(seed, k=k, scale=scale)
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, logits, epsilon, from_logits=True),
            reference(y_true, logits, epsilon),
            rtol=2e-5,
            atol=2e-5,
        )

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 10**6), k=EVENTS)
    def test_lies_between_0_and_the_full_kl(self, seed, k):
        y_true, logits, teacher = draw(seed, k=k)
        value = np.asarray(top_k_pt_loss(y_true, logits, 0.0, from_logits=True))
        full = helpers.pt_loss_of_logits(teacher, logits, 0.0)
        assert (value >= -1e-6).all()
        assert (value <= full + 1e-5).all()
        if k == CLASSES:
            np.testing.assert_allclose(value, full, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("tail", TAILS)
    def test_tails(self, rows, tail):
        np.testing.assert_allclose(
            top_k_pt_loss(*rows, EPSILON, tail=tail, from_logits=True),
            reference(*rows, EPSILON, tail),
            rtol=1e-5,
        )

    @pytest.mark.parametrize("tail", TAILS)
    def test_all_classes_are_pt_loss(self, tail):
        y_true, logits, teacher = draw(3, k=CLASSES)
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, logits, EPSILON, tail=tail, from_logits=True),
            helpers.pt_loss_of_logits(teacher, logits, EPSILON),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_probabilities(self, rows):
        y_true, logits = rows
        student = helpers.softmax(logits).astype("float32")
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, student, EPSILON),
            reference(y_true, logits, EPSILON),
            rtol=1e-5,
        )

    def test_minimum_is_the_merged_teacher(self):
        y_true, _, teacher = draw(1)
        logits = np.log(teacher).astype("float32")
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, logits, 0.0, from_logits=True), 0, atol=1e-6
        )
        gradient = helpers.gradient_of(
            lambda z: top_k_pt_loss(y_true, z, 0.0, from_logits=True), logits
        )
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    @pytest.mark.parametrize("tail", TAILS)
    def test_temperature(self, rows, temperature, tail):
        y_true, logits = rows
        t = np.exp(np.asarray(y_true[..., 1], "float64"))
        rest = 1.0 - t.sum(-1, keepdims=True)
        others = CLASSES - K if tail == "spread" else 1
        if tail in ("renormalize", "teacher_only"):
            rest = rest * 0.0
        soft = t ** (1 / temperature)
        rest = others * (rest / others) ** (1 / temperature)
        soft = soft / (soft.sum(-1, keepdims=True) + rest)
        again = np.stack([y_true[..., 0], np.log(soft)], -1)
        np.testing.assert_allclose(
            top_k_pt_loss(
                y_true,
                logits,
                EPSILON,
                tail=tail,
                teacher_temperature=temperature,
                from_logits=True,
            ),
            reference(again, logits, EPSILON, tail),
            rtol=1e-4,
        )


class TestTargets:
    def test_explicit_rest_is_the_rest(self, rows):
        y_true, logits = rows
        rest = np.log1p(-np.exp(y_true[..., 1].astype("float64")).sum(-1))
        entry = np.stack([np.full(ROWS, -1.0), rest], -1)[:, None]
        np.testing.assert_allclose(
            top_k_pt_loss(
                np.concatenate([entry, y_true], 1),
                logits,
                EPSILON,
                from_logits=True,
            ),
            reference(y_true, logits, EPSILON),
            rtol=1e-5,
        )

    def test_tiny_rest_keeps_its_digits(self):
        """1 - 0.9999999999 is 0 in float32; its logarithm is not."""
        t = np.array([0.7, 0.3 - 1e-10])
        y_true = np.array([[[4, np.log(t[0])], [2, np.log(t[1])], [-1, -23.0]]])
        logits = np.zeros((1, CLASSES), "float32")
        logits[0, [4, 2]] = 60.0  # the others have 1e-25
        value = top_k_pt_loss(y_true, logits, 0.0, from_logits=True)
        t = np.array([0.7, 0.3, np.exp(-23.0)])
        log_p = [np.log(0.5), np.log(0.5), np.log(5) - 60.0]
        expected = np.sum(t / t.sum() * (np.log(t / t.sum()) - log_p))
        np.testing.assert_allclose(value, [expected], rtol=1e-5)

    def test_rest_of_no_mass(self):
        y_true = np.array([[[1, np.log(0.5)], [3, np.log(0.5)], [-1, -np.inf]]])
        logits = np.array([[9.0, 1.0, -3.0, 2.0]], "float32")
        p = helpers.softmax(logits)[0, [1, 3]]
        for tail in ("event", "teacher_only", "spread"):
            np.testing.assert_allclose(
                top_k_pt_loss(y_true, logits, 0.0, tail=tail, from_logits=True),
                [np.sum(0.5 * (np.log(0.5) - np.log(p)))],
                rtol=1e-6,
            )

    def test_class_of_no_mass_is_no_part_of_the_rest(self):
        y_true = np.array([[[1, np.log(0.6)], [3, -np.inf]]])
        logits = np.array([[9.0, 1.0, -3.0, 2.0]], "float32")
        p = helpers.softmax(logits)[0]
        expected = helpers.pt_loss(
            [[0.6, 0.0, 0.4]], [[p[1], p[3], p[0] + p[2]]], 0.5
        )
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, logits, 0.5, from_logits=True),
            expected,
            rtol=1e-6,
        )

    @pytest.mark.parametrize("tail", TAILS)
    def test_padding(self, rows, tail):
        """Positions of fewer entries; where there are none the loss is 0."""
        y_true, logits = rows
        padding = np.array([[[-2.0, 0.0], [-3.0, np.nan]]])
        padding = np.where(np.isnan(padding), -7.0, padding)
        padded = np.concatenate([np.repeat(padding, ROWS, 0), y_true], axis=1)
        value = top_k_pt_loss(padded, logits, 0.3, tail=tail, from_logits=True)
        expected = reference(y_true, logits, 0.3, tail)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    @pytest.mark.parametrize("tail", ["event", "renormalize", "teacher_only"])
    def test_padding_alone_is_nothing(self, rows, tail):
        empty = np.full((ROWS, K, 2), -2.0, "float32")
        loss = TopKPTLoss(0.3, tail=tail, from_logits=True)
        assert float(loss(empty, rows[1])) == 0.0
        gradient = helpers.gradient_of(lambda z: loss(empty, z), rows[1])
        assert not gradient.any()

    def test_ties(self):
        y_true = np.array([[[1, np.log(0.25)], [0, np.log(0.25)]]])
        logits = np.zeros((1, 4), "float32")
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, logits, 0.0, from_logits=True),
            0.0,
            atol=1e-7,
        )

    def test_rounded_masses_above_1_are_divided(self):
        y_true = np.array([[[1, np.log(0.503)], [0, np.log(0.501)]]])
        logits = np.array([[0.0, 0.0, -1e4]], "float32")
        t = np.array([[0.503, 0.501, 0.0]]) / 1.004
        np.testing.assert_allclose(
            top_k_pt_loss(y_true, logits, 0.5, from_logits=True),
            helpers.pt_loss(t, [[0.5, 0.5, 0.0]], 0.5),
            atol=1e-6,
        )

    def test_ids_of_sixteen_million(self):
        """2^24 - 1 and its neighbours are told apart."""
        last = 2**24 - 1
        logits = np.zeros((1, last + 1), "float32")
        logits[0, [last, last - 1, last - 2]] = [20.0, 19.0, 18.0]
        y_true = np.array([[[last, np.log(0.6)], [last - 2, np.log(0.3)]]])
        p = helpers.softmax(logits)[0]
        expected = helpers.pt_loss(
            [[0.6, 0.3, 0.1]],
            [[p[last], p[last - 2], 1 - p[last] - p[last - 2]]],
            0.0,
        )
        np.testing.assert_allclose(
            TopKPTLoss(0.0, from_logits=True)(y_true, logits),
            expected[0],
            rtol=1e-5,
        )

    def test_drawn_at_random_is_right_on_average(self):
        """The mean gradient of drawn targets is that of the full KL."""
        rng = np.random.default_rng(0)
        teacher = helpers.dirichlet(0, 1, CLASSES)[0]
        logits = rng.normal(size=(1, CLASSES)).astype("float32")
        draws, times = 4000, 5
        counts = rng.multinomial(times, teacher, size=draws)
        y_true = np.full((draws, times, 2), -2.0)
        for row, count in zip(y_true, counts, strict=True):
            ids = np.flatnonzero(count)
            row[: len(ids), 0] = ids
            row[: len(ids), 1] = np.log(count[ids] / times)
        gradient = helpers.gradient_of(
            lambda z: top_k_pt_loss(
                y_true, z, 0.0, tail="teacher_only", from_logits=True
            ),
            np.repeat(logits, draws, axis=0),
        ).mean(axis=0)
        expected = helpers.softmax(logits)[0] - teacher
        np.testing.assert_allclose(gradient, expected, atol=0.02)


class TestGradient:
    @pytest.mark.parametrize("tail", TAILS)
    def test_differences(self, rows, tail):
        y_true, logits = rows
        gradient = helpers.gradient_of(
            lambda z: top_k_pt_loss(
                y_true, z, EPSILON, tail=tail, from_logits=True
            ),
            logits,
        )
        expected = helpers.numerical_gradient(
            lambda z: reference(y_true, z, EPSILON, tail).sum(), logits
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    def test_with_rest_and_padding(self, rows):
        y_true, logits = rows
        padding = np.full((ROWS, 1, 2), -2.0)
        rest = np.log1p(-np.exp(y_true[..., 1].astype("float64")).sum(-1))
        rest = np.stack([np.full(ROWS, -1.0), rest], -1)[:, None]
        padded = np.concatenate([padding, y_true, rest], 1)
        gradients = [
            helpers.gradient_of(
                lambda z, y=y: top_k_pt_loss(y, z, EPSILON, from_logits=True),
                logits,
            )
            for y in (y_true, padded)
        ]
        np.testing.assert_allclose(*gradients, atol=1e-6)

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("size", [1e4, -1e4])
    def test_is_finite_at_extremes(self, rows, size, tail):
        y_true, logits = rows
        logits = np.where(np.arange(CLASSES) % 2, size, logits)
        logits = logits.astype("float32")
        logits[:, 5] = -np.inf if size > 0 else logits[:, 5]
        gradient = helpers.gradient_of(
            lambda z: top_k_pt_loss(
                y_true, z, EPSILON, tail=tail, from_logits=True
            ),
            logits,
        )
        assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_of_small_floats(self, rows, dtype):
        y_true, logits = rows
        logits = keras.ops.cast(logits, dtype)
        gradient = helpers.gradient_of(
            lambda z: top_k_pt_loss(y_true, z, EPSILON, from_logits=True),
            logits,
        )
        exact = helpers.numerical_gradient(
            lambda z: reference(y_true, z, EPSILON).sum(),
            keras.ops.convert_to_numpy(logits).astype("float64"),
        )
        np.testing.assert_allclose(gradient, exact, atol=2e-2)

    def test_compiled(self, rows):
        y_true, logits = rows
        compiled = helpers.compiled(
            lambda y, z: top_k_pt_loss(y, z, EPSILON, from_logits=True)
        )
        np.testing.assert_allclose(
            compiled(y_true, logits),
            reference(y_true, logits, EPSILON),
            rtol=1e-5,
        )


class TestErrors:
    @pytest.mark.parametrize(
        "entries, match",
        [
            ([[1, -0.5], [1, -2.0]], "each id once"),
            ([[-1, -0.5], [-1, -2.0]], "each id once"),
            ([[12, -0.5], [1, -2.0]], "at most 11"),
            ([[1.5, -0.5], [1, -2.0]], "whole ids"),
            ([[0, 0.7], [1, 0.3]], "logarithms of probabilities"),
            ([[0, np.nan], [1, -0.3]], "logarithms of probabilities"),
        ],
    )
    def test_targets(self, entries, match):
        logits = np.zeros((1, CLASSES), "float32")
        with pytest.raises(ValueError, match=match):
            top_k_pt_loss(np.array([entries]), logits, 0.0, from_logits=True)

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize(
        "shape",
        [
            (4, 12),
            (3, 2, 1, 2),
            (1, 3, 1, 2),
            (6, 1, 2),
            (2, 3, 1, 3),
            (2, 3, 0, 2),
        ],
    )
    def test_shape(self, tail, shape):
        """Time before batch too: as many rows, but other ones."""
        rows = np.full((2, 3, 4), 0.25)
        with pytest.raises(
            ValueError, match=r"`y_true`.*\(\.\.\., k, 2\).*y_pred of shape"
        ):
            top_k_pt_loss(np.full(shape, -1.0), rows, 0.0, tail=tail)

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ({"tail": "drop"}, "`tail` must be one of"),
            ({"epsilon": [[1.0], [2.0]]}, "shared by the classes"),
            ({"teacher_temperature": 0.0}, "above 0"),
            ({"dtype": "bfloat16"}, "which hold ids"),
        ],
    )
    def test_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            TopKPTLoss(**{"epsilon": 0.0, **arguments})


class TestLoss:
    def test_config(self, rows):
        loss = TopKPTLoss(
            EPSILON,
            tail="renormalize",
            teacher_temperature=2.0,
            from_logits=True,
            reduction="sum",
            name="mine",
        )
        serialized = keras.saving.serialize_keras_object(loss)
        assert serialized["registered_name"] == "keras_ptloss>TopKPTLoss"
        again = keras.saving.deserialize_keras_object(serialized)
        assert again.get_config() == loss.get_config()
        np.testing.assert_allclose(again(*rows), loss(*rows))

    def test_unweighted(self, rows):
        loss = TopKPTLoss(EPSILON, from_logits=True)
        expected = reference(*rows, EPSILON).mean()
        np.testing.assert_allclose(loss(*rows), expected, rtol=1e-5)

    def test_sample_weighted(self, rows):
        values = reference(*rows, EPSILON)
        for reduction, expected in (
            ("sum_over_batch_size", (WEIGHT * values).mean()),
            ("mean", (WEIGHT * values).mean()),
            ("sum", (WEIGHT * values).sum()),
            ("mean_with_sample_weight", (WEIGHT * values).sum() / WEIGHT.sum()),
            (None, WEIGHT * values),
        ):
            loss = TopKPTLoss(EPSILON, from_logits=True, reduction=reduction)
            np.testing.assert_allclose(
                loss(*rows, sample_weight=WEIGHT), expected, rtol=1e-5
            )

    def test_rows_of_weight_0_may_hold_anything(self, rows):
        y_true, logits = rows
        loss = TopKPTLoss(EPSILON, from_logits=True)
        expected = loss(y_true, logits, sample_weight=WEIGHT)
        y_true = y_true.copy()
        y_true[0] = np.nan
        value = loss(y_true, logits, sample_weight=WEIGHT)
        np.testing.assert_allclose(value, expected)

    def test_mask(self):
        y_true, logits, _ = draw(0, rows=6)
        y_true = y_true.reshape(2, 3, K, 2)
        logits = keras.ops.convert_to_tensor(logits.reshape(2, 3, CLASSES))
        mask = np.array([[True, True, False], [True, False, False]])
        logits._keras_mask = keras.ops.convert_to_tensor(mask)
        loss = TopKPTLoss(0.0, from_logits=True)
        values = reference(
            y_true.reshape(6, K, 2),
            np.asarray(logits).reshape(6, CLASSES),
            0.0,
        )
        expected = values[mask.ravel()].mean()
        np.testing.assert_allclose(loss(y_true, logits), expected, rtol=1e-5)

    def language_model(self, policy):
        """A small one, compiled, and padded data for it."""
        vocabulary, time = 300, 5
        keras.utils.set_random_seed(0)
        layers = [
            keras.Input((time,), dtype="int32"),
            keras.layers.Embedding(vocabulary, 8, dtype=policy),
            keras.layers.Dense(vocabulary, dtype=policy),
        ]
        model = keras.Sequential(layers)
        model.compile(
            keras.optimizers.Adam(0.05),
            loss=TopKPTLoss(
                0.1, from_logits=True, reduction="mean_with_sample_weight"
            ),
        )
        rng = np.random.default_rng(0)
        x = rng.integers(0, vocabulary, (16, time)).astype("int32")
        teacher = helpers.dirichlet(0, vocabulary, vocabulary, 0.01)[x]
        y_true = largest(teacher, 4).astype("float32")
        weight = (np.arange(time) < 3).astype("float32")
        weight = np.tile(weight, (16, 1))
        y_true[:, 3:] = np.nan
        return model, (x, y_true, weight)

    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
    def test_model_fit_and_saving(self, tmp_path, policy):
        model, (x, y_true, weight) = self.language_model(policy)
        before = model.evaluate(x, y_true, sample_weight=weight, verbose=0)
        history = model.fit(
            x, y_true, sample_weight=weight, epochs=20, verbose=0
        )
        assert history.history["loss"][-1] < 0.5 * before
        path = tmp_path / "student.keras"
        model.save(path)
        again = keras.saving.load_model(path)
        assert again.loss.get_config() == model.loss.get_config()
        np.testing.assert_allclose(
            again.evaluate(x, y_true, sample_weight=weight, verbose=0),
            model.evaluate(x, y_true, sample_weight=weight, verbose=0),
            rtol=1e-5,
        )

    def test_model_fit_by_tf_data(self):
        """As by arrays."""
        tf = pytest.importorskip("tensorflow")
        found = []
        for by_tf_data in (False, True):
            model, (x, y_true, weight) = self.language_model("float32")
            run = {"x": x, "y": y_true, "sample_weight": weight}
            run["batch_size"] = 8
            if by_tf_data:
                data = tf.data.Dataset.from_tensor_slices((x, y_true, weight))
                run = {"x": data.batch(8)}
            model.fit(**run, epochs=2, shuffle=False, verbose=0)
            found.append(model.evaluate(**run, verbose=0))
        np.testing.assert_allclose(*found, rtol=1e-5)

    def test_no_class_axis_of_known_size(self):
        """Where sizes are unknown, as in graphs of `tf.data`."""
        if keras.backend.backend() != "tensorflow":
            pytest.skip("TensorFlow's graphs alone have unknown sizes")
        import tensorflow as tf

        y_true, logits, _ = draw(0)
        spec = [
            tf.TensorSpec((None, None, 2), "float32"),
            tf.TensorSpec((None, None), "float32"),
        ]
        graph = tf.function(
            lambda y, z: top_k_pt_loss(y, z, EPSILON, from_logits=True),
            input_signature=spec,
        )
        np.testing.assert_allclose(
            graph(y_true, logits), reference(y_true, logits, EPSILON), rtol=1e-5
        )


def test_same_value_as_pt_loss_on_logs_of_all(rows):
    y_true, logits, teacher = draw(5, k=CLASSES)
    log_t = scipy.special.log_softmax(np.log(teacher), axis=-1)
    full = PTLoss(EPSILON, from_logits=True, teacher_from_logits=True)
    value = TopKPTLoss(EPSILON, from_logits=True)(y_true, logits)
    expected = full(log_t.astype("float32"), logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
