"""ProxyTeacherSearch: all forms of teachers, labels and weights."""

import time
import warnings

import helpers
import keras
import numpy as np
import pytest
import scipy.sparse

from keras_ptloss import Correction, ProxyTeacherSearch
from keras_ptloss.search import Found, RandomSearch

ROWS, CLASSES = 40, 3


class Recorder:
    """A method that keeps what it is given, and finds what it is told."""

    name = "recorder"

    def __init__(self, **correction):
        self.correction = correction

    def run(self, examples, progress):
        self.examples = examples
        progress(1, 2)
        counts = tuple(t.shape[1] for t in examples.teacher_probs)
        several = {}
        if len(counts) > 1:
            alike = [count == examples.num_classes for count in counts]
            several["teacher_classes"] = counts
            several["temperature"] = [
                len(counts) if a else np.inf for a in alike
            ]
        correction = Correction(**{**several, **self.correction})
        return Found(correction, {"nll": [0.0]})


def read(*arguments, seed=0, **keywords):
    """Return the examples that a method is given."""
    method = Recorder()
    ProxyTeacherSearch(method, seed=seed).search(*arguments, **keywords)
    return method.examples


def refused(match, *arguments, **keywords):
    with pytest.raises(ValueError, match=match):
        read(*arguments, **keywords)


@pytest.fixture(scope="module")
def model():
    """A teacher that ends in a softmax, and one that ends in logits."""
    init = keras.initializers.GlorotUniform(0)
    dense = keras.layers.Dense(CLASSES, kernel_initializer=init)
    x = keras.Input((5,))
    logits = dense(x)
    probs = keras.layers.Softmax()(logits)
    return keras.Model(x, probs), keras.Model(x, logits)


@pytest.fixture(scope="module")
def data(model):
    """Inputs, the teacher's probabilities of them, and labels."""
    x = np.random.default_rng(0).normal(size=(ROWS, 5)).astype("float32")
    probs = model[0].predict(x, verbose=0)
    return x, probs, helpers.draw_labels(probs, seed=1)


def same(examples, probs, labels):
    """Require one teacher with these outputs."""
    (found,) = examples.teacher_probs
    assert found.dtype == np.float64
    assert found == pytest.approx(probs, abs=1e-6)
    assert found.sum(axis=1) == pytest.approx(1.0, abs=1e-12)
    assert examples.labels.tolist() == np.asarray(labels).tolist()
    assert examples.labels.dtype == np.int64


class Stored:
    """Stored outputs that say whether they are logits."""

    def __init__(self, outputs, from_logits):
        self.outputs, self.from_logits = outputs, from_logits

    def __array__(self, dtype=None, copy=None):
        return self.outputs


