"""Stores made, opened, read and searched."""

import pickle
import sys

import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import SoftLabels
from keras_ptloss.soft_labels.soft_labels import CHUNK

HALF = 2.0**-11  # relative rounding of float16


def write(teacher, x, path, **options):
    return SoftLabels.write(teacher, x, path, verbose=0, **options)


@pytest.fixture(scope="module")
def models():
    def build(activation):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((2,))
        hidden = keras.layers.Dense(3)(inputs)
        outputs = keras.layers.Dense(4, activation)(hidden)
        return keras.Model(inputs, outputs)

    return [build("softmax"), build("softmax"), build("softplus")]


@pytest.fixture(scope="module")
def full():
    return np.random.default_rng(2).dirichlet(np.ones(6), (3, 5))


@pytest.fixture(scope="module")
def tokens():
    """Padding on the right, on the left, and none."""
    mask = np.ones((3, 5), int)
    mask[0, 3:] = mask[1, :2] = 0
    ids = np.arange(15).reshape(3, 5) * mask
    return {"token_ids": ids, "padding_mask": mask}


@pytest.fixture(scope="module")
def several_files(tmp_path_factory):
    """A store of files of a few rows each."""
    from keras_ptloss.soft_labels import journal

    rows = np.random.default_rng(0).dirichlet(np.ones(4), 300)
    path = tmp_path_factory.mktemp("store") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "FILE_BYTES", 3000)
        labels = SoftLabels.write(
            lambda i: rows[i],
            np.arange(300),
            path,
            dtype="float32",
            batch_size=13,
            verbose=0,
        )
    assert len(list(path.glob("*.arrow"))) > 2
    return rows.astype("float32"), labels


