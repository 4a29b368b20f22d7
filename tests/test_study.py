"""The study's harness on small tasks of the real ones' form."""

import csv
import functools
import pathlib
import sys

import helpers
import keras
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.quality import choice, doubly_robust, rivals
from benchmarks.quality.study import __main__ as command
from benchmarks.quality.study import harness, methods, report, tasks

few_rows = pytest.mark.filterwarnings("ignore:.*few.*:UserWarning")


def student():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


@pytest.fixture
def task():
    """Three classes; a teacher that favours the first; the truth is known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(180, 4)).astype("float32")
    truth = np.exp(2.0 * x[:, :3])
    truth /= truth.sum(axis=1, keepdims=True)
    labels = helpers.draw_labels(truth, seed=1)
    teacher = helpers.skewed(truth, [1.0, 0.3, 0.3]).astype("float32")
    rows = harness.Rows(x, labels, teacher)
    distill = slice(60, 124)
    return harness.Task(
        name="small",
        search=rows.take(slice(60)),
        distill=rows.take(distill),
        test=rows.take(slice(124, None)),
        other_tests={"test_other": rows.take(slice(60))},
        make_student=student,
        make_optimizer=lambda steps: keras.optimizers.Adam(0.01),
        epochs=2,
        batch_size=32,
        teachers={
            "filtered": teacher[distill],
            "early-stopped": teacher[distill],
        },
        truth=truth[distill],
        labelled=True,
    )


def named(*names):
    return [m for m in methods.all_methods(order=1) if m.name in names]


class TestHarness:
    @helpers.slow_beyond("jax")
    @few_rows
    def test_every_method_runs(self, task, tmp_path):
        chosen = [
            m
            for m in methods.all_methods(order=1)
            if not m.name.startswith("proxy") or m.name == "proxy 0"
        ]
        assert all(method.fits(task) for method in chosen)
        harness.run(task, chosen, 1, tmp_path / "study_small.csv")
        rows = harness.read(tmp_path / "study_small.csv")
        assert len(rows) == sum(len(m.settings) for m in chosen)
        for row in rows:
            assert 0.0 < float(row["accuracy_last"]) < 1.0
            assert "test_other 0." in row["note"]

    def test_stopped_study_goes_on(self, task, tmp_path, capsys):
        path = tmp_path / "study_small.csv"
        pair = named("KL", "temperature scaling")
        harness.run(task, pair, 2, path)
        whole = harness.read(path)
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:-2]) + "\n")
        capsys.readouterr()
        harness.run(task, pair, 2, path)
        assert len(capsys.readouterr().out.splitlines()) == 2

        def without_times(rows):
            return [
                {k: v for k, v in r.items() if "seconds" not in k} for r in rows
            ]

        # The seed alone decides: the second time they are the same.
        assert without_times(harness.read(path)) == without_times(whole)

    def test_setting_is_chosen_on_the_validation_rows(self, task, tmp_path):
        path = tmp_path / "study_small.csv"
        (smoothing,) = named("label smoothing")
        harness.run(task, [smoothing], 2, path)
        rows = harness.read(path)
        first, second = rows[:3], rows[3:]
        best = max(first, key=lambda row: float(row["validation_best"]))
        assert [row["setting"] for row in second] == [best["setting"]]

    def test_best_epoch(self, task):
        training = named("KL")[0].prepare(task, None, 0)
        model, best = harness.train(task, training, seed=0)
        model.set_weights(best.weights)
        logits = harness.predict(model, task.search.x)
        right = np.mean(logits.argmax(axis=1) == task.search.labels)
        assert best.accuracy == pytest.approx(right)

    def test_labels_of_the_mix_have_their_share(self, task):
        training = methods.hard_label_mix(task, 0.3, 0)
        few = len(task.search.labels)
        share = training.weights[:few].sum() / training.weights.sum()
        assert share == pytest.approx(0.3)

    @few_rows
    @pytest.mark.filterwarnings("ignore:.*worse than a constant:UserWarning")
    def test_doubly_robust_is_the_labels_at_few_of_all(self, task):
        few, many = len(task.search.labels), len(task.distill.labels)
        strength = few / (few + many)
        method = doubly_robust.doubly_robust(strength, 1, in_sample=True)
        targets = method.prepare(task, None, 0).targets
        labels = methods.one_hot(task.search.labels, 3)
        np.testing.assert_allclose(targets[:few], labels, atol=1e-6)
        np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-5)


class TestReport:
    def rows(self, method, accuracies, note=""):
        return [
            {name: "0.5" for name in harness.COLUMNS}
            | {
                "method": method,
                "setting": "",
                "seed": str(seed),
                "accuracy_last": str(value),
                "accuracy_best": str(value),
                "note": note,
            }
            for seed, value in enumerate(accuracies)
        ]

    def test_table(self, tmp_path):
        path = tmp_path / "study_small.csv"
        rows = [
            *self.rows("KL", [0.50, 0.52, 0.51]),
            *self.rows("vector scaling", [0.60, 0.62, 0.615], "found"),
            *self.rows("searched", [0.51, 0.51, 0.51]),
            *self.rows("true labels on all", [0.70, 0.72, 0.71]),
        ]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, harness.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        report.write("small", path, methods.all_methods())
        text = path.with_suffix(".md").read_text()
        assert r"| KL | - | 3 | 51.00 ± 1.00 | 51.00 ± 1.00 | 0 |" in text
        assert r"| vector scaling | - | 3 | 61.17 ± 1.04 \*\* |" in text
        assert r"| searched | - | 3 | 51.00 ± 0.00 | 51.00 ± 0.00 | 0 |" in text
        assert "* vector scaling, seed 0, 1, 2: found" in text
        assert "KL +0.00 (p = 1.0000)" in text

    def test_share_of_the_way(self):
        """Over common seeds: (0.65 - 0.55) / (0.75 - 0.55)."""
        kl = self.rows("KL", [0.5, 0.6])
        ceiling = self.rows("true", [0.7, 0.8, 0.1])
        own = self.rows("own", [0.6, 0.7, 0.9])
        assert report.share_of_the_way(own, kl, ceiling) == "50"
        assert report.share_of_the_way(own, kl, []) == "-"
        # True labels that bring nothing are no aim.
        assert report.share_of_the_way(own, kl, kl) == "-"

    def test_paired_is_scipys(self):
        first = self.rows("a", [0.3, 0.5, 0.4])
        second = self.rows("b", [0.1, 0.2, 0.4])
        scipy_stats = pytest.importorskip("scipy.stats")
        difference, p = report.paired(first, second, "accuracy_last")
        expected = scipy_stats.ttest_rel([0.3, 0.5, 0.4], [0.1, 0.2, 0.4])
        assert difference == pytest.approx(0.5 / 3)
        assert p == pytest.approx(expected.pvalue)
        assert report.paired(first, first, "accuracy_last") is None


class TestRivals:
    """On 2,000 rows of a truth that is known."""

    @pytest.fixture
    def truth(self):
        return helpers.dirichlet(0, rows=2000, classes=3)

    @pytest.fixture
    def labels(self, truth):
        return helpers.draw_labels(truth, seed=1)

    def test_gold_loss_correction_inverts_its_model(self, truth, labels):
        """A teacher that is the truth through a known confusion."""
        one_hot = np.eye(3)[labels]
        confusion = np.array([[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0, 0.3, 0.7]])
        found = rivals.gold_loss_correction(
            one_hot @ confusion, labels, truth @ confusion, 0
        )
        np.testing.assert_allclose(found, truth, atol=0.02)

    def test_confusion_matrix(self, labels):
        """Of a teacher that names one class: the labels behind the name."""
        named = np.eye(3)[np.minimum(labels, 1)]
        found = rivals.confusion_matrix(named, labels, np.eye(3)[:2], 0)
        share = np.mean(labels[labels > 0] == 2)
        expected = [[1.0, 0.0, 0.0], [0.0, 1.0 - share, share]]
        np.testing.assert_allclose(found, expected)

    def test_dirichlet_undoes_a_linear_map(self, truth, labels):
        w = np.array([[1.5, 0.3, 0.0], [0.0, 0.7, 0.0], [0.2, 0.0, 1.0]])
        teacher = harness.softmax(np.log(truth) @ w.T + [1.0, 0.0, 0.0])
        found = rivals.dirichlet(teacher, labels, teacher, 0)
        distance = np.abs(found - truth).sum(axis=1).mean()
        assert distance < 0.2 * np.abs(teacher - truth).sum(axis=1).mean()


class TestChoice:
    @pytest.mark.parametrize("classes", [2, 10])
    def test_nearly_perfect(self, classes):
        rows, labels = choice.synthetic("nearly perfect", classes, seed=0)
        right = np.mean(rows.argmax(axis=1) == labels)
        assert right == pytest.approx(0.985, abs=0.002)
        # Calibrated: as often right as it says.
        assert right == pytest.approx(rows.max(axis=1).mean(), abs=0.005)

    def test_stratified_folds(self):
        labels = np.repeat([0, 1, 2], 10)
        fold = choice.stratified_folds(labels, 5, seed=0)
        counts = np.zeros((3, 5))
        np.add.at(counts, (labels, fold), 1)
        assert np.all(counts == 2)

    def test_rules(self):
        """Matrix scaling is far better: all choose it but those that cannot."""
        rows, labels = choice.synthetic("confused", 3, seed=0)
        case = choice.run_case("confused", rows, labels, 300, seed=0)
        for name, rule in choice.RULES.items():
            best, simple = choice.regrets([case], rule, "random")
            assert (best[0] < 30.0) == (name != "always temperature")
            assert best[0] >= 0.0
            assert simple[0] < 0.001


class TestTasks:
    def test_gaussians(self):
        data = tasks.gaussians(seed=1)
        for name, count in (
            ("train", 5000),
            ("validation", 5000),
            ("test", 90_000),
        ):
            x, labels, truth = data[name]
            assert x.shape == (count, 30)
            np.testing.assert_allclose(truth.sum(axis=1), 1.0)
            # The frequencies of the classes given x are p(class | x).
            np.testing.assert_allclose(
                truth.mean(axis=0),
                np.bincount(labels, minlength=3) / count,
                atol=0.02,
            )
        x, labels, truth = data["test"]
        bayes = np.mean(truth.argmax(axis=1) == labels)
        assert bayes == pytest.approx(truth.max(axis=1).mean(), abs=0.005)

    @helpers.slow_beyond("jax")
    @few_rows
    def test_cifar100_of_a_file(self, tmp_path, monkeypatch):
        """As from TensorFlow Datasets; the teacher is trained once."""
        monkeypatch.chdir(tmp_path)
        rng = np.random.default_rng(0)
        arrays = {}
        for part, count in (("train", 160), ("test", 40)):
            images = rng.integers(0, 256, (count, 32, 32, 3))
            arrays[f"x_{part}"] = images.astype("uint8")
            arrays[f"y_{part}"] = np.arange(count) % 100
        np.savez("images.npz", **arrays)
        make = functools.partial(
            tasks.cifar100,
            "cifar100",
            data=tmp_path / "images.npz",
            model="resnet8",
            epochs=1,
        )
        task = make()
        again = make()
        np.testing.assert_array_equal(
            task.distill.teacher, again.distill.teacher
        )
        assert task.classes == 100
        assert len(task.search.labels) == 16
        assert len(task.distill.labels) == 144
        row = harness.run_one(task, named("KL")[0], None, 0)
        assert 0.0 <= float(row["accuracy_last"]) <= 1.0

    @helpers.slow_beyond("tensorflow")
    @few_rows
    def test_pairs_of_texts(self, tmp_path, monkeypatch):
        """MNLI from files: two test sets, a teacher that is trained."""
        pytest.importorskip("keras_hub")
        monkeypatch.chdir(tmp_path)
        preset = helpers.save_tiny_bert(tmp_path / "preset")
        files = ("train", "test_matched", "test_mismatched")
        data = helpers.write_tsv(tmp_path / "data", files, 3, columns=2)
        task = tasks.text(
            "mnli",
            task="mnli",
            data=data,
            teacher=str(preset),
            student=str(preset),
            epochs=1,
            train_tokens=12,
            distill_rows=64,
        )
        assert task.classes == 3
        assert len(task.distill.labels) == 64
        row = harness.run_one(task, named("KL")[0], None, 0)
        assert row["note"].startswith("test_mismatched 0.")
        assert (tmp_path / "study-cache" / "mnli_teacher.npz").exists()


class TestCommand:
    def test_wrong(self, tmp_path, capsys):
        for arguments, message in (
            (["moons"], "invalid choice: 'moons'"),
            (["gaussian", "--seeds", "0"], "--seeds must be at least 1"),
            (
                ["gaussian", "--report", "--output", str(tmp_path)],
                "no rows in",
            ),
        ):
            with pytest.raises(SystemExit):
                command.main(arguments)
            assert message in capsys.readouterr().err
        with pytest.raises(ValueError, match="Received: 'magic'"):
            command.main(["gaussian", "--methods", "magic"])