class TestFormsOfOneTeacher:
    def test_arrays(self, data):
        _, probs, labels = data
        for given in (
            probs,
            probs.tolist(),
            keras.ops.convert_to_tensor(probs),
        ):
            same(read(given, labels), probs, labels)
        same(read(1.005 * probs, labels[:, None]), probs, labels)
        same(read(probs, labels.tolist()), probs, labels)
        assert read(probs, labels).num_classes == CLASSES
        assert read(probs, labels, seed=7).seed == 7

    def test_logits(self, data, model):
        x, probs, labels = data
        logits = model[1].predict(x, verbose=0)
        same(read(logits, labels, from_logits=True), probs, labels)
        same(read(logits + 50.0, labels, from_logits=True), probs, labels)
        same(read(Stored(logits, True), labels), probs, labels)
        same(read(Stored(probs, False), labels), probs, labels)
        refused(
            "`from_logits` must be True, as in the stored outputs",
            Stored(logits, True),
            labels,
            from_logits=False,
        )
        refused("pass from_logits=True", logits, labels)
        refused("must be False for prob", probs, labels, from_logits=True)

    def test_result_takes_what_the_search_took(self, data, model):
        x, probs, labels = data
        logits = model[1].predict(x, verbose=0)
        result = ProxyTeacherSearch(Recorder(temperature=2.0)).search(
            logits, labels, from_logits=True
        )
        expected = helpers.softmax(logits / 2.0)
        assert result.correct(logits) == pytest.approx(expected, abs=1e-6)
        with pytest.raises(ValueError, match="`from_logits` must be False"):
            result.correct(probs)

    def test_models(self, data, model):
        x, probs, labels = data
        same(read(model[0], labels, inputs=x), probs, labels)
        same(read(model[1], labels, inputs=x, from_logits=True), probs, labels)
        refused("pass from_logits=True", model[1], labels, inputs=x)
        sparse = scipy.sparse.csr_matrix(x)
        same(read(model[0], labels, inputs=sparse), probs, labels)

    def test_model_survives_a_mistake(self, data, model):
        """On JAX an interrupted run would leave it without its weights."""
        x, probs, labels = data
        wrong = np.ones((ROWS, 4), "float32")
        for given in (
            {"labels": labels, "inputs": wrong},
            {"labels": iter([(x, labels), (wrong, labels)])},
        ):
            with pytest.raises(Exception, match="shape|ncompatible"):
                read(model[0], **given)
            assert model[0].predict(x, verbose=0) == pytest.approx(probs)

    def test_data_sets(self, data, model):
        """Of one teacher and of two, with and without weights."""
        x, probs, labels = data
        weights = np.arange(ROWS) % 24
        kept = weights > 0
        arrays = (x, labels, weights)
        batches = [[a[:16] for a in arrays], [a[16:] for a in arrays]]
        found = read(model[0], iter(batches))
        same(found, probs[kept], labels[kept])
        assert found.sample_weight == pytest.approx(
            weights[kept] / weights[kept].mean()
        )
        found = read(
            [model[0], model[0]], iter([batch[:2] for batch in batches])
        )
        for one in found.teacher_probs:
            assert one == pytest.approx(probs, abs=1e-6)

    def test_tf_data(self, data, model):
        """Shuffled: outputs and labels come from one pass."""
        tf = pytest.importorskip("tensorflow")
        x, _, labels = data
        pairs = tf.data.Dataset.from_tensor_slices((x, labels))
        found = read(model[0], pairs.shuffle(ROWS).batch(16))
        order = [
            int(np.argmin(np.abs(probs - data[1]).sum(axis=1)))
            for probs in found.teacher_probs[0]
        ]
        assert sorted(order) == list(range(ROWS))
        assert found.labels.tolist() == labels[order].tolist()

    def test_infinite_data_set(self, data, model):
        tf = pytest.importorskip("tensorflow")
        pairs = tf.data.Dataset.from_tensor_slices((data[0], data[2]))
        refused("must be a finite data set", model[0], pairs.batch(4).repeat())

    def test_py_data_set(self, data, model):
        x, probs, labels = data

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 5

            def __getitem__(self, index):
                part = slice(8 * index, 8 * index + 8)
                return x[part], labels[part]

        same(read(model[0], Batches()), probs, labels)

    def test_batches_padded_to_different_lengths(self):
        generator = np.random.default_rng(0)
        x = [generator.normal(size=(2, length, 5)) for length in (3, 4)]
        inputs = keras.Input((None, 5))
        per_token = keras.Model(
            inputs, keras.layers.Dense(3, "softmax")(inputs)
        )
        probs = [per_token.predict(batch, verbose=0) for batch in x]
        labels = [p.argmax(axis=-1) for p in probs]
        same(
            read(per_token, zip(x, labels, strict=True)),
            np.concatenate([p.reshape(-1, 3) for p in probs]),
            np.concatenate([y.ravel() for y in labels]),
        )

    def test_dense_prediction(self, data):
        """Ignored positions may hold anything."""
        _, probs, labels = data
        images = probs.reshape(2, 4, 5, CLASSES).copy()
        masks = labels.reshape(2, 4, 5).copy()
        same(read(images, masks), probs, labels)
        masks[0, 1] = 255
        images[0, 1] = np.nan
        kept = masks.ravel() != 255
        found = read(images, masks, ignore_class=255)
        same(found, probs[kept], labels[kept])
        refused("must be in .0, 3.*pass `ignore_class`", images, masks)
        refused("at least two examples", images, 0 * masks, ignore_class=0)

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_sigmoid_head(self, from_logits):
        p = np.linspace(0.05, 0.95, 20)[:, None]
        outputs = np.log(p / (1 - p)) if from_logits else p
        labels = np.arange(20) % 2
        found = read(outputs, labels, from_logits=from_logits)
        same(found, np.concatenate([1 - p, p], axis=1), labels)
        assert found.num_classes == 2