class TestWrite:
    def test_rows_are_the_teachers(self, teacher, x, probabilities, tmp_path):
        labels = write(teacher, x, tmp_path / "a", class_names=list("abcd"))
        np.testing.assert_allclose(labels, probabilities, HALF, 6e-8)
        assert labels.layout.class_names == tuple("abcd")
        assert labels.shape == (300, 4)

    def test_logits_become_probabilities(self, x, tmp_path):
        logits = np.random.default_rng(1).normal(0, 5, (300, 4))
        labels = write(
            lambda batch: logits[(batch[:, 0] / 2).astype(int)],
            x,
            tmp_path / "a",
            from_logits=True,
            dtype="float32",
        )
        right = scipy.special.softmax(logits, axis=-1)
        np.testing.assert_allclose(labels, right, 1e-6)

    def test_one_output_is_two_classes(self, tmp_path):
        labels = write(lambda b: b[:, None], [0.25, 0.5], tmp_path / "a")
        np.testing.assert_array_equal(labels, [[0.75, 0.25], [0.5, 0.5]])

    def test_a_failed_call_resumes(self, teacher, x, probabilities, tmp_path):
        def fails(batch):
            if batch[0, 0] > 200:
                raise TimeoutError("busy")
            return teacher(batch)

        options = {"teacher_name": "t", "batch_size": 7}
        with pytest.raises(RuntimeError, match=r"busy.* 105 rows are stored"):
            write(fails, x, tmp_path / "a", **options)
        with pytest.raises(ValueError, match="unfinished"):
            SoftLabels.open(tmp_path / "a")
        labels = write(teacher, x, tmp_path / "a", **options)
        assert teacher.rows == 300  # each example was asked for once
        np.testing.assert_allclose(labels, probabilities, HALF, 6e-8)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"teacher_name": "other"}, "teacher"),
            ({"class_names": list("abdc")}, "class_names"),
            ({"dtype": "float32"}, "dtype"),
            ({"top_k": 2}, "top_k"),
            ({"from_logits": True}, "from_logits"),
            ({"inputs": slice(None, None, -1)}, "are in another order"),
            ({"inputs": slice(0, 200)}, "lack .* stored examples"),
        ],
    )
    @pytest.mark.parametrize("complete", [True, False])
    def test_another_call_is_refused(
        self, teacher, x, tmp_path, change, message, complete
    ):
        options = {"teacher_name": "t", "class_names": list("abcd")}
        if complete:
            write(teacher, x, tmp_path / "a", **options)
        else:
            answers = iter([teacher(x[:250])])
            with pytest.raises(RuntimeError):
                write(
                    lambda _: next(answers),
                    x,
                    tmp_path / "a",
                    batch_size=250,
                    **options,
                )
        teacher.rows = 0
        options |= {n: v for n, v in change.items() if n != "inputs"}
        some = x[change.get("inputs", slice(None))]
        with pytest.raises(ValueError, match=message):
            write(teacher, some, tmp_path / "a", **options)
        assert teacher.rows == 0

    def test_a_store_without_inputs_is_not_resumed(self, teacher, x, tmp_path):
        path, options = tmp_path / "a", {"teacher_name": "t"}
        SoftLabels.from_array([[0.5, 0.5]], path, **options)
        with pytest.raises(ValueError, match="another has_fingerprints"):
            write(teacher, x, path, **options)

    def test_overwrite(self, teacher, x, tmp_path):
        write(teacher, x, tmp_path / "a")
        labels = write(teacher, x[:5], tmp_path / "a", overwrite=True)
        assert len(labels) == 5

    def test_other_files_are_left_alone(self, teacher, x, tmp_path):
        (tmp_path / "thesis.tex").write_text("a")
        with pytest.raises(ValueError, match="thesis.tex"):
            write(teacher, x, tmp_path, overwrite=True)
        assert (tmp_path / "thesis.tex").exists()

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            ([[2.0, -1.0]], "from_logits=True"),
            ([[80.0, 20.0]], "divide percentages by 100"),
            ([[np.nan, 0.5]], "probabilities"),
            ([[0.5, 0.5]] * 2, "row for each of 1"),
            (np.ma.masked_invalid([[0.5, np.nan]]), "mask"),
            (np.full((1, 10**6), 1e-6), "float32"),
            ([["a", "b"]], "numbers"),
        ],
    )
    def test_bad_outputs_are_refused(self, tmp_path, outputs, message):
        with pytest.raises(ValueError, match=message):
            write(lambda _: outputs, np.zeros(1), tmp_path / "a")


class TestModel:
    def test_a_model_is_known_again(self, models, x, tmp_path):
        """By its weights, not by its layers' names, which count up."""
        labels = write(models[0], x / 600, tmp_path / "a")
        right = models[0].predict(x / 600, verbose=0)
        np.testing.assert_allclose(labels, right, 1e-3)
        write(models[1], x / 600, tmp_path / "a")

    def test_another_model_is_refused(self, models, x, tmp_path):
        write(models[0], x, tmp_path / "a")
        with pytest.raises(ValueError, match="another teacher"):
            write(models[2], x, tmp_path / "a")  # the same weights
        models[1].layers[-1].bias.assign([0.0, 0.0, 0.0, 1.0])
        with pytest.raises(ValueError, match="another teacher"):
            write(models[1], x, tmp_path / "a")

    def test_the_likeliest_of_a_model(self, models, x, tmp_path):
        labels = write(models[0], x / 600, tmp_path / "a", top_k=2)
        full = models[0].predict(x / 600, verbose=0)
        check_likeliest(labels.read(), full)