class TestSeveralTeachers:
    def test_of_all_kinds(self, data, model):
        x, probs, labels = data
        other = helpers.dirichlet(0, ROWS, 5)
        found = read(
            [model[1], probs, Stored(np.log(other), True)],
            labels,
            inputs=x,
            from_logits=[True, None, None],
            num_classes=CLASSES,
        )
        for one, expected in zip(
            found.teacher_probs, (probs, probs, other), strict=True
        ):
            assert one == pytest.approx(expected, abs=1e-6)
        assert found.num_classes == CLASSES

    def test_result_takes_a_list(self, data):
        _, probs, labels = data
        result = ProxyTeacherSearch(Recorder()).search([probs, probs], labels)
        assert result.temperature == (2.0, 2.0)
        assert result.correct([probs, probs]) == pytest.approx(probs, abs=1e-6)

    def test_what_is_refused(self, data, model):
        x, probs, labels = data
        two = helpers.dirichlet(0, ROWS, 2)
        refused("`num_classes` must be the number", [probs, two], labels)
        refused("for the same examples", [probs, probs[:9]], labels)
        refused(
            "one for each teacher", [probs, two], labels, from_logits=[True]
        )
        missing = np.where(np.arange(ROWS)[:, None] == 3, np.nan, probs)
        refused(
            r"`teacher\[1\]` must not contain NaN.* 1 of 40 rows.* index 3",
            [probs, missing],
            labels,
        )
        refused(
            "If all teachers are models", [model[0], probs], iter([(x, labels)])
        )


class TestWeights:
    def test_have_mean_1(self, data):
        """Rows of weight 0 may hold anything."""
        _, probs, labels = data
        weights = np.random.default_rng(0).uniform(1.0, 9.0, ROWS)
        weights[:10] = 0.0
        outputs = probs.copy()
        outputs[:10] = np.nan
        found = read(outputs, labels, sample_weight=weights)
        same(found, probs[10:], labels[10:])
        expected = weights[10:] / weights[10:].mean()
        assert found.sample_weight == pytest.approx(expected)
        assert read(probs, labels).sample_weight == pytest.approx(1.0)

    def test_of_images(self, data):
        _, probs, labels = data
        found = read(
            probs.reshape(2, 20, CLASSES),
            labels.reshape(2, 20),
            sample_weight=[1.0, 3.0],
        )
        assert found.sample_weight == pytest.approx(np.repeat([0.5, 1.5], 20))

    @pytest.mark.parametrize(
        ("weights", "match"),
        [
            (np.full(ROWS, -1.0), "finite numbers of at least 0"),
            (np.full(ROWS, np.nan), "finite numbers of at least 0"),
            (np.ones(ROWS - 1), "one weight for each label"),
            (np.zeros(ROWS), "at least two examples"),
            ("balanced", "finite numbers of at least 0"),
        ],
    )
    def test_what_is_refused(self, data, weights, match):
        refused(match, data[1], data[2], sample_weight=weights)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda y: y.astype(float), "integers.*dtype float64"),
            (lambda y: np.eye(CLASSES)[y], "integers.*one-hot"),
            (lambda y: np.eye(CLASSES, dtype=int)[y], "one class for each"),
            (lambda y: y + 1, r"must be in \[0, 3\)"),
            (lambda y: y[:-1], "one class for each output"),
            (lambda y: np.ma.masked_equal(y, 1), "must not be a masked array"),
        ],
    )
    def test_labels(self, data, change, match):
        refused(match, data[1], change(data[2]))

    def test_teacher_outputs(self, data):
        _, probs, labels = data
        masked = np.ma.masked_array(probs, mask=np.zeros(probs.shape, bool))
        masked.mask[:5] = True
        refused("`teacher` must not be a masked array", masked, labels)
        with pytest.raises(ValueError, match="percentages: divide") as error:
            read(100.0 * probs, labels)
        assert "from_logits" not in str(error.value)
        refused("at least two examples", probs[:1], labels[:1])
        refused(r"shape \(N, \.\.\., num_classes\)", probs[0], labels)

    def test_inputs(self, data, model):
        x, probs, labels = data
        refused("`inputs` must hold the labelled examples", model[0], labels)
        refused("must be arrays", model[0], labels, inputs=iter([x]))
        refused("one class for each output", model[0], labels, inputs=x[1:])
        pairs, weights = iter([(x, labels)]), np.ones(ROWS)
        refused(
            "sample_weight. instead", model[0], pairs, sample_weight=weights
        )
        refused(r"a data set of \(inputs, labels\)", model[0], iter([x]))
        refused("at least one batch", model[0], iter([]))

    def test_model_with_two_outputs(self, data):
        x = keras.Input((5,))
        heads = [keras.layers.Dense(3, "softmax")(x) for _ in range(2)]
        two = keras.Model(x, heads)
        refused("must return a single tensor", two, data[2], inputs=data[0])

    @pytest.mark.parametrize(
        ("keywords", "match"),
        [
            ({"verbose": "loud"}, '`verbose` must be 0, 1 or "auto"'),
            ({"class_names": ["a", "b"]}, "one name for each of 3 classes"),
            ({"class_names": "abc"}, "one name for each of 3 classes"),
            ({"ignore_class": 0.5}, "`ignore_class` must be an integer"),
            ({"num_classes": 1}, "`num_classes` must be an integer of at"),
            ({"random_sample": "yes"}, "`random_sample` must be True or"),
            ({"from_logits": "no"}, "`from_logits` must be True or False"),
        ],
    )
    def test_other_arguments(self, data, keywords, match):
        refused(match, data[1], data[2], **keywords)

    def test_settings(self):
        for method in ("grid", RandomSearch, 3):
            with pytest.raises(ValueError, match="`method` must be"):
                ProxyTeacherSearch(method)
        with pytest.raises(ValueError, match="`seed` must be an integer"):
            ProxyTeacherSearch(seed=-1)


def notes(teacher, labels, correction=None, **keywords):
    """Return the notes, which are also warnings at the caller's line."""
    method = Recorder(**(correction or {}))
    with pytest.warns(UserWarning) as record:
        result = ProxyTeacherSearch(method).search(teacher, labels, **keywords)
    assert [str(r.message) for r in record] == list(result.notes)
    assert {r.filename for r in record} == {__file__}
    assert all(
        note in repr(result).replace("\n  ", " ") for note in result.notes
    )
    return result.notes


class TestNotes:
    def test_permuted_classes(self):
        """Its class c is what the labels call order[c]."""
        truth = helpers.dirichlet(0, 400, 4, 0.3)
        labels = helpers.draw_labels(truth, 1)
        (note,) = notes(
            truth[:, [1, 2, 0, 3]], labels, class_names="a b c d".split()
        )
        assert "classes of the teacher seem permuted" in note
        assert "if its class a is b, b is c, c is a. Check" in note

    def test_overconfident_teacher_that_is_mostly_right(self):
        truth = helpers.dirichlet(0, 400, 4, 0.3)
        labels = helpers.draw_labels(truth, 1)
        sharp = truth**8 / (truth**8).sum(axis=1, keepdims=True)
        assert -np.log(sharp[np.arange(400), labels]).mean() > np.log(4)
        result = ProxyTeacherSearch(Recorder()).search(sharp, labels)
        assert result.notes == ()

    @pytest.mark.parametrize("classes", [2, 3, 10])
    def test_balanced_labels(self, classes):
        """Of a population that is mostly class 0."""
        prior = np.r_[0.8, np.full(classes - 1, 0.2 / (classes - 1))]
        labels = np.repeat(np.arange(classes), 130)
        x = np.random.default_rng(0).normal(size=(len(labels), classes))
        logits = np.log(prior) + 1.5 * (x + 1.5 * np.eye(classes)[labels])
        teacher = helpers.softmax(logits)
        (note,) = notes(teacher, labels)
        assert "balanced by class (130 to 130 per class)" in note
        assert "random sample" in note
        weights = prior[labels]
        weighted = ProxyTeacherSearch(Recorder()).search(
            teacher, labels, sample_weight=weights
        )
        assert weighted.notes == ()

    def test_random_samples_are_not_called_balanced(self):
        """Neither from an even nor from an uneven population."""
        said = 0
        for seed in range(20):
            truth = helpers.dirichlet(seed, 300, 3, 0.5)
            labels = helpers.draw_labels(truth, seed)
            biased = helpers.skewed(truth, [1.0, 0.3, 0.3])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = ProxyTeacherSearch(Recorder()).search(biased, labels)
            said += len(result.notes)
        assert said <= 3

    def test_kept_classes(self):
        teacher = helpers.dirichlet(0, 200, 4)
        teacher[:, 3] *= 3
        teacher /= teacher.sum(axis=1, keepdims=True)
        labels = helpers.draw_labels(teacher[:, :3], 0)
        share = 100 * teacher[:, 3].mean()
        for correction, effect in (
            ({"kept_classes": (3,)}, "keep the teacher's probabilities"),
            ({}, "keep the teacher's probabilities"),
            ({"epsilon": 0.5}, "change only in confidence"),
        ):
            (note,) = notes(
                teacher,
                labels,
                correction,
                class_names=["a", "b", "c", "rare"],
            )
            assert note.startswith(f"1 of 4 classes have no label and {effect}")
            assert f"(rare; together {share:.1f} %" in note