def check_likeliest(events, full):
    """Compare events with the full distribution, by sorting."""
    k = events.shape[-2] - 1
    order = np.argsort(-full, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(events[..., :k, 0], order)
    top = np.take_along_axis(full, order, -1)
    np.testing.assert_allclose(np.exp(events[..., :k, 1]), top, 4e-3)
    assert (events[..., k, 0] == -1).all()
    rest = 1 - top.sum(-1)
    np.testing.assert_allclose(np.exp(events[..., k, 1]), rest, 8e-3, 1e-6)


class TestTopK:
    def test_rows(self, teacher, x, probabilities, tmp_path):
        labels = write(teacher, x, tmp_path / "a", top_k=3)
        assert labels.shape == (300, 4, 2)
        check_likeliest(labels.read(), probabilities)

    def test_the_rest_keeps_its_digits(self):
        """`1 - sum` in float32 would be 0 or 6e-8."""
        logits = np.array([[30.0, 1.0, 0.0, 0.0]])
        labels = SoftLabels.from_array(
            logits, from_logits=True, top_k=1, dtype="float32"
        )
        right = np.log(np.exp([1.0, 0, 0]).sum()) - 30
        assert labels.read()[0, 1, 1] == pytest.approx(right, rel=1e-6)

    def test_ties(self):
        labels = SoftLabels.from_array([[0.25] * 4], top_k=2)
        np.testing.assert_allclose(np.exp(labels.read()[0, 2, 1]), 0.5, 1e-3)

    def test_a_teacher_of_the_likeliest(self, tmp_path):
        events = [[[7, np.log(0.5)], [2, np.log(0.3)], [-1, np.log(0.2)]]]
        labels = write(lambda _: events, ["a text"], tmp_path / "a")
        np.testing.assert_allclose(labels.read(), events, 1e-3)

    def test_k_must_not_change(self, tmp_path):
        answers = iter([[[[1, 0.0]]], [[[1, -0.7], [2, -0.7]]]])
        with pytest.raises(ValueError, match="another top_k, 1"):
            write(lambda _: next(answers), [0, 1], tmp_path / "a", batch_size=1)

    def test_what_is_missing_is_computed_and_filled(self):
        log_probs = np.log([[1.0, 0.75], [0.5, 0.25]])
        events = np.stack([[[-2, 4], [3, 1]], log_probs], axis=-1)
        found = SoftLabels.from_array(events).read()
        np.testing.assert_array_equal(found[..., 0], [[4, -2, -1], [3, 1, -1]])
        np.testing.assert_allclose(np.exp(found[:, 2, 1]), [0.25, 0.25], 1e-3)

    @pytest.mark.parametrize(
        ("ids", "probs", "message"),
        [
            ([1, 1], [0.5, 0.5], "all differ"),
            ([1, 9], [0.5, 0.5], "from 0 to 4"),
            ([-1, 1], [0.5, 0.5], "from 0 to 4"),
            ([1, 0.5], [0.5, 0.5], "from 0 to 4"),
            ([1, 2], [0.9, 0.9], "sum to 1"),
            ([1, 2], [0.9, np.nan], "sum to 1"),
        ],
    )
    def test_bad_entries_are_refused(self, ids, probs, message):
        events = np.stack([ids, np.log(probs)], axis=-1)
        with pytest.raises(ValueError, match=message):
            SoftLabels.from_array([events], class_names=list("abcde"))


class TestTokens:
    def test_positions_of_tokens_are_stored(self, full, tokens, tmp_path):
        labels = write(lambda _: full, tokens, tmp_path / "a", top_k=2)
        assert labels.shape == (3, None, 3, 2)
        found = labels.read([2, 0, 1])
        assert found.shape == (3, 5, 3, 2)
        check_likeliest(found[0], full[2])
        check_likeliest(found[1, :3], full[0, :3])
        check_likeliest(found[2, :3], full[1, 2:])
        assert (found[1, 3:, :, 0] == -2).all()

    def test_sequences_are_found_whatever_their_padding(
        self, full, tokens, tmp_path
    ):
        labels = write(lambda _: full, tokens, tmp_path / "a", top_k=2)
        lists = [[10, 11, 12, 13, 14], [7, 8, 9], [0, 1, 2]]
        np.testing.assert_array_equal(labels.find(lists), [2, 1, 0])

    def test_positions_without_weight_are_not_stored(self, full, tmp_path):
        ids = np.arange(15).reshape(3, 5)
        weight = np.array([[0, 0, 1, 1, 0], [1] * 5, [0] * 5], "float32")

        class Data(keras.utils.PyDataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                return ids, ids, weight

        labels = write(lambda _: full, Data(), tmp_path / "a", top_k=2)
        found = labels.read()
        np.testing.assert_array_equal(found[..., 0, 0] != -2, weight)
        check_likeliest(found[0, 2:4], full[0, 2:4])

    def test_lists_of_arrays(self, full):
        """The import of answers ends in this."""
        order = np.argsort(-full, axis=-1)[..., :2]
        top = np.log(np.take_along_axis(full, order, -1))
        events = np.stack([order, top], axis=-1)
        labels = SoftLabels.from_array(
            [events[0, :2], events[1]], inputs=[[3, 4], [1, 2, 3, 4, 5]]
        )
        check_likeliest(labels.read([1])[0], full[1])
        check_likeliest(labels.read([0])[0], full[0, :2])

    def test_wrong_lengths_are_refused(self):
        with pytest.raises(ValueError, match="1 positions for the 2 tokens"):
            SoftLabels.from_array([[[[1, -0.1]]]], inputs=[[3, 4]])

    def test_without_top_k_the_error_says_so(self, full, tokens, tmp_path):
        with pytest.raises(ValueError, match="top_k"):
            write(lambda _: full, tokens, tmp_path / "a")


class TestFromArray:
    def test_in_memory(self, probabilities, x):
        labels = SoftLabels.from_array(probabilities, inputs=x)
        np.testing.assert_allclose(labels, probabilities, HALF, 6e-8)
        again = pickle.loads(pickle.dumps(labels))
        np.testing.assert_array_equal(again, labels)

    def test_the_same_call_again(self, probabilities, x, tmp_path):
        for _ in range(2):
            SoftLabels.from_array(probabilities, tmp_path / "a", inputs=x)
        assert [f.name for f in tmp_path.iterdir()] == ["a"]

    def test_another_store_is_refused(self, probabilities, x, tmp_path):
        path = tmp_path / "a"
        SoftLabels.from_array(probabilities, path, teacher_name="one")
        with pytest.raises(ValueError, match="of the teacher 'one'"):
            SoftLabels.from_array(probabilities[:9], path)
        assert list(tmp_path.iterdir()) == [path]  # nothing to clear up
        labels = SoftLabels.from_array(probabilities[:9], path, overwrite=True)
        assert len(labels) == 9

    def test_a_bad_row_leaves_nothing(self, tmp_path):
        rows = np.tile([0.5, 0.5], (CHUNK + 1, 1))
        rows[-1] = 2.0
        with pytest.raises(ValueError, match="sum"):
            SoftLabels.from_array(rows, tmp_path / "a")
        assert not list(tmp_path.iterdir())

    def test_lengths_must_agree(self, probabilities, x):
        with pytest.raises(ValueError, match="`inputs` .* 300 rows"):
            SoftLabels.from_array(probabilities, inputs=x[1:])
        with pytest.raises(ValueError, match="`ids` .* 300 rows"):
            SoftLabels.from_array(probabilities, ids=["a"])

    @pytest.mark.ci
    def test_a_memory_map_is_read_in_parts(self, tmp_path):
        import tracemalloc

        table = np.full((20_000, 500), 0.002, "float32")
        np.save(tmp_path / "table.npy", table)
        values = np.load(tmp_path / "table.npy", mmap_mode="r")
        tracemalloc.start()
        SoftLabels.from_array(
            values, tmp_path / "a", inputs=np.arange(20_000), dtype="float32"
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * table.nbytes

    def test_class_names_must_fit(self):
        with pytest.raises(ValueError, match="3 class_names for 2 classes"):
            SoftLabels.from_array([[0.5, 0.5]], class_names=list("abc"))
        with pytest.raises(ValueError, match="unique names"):
            SoftLabels.from_array([[0.5, 0.5]], class_names=["a", "a"])


class TestRead:
    def test_any_order(self, several_files):
        rows, labels = several_files
        index = np.random.default_rng(0).integers(0, 300, 1000)
        np.testing.assert_array_equal(labels.read(index), rows[index])
        np.testing.assert_array_equal(labels.read([]), rows[:0])
        np.testing.assert_array_equal(
            labels.read(slice(250, 5, -7)), rows[250:5:-7]
        )

    def test_outside_is_refused(self, several_files):
        for index in ([300], [-1], 3, [0.5]):
            with pytest.raises(ValueError, match="indices"):
                several_files[1].read(index)

    def test_pickle(self, several_files):
        again = pickle.loads(pickle.dumps(several_files[1]))
        np.testing.assert_array_equal(again, several_files[1])

    def test_classes_are_checked(self, probabilities, tmp_path):
        SoftLabels.from_array(
            probabilities, tmp_path / "a", class_names=list("abcd")
        )
        SoftLabels.open(tmp_path / "a", class_names=list("abcd"))
        with pytest.raises(ValueError, match="class_names"):
            SoftLabels.open(tmp_path / "a", class_names=list("abdc"))

    def test_there_is_no_store(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no soft labels"):
            SoftLabels.open(tmp_path / "a")


class TestFind:
    def test_by_inputs_and_by_ids(self, probabilities, x, tmp_path):
        names = [f"n{i}" for i in range(300)]
        labels = SoftLabels.from_array(probabilities, inputs=x, ids=names)
        index = np.random.default_rng(0).permutation(300)[:50]
        np.testing.assert_array_equal(labels.find(x[index]), index)
        found = labels.find(ids=[names[i] for i in index])
        np.testing.assert_array_equal(found, index)

    def test_what_is_not_stored_is_refused(self, probabilities, x):
        labels = SoftLabels.from_array(probabilities, inputs=x)
        changed = x.copy()
        changed[7] += 1
        with pytest.raises(ValueError, match="1 of 300 .* position 7"):
            labels.find(changed)
        with pytest.raises(ValueError, match="stored without ids"):
            labels.find(ids=["a"])
        labels = SoftLabels.from_array(probabilities[:1], ids=["a"])
        with pytest.raises(ValueError, match="stored without inputs"):
            labels.find(x[:1])
        with pytest.raises(ValueError, match="1 of 1 .* position 0: 'b'"):
            labels.find(ids=["b"])

    def test_of_the_same_text_the_first_row_counts(self, tmp_path):
        answers = iter([[[0.9, 0.1]], [[0.897, 0.103]], [[0.5, 0.5]]])
        x = np.array([1.0, 1.0, 2.0])
        labels = write(lambda _: next(answers), x, tmp_path / "a", batch_size=1)
        labels.to_parquet(tmp_path / "a.parquet")
        again = SoftLabels.from_parquet(tmp_path / "a.parquet")
        found = again.attach(x)[0][1]
        np.testing.assert_allclose(found[:, 0], [0.9, 0.9, 0.5], 1e-3)


class TestJoin:
    def test_parts(self, teacher, x, probabilities, tmp_path):
        parts = [tmp_path / f"part-{i}" for i in range(3)]
        for part, some in zip(parts, np.split(x, 3), strict=True):
            write(teacher, some, part)
        labels = SoftLabels.join(parts, tmp_path / "a")
        np.testing.assert_allclose(labels, probabilities, HALF, 6e-8)
        np.testing.assert_array_equal(labels.find(x), np.arange(300))

    def test_parts_of_two_teachers_are_refused(self, teacher, x, tmp_path):
        write(teacher, x[:9], tmp_path / "1", teacher_name="one")
        write(teacher, x[9:], tmp_path / "2", teacher_name="two")
        with pytest.raises(ValueError, match="another teacher"):
            SoftLabels.join([tmp_path / "1", tmp_path / "2"], tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        SoftLabels.from_array([[0.5, 0.5]])