@pytest.mark.parametrize(
    ("verbose", "seconds", "shown"),
    [
        ("auto", 4.0, True),
        ("auto", 1.0, False),
        (0, 4.0, False),
        (1, 1.0, True),
    ],
)
def test_progress_bar(data, monkeypatch, capsys, verbose, seconds, shown):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Recorder):
        def run(self, examples, progress):
            progress(1, 3)
            clock[0] += seconds
            progress(2, 3)
            progress(3, 3)
            return super().run(examples, lambda *_: None)

    result = ProxyTeacherSearch(Slow()).search(
        data[1], data[2], verbose=verbose
    )
    assert result.seconds == seconds
    assert ("3/3" in capsys.readouterr().out) is shown


@pytest.mark.parametrize("bias", [[1.0, 0.2, 0.2], [0.1, 1.0, 1.0]])
def test_default_search_on_a_biased_teacher(bias):
    """It is better on labels and on new data; a good teacher stays."""
    truth = helpers.dirichlet(0, 2300, 3)
    labels = helpers.draw_labels(truth, 1)
    teacher = helpers.skewed(truth, bias)
    result = ProxyTeacherSearch().search(teacher[:300], labels[:300])
    assert result.out_of_fold
    assert result.score < result.baseline_score
    q = result.correct(teacher[300:])
    new = labels[300:]
    best, before = (
        helpers.nll(truth[300:], new),
        helpers.nll(teacher[300:], new),
    )
    assert helpers.nll(q, new) < best + 0.2 * (before - best)
    good = ProxyTeacherSearch().search(truth[:300], labels[:300])
    assert helpers.nll(good.correct(truth[300:]), new) < best + 0.02


def test_default_search_of_several_teachers():
    """Two that err differently, one with other classes: better than each."""
    truth = helpers.dirichlet(0, 2300, 4, 0.3)
    labels = helpers.draw_labels(truth, 1)
    one = truth @ [[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    two = truth @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.1, 0.9], [0, 0, 0, 1]]
    pair = truth @ [[1, 0], [0, 1], [1, 0], [0, 1]]
    teachers = [one, two, pair]
    result = ProxyTeacherSearch().search(
        [t[:300] for t in teachers], labels[:300], num_classes=4
    )
    q = result.correct([t[300:] for t in teachers])
    right = [np.mean(p[300:].argmax(1) == labels[300:]) for p in (one, two)]
    assert np.mean(q.argmax(axis=1) == labels[300:]) > max(right) + 0.05
    assert np.isinf(result.temperature[2])


def test_classes_that_never_occur():
    """A teacher gives 40 % to ten classes that none of the labels has.

    If the search is told that the labels are a random sample, these classes
    lose their mass. If not, they keep it.
    """
    rng = np.random.default_rng(0)
    count, seen = 4000, np.arange(20) < 10
    truth = np.zeros((count, 20))
    truth[:, seen] = rng.dirichlet([0.3] * 10, size=count)
    labels = (truth.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    elsewhere = np.zeros((count, 20))
    elsewhere[:, ~seen] = rng.dirichlet([0.2] * 10, size=count)
    teacher = 0.6 * np.maximum(truth, 1e-4) + 0.4 * elsewhere
    teacher /= teacher.sum(axis=1, keepdims=True)
    best = teacher[1000:] * np.where(seen, 1.0, 1e-6)
    best = helpers.nll(best / best.sum(1, keepdims=True), labels[1000:])
    result = ProxyTeacherSearch().search(
        teacher[:1000], labels[:1000], random_sample=True
    )
    assert result.correction.kept_classes == ()
    q = result.correct(teacher[1000:])
    assert helpers.nll(q, labels[1000:]) < best + 0.05
    with pytest.warns(UserWarning, match="have no label"):
        kept = ProxyTeacherSearch().search(teacher[:1000], labels[:1000])
    np.testing.assert_allclose(
        kept.correct(teacher)[:, ~seen], teacher[:, ~seen], atol=1e-9
    )


def test_weights_of_class_balanced_labels():
    """An overconfident teacher on data that are 90 % class 0."""
    rng = np.random.default_rng(0)
    prior, count = np.array([0.9, 0.05, 0.05]), 40_000
    labels = rng.choice(3, p=prior, size=count)
    x = rng.normal(size=(count, 3)) + 2 * np.eye(3)[labels]
    truth = prior * np.exp(2 * x)
    teacher = (truth / truth.sum(axis=1, keepdims=True)) ** 2
    teacher /= teacher.sum(axis=1, keepdims=True)
    few = [np.flatnonzero(labels[:20_000] == c)[:130] for c in range(3)]
    few = np.concatenate(few)
    result = ProxyTeacherSearch().search(
        teacher[few], labels[few], sample_weight=prior[labels[few]]
    )
    q = result.correct(teacher[20_000:])
    assert helpers.nll(q, labels[20_000:]) < 0.16
