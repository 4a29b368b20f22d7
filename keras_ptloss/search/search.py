"""The search for a teacher's correction on a few labelled examples."""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import scipy.optimize
import scipy.stats
from threadpoolctl import threadpool_limits

from keras_ptloss._progress import Progress
from keras_ptloss._validation import check_choice, check_count, fail
from keras_ptloss.search.gradient_search import GradientSearch
from keras_ptloss.search.labelled import read_labelled
from keras_ptloss.search.method import Examples, Found, SearchMethod
from keras_ptloss.search.random_search import RandomSearch
from keras_ptloss.search.result import SearchResult, summarize
from keras_ptloss.search.ridge import RidgeSearch

METHODS = {
    "ridge": RidgeSearch,
    "random": RandomSearch,
    "gradient": GradientSearch,
}


class ProxyTeacherSearch:
    """Find the correction of a teacher on a few labelled examples.

    The search compares the teacher's probabilities with the labels of about 15
    to 1,000 examples. It first corrects the confidence, by a temperature and
    the paper's epsilon, and then confusions and biases between classes. If no
    correction improves the teacher on held-out labels, the teacher is left
    unchanged. The data used to distil a student needs no labels.

    The teacher must not have been trained on the labelled examples: a teacher
    looks better on its own training data than on new data.

    Args:
        method: `"ridge"`, or `RidgeSearch(...)`, the default; `"random"`, or
            `RandomSearch(...)`, the paper's Algorithm 1; `"gradient"`, or
            `GradientSearch(...)`, for coefficients of any order.
        seed: random seed of folds and draws.

    Raises:
        ValueError: if an argument is invalid.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> teacher_probs = truth * [1.0, 0.2, 0.2]  # biased to class 0
        >>> teacher_probs /= teacher_probs.sum(axis=1, keepdims=True)
        >>> result = ProxyTeacherSearch().search(teacher_probs, labels)
        >>> result.score < result.baseline_score
        True
        >>> targets = result.correct(teacher_probs)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.
    """

    def __init__(
        self,
        method: Literal["ridge", "random", "gradient"] | SearchMethod = "ridge",
        *,
        seed: int = 0,
    ) -> None:
        if isinstance(method, str):
            check_choice("method", method, METHODS)
            method = METHODS[method]()
        if isinstance(method, type) or not isinstance(method, SearchMethod):
            fail("method", "a search, such as RandomSearch()", method)
        self.method = method
        self.seed = check_count("seed", seed, at_least=0)

    def search(
        self,
        teacher: Any,
        labels: Any,
        *,
        inputs: Any = None,
        sample_weight: Any = None,
        from_logits: bool | Sequence[bool | None] | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        ignore_class: int | None = None,
        random_sample: bool = False,
        verbose: Literal["auto"] | int = "auto",
    ) -> SearchResult:
        """Search on labelled examples that the teacher was not trained on.

        Args:
            teacher: teacher outputs, `(N, ..., C)`, or `(N, ..., 1)` for a
                sigmoid head; `SoftLabels`; or a Keras model, which is called on
                `inputs`. For several teachers, pass a list of any of these.
            labels: true classes, integers, `(N, ...)`. If all teachers are
                Keras models, this can also be a data set of `(inputs, labels)`
                or `(inputs, labels, sample_weight)`, which is read once.
            inputs: the labelled examples, as arrays, for Keras models.
            sample_weight: weights, `(N, ...)` or `(N,)`, if the labelled
                examples are not a random sample of the data. Examples of weight
                0 are left out.
            from_logits: whether the teacher gives logits. Pass one flag for all
                teachers, or one per teacher. None means probabilities, except
                for stored outputs with an attribute `from_logits`.
            num_classes: the number of classes C of the student and the labels.
                It is needed only if a teacher has other classes.
            class_names: names of the classes, for the summary.
            ignore_class: the label of examples or positions to leave out, as in
                `keras.losses.SparseCategoricalCrossentropy`. The teacher's
                outputs for them are ignored.
            random_sample: whether the labels are a random sample of the data,
                so that a class without a label must be rare. By default, only
                temperature and epsilon change such classes; a correction
                between classes keeps the teacher's probabilities for them.
            verbose: 1 shows a progress bar, 0 does not; "auto" shows it if the
                search takes more than two seconds.

        Returns:
            A `SearchResult`.

        Raises:
            ValueError: if an argument is invalid.

        Warns:
            UserWarning: if something may be wrong with the teacher or the
                labels. The same texts are in `SearchResult.notes`.
        """
        begin = time.perf_counter()
        examples, flags = read_labelled(
            teacher,
            labels,
            inputs=inputs,
            sample_weight=sample_weight,
            from_logits=from_logits,
            num_classes=num_classes,
            ignore_class=ignore_class,
            random_sample=random_sample,
            seed=self.seed,
            verbose=verbose,
        )
        number = examples.num_classes
        names = tuple(
            map(str, range(number) if class_names is None else class_names)
        )
        if len(names) != number or isinstance(class_names, str):
            fail("class_names", f"one name for each of {number} classes", names)
        progress = Progress(
            f"Searching for a correction, with {len(examples.labels)} labels",
            None,
            unit="trial",
            verbose=verbose,
        )
        # The matrices are so small that BLAS is faster without threads.
        with threadpool_limits(limits=1, user_api="blas"):
            found = self.method.run(examples, progress.update)
        progress.close()
        correction = dataclasses.replace(found.correction, from_logits=flags)
        notes = (
            *_notes_on_permuted_classes(examples, names),
            *_notes_on_balanced_labels(examples, sample_weight is not None),
            *_notes_on_absent_classes(examples, found, names),
            *found.notes,
        )
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return SearchResult(
            correction=correction,
            method=self.method.name,
            trials=found.trials,
            notes=notes,
            class_names=names,
            seconds=time.perf_counter() - begin,
            **summarize(examples, found),
        )


def _notes_on_permuted_classes(
    examples: Examples, class_names: Sequence[str]
) -> Iterator[str]:
    """Yield a note on each teacher whose classes seem to be permuted.

    The best permutation is the one that makes the most answers right. It is
    reported if it makes more answers right than the identity, by 20 % of the
    examples plus the C answers that a permutation can explain by chance, and if
    more than half of the answers are then right.
    """
    classes, number = examples.num_classes, len(examples.labels)
    for k, t in enumerate(examples.teacher_probs):
        if t.shape[1] != classes:
            continue
        counts = np.zeros((classes, classes))
        np.add.at(counts, (t.argmax(axis=1), examples.labels), 1.0)
        given, true = scipy.optimize.linear_sum_assignment(-counts)
        right = np.trace(counts) / number
        permuted = counts[given, true].sum() / number
        if permuted - right - classes / number <= 0.2 or permuted <= 0.5:
            continue
        moved = [
            f"{class_names[a]} is {class_names[b]}"
            for a, b in zip(given, true, strict=True)
            if a != b and counts[a, b]
        ]
        one = len(examples.teacher_probs) == 1
        yield (
            f"The classes of the {'teacher' if one else f'teacher {k}'} seem "
            f"permuted: {100 * right:.0f} % of its answers are right, but "
            f"{100 * permuted:.0f} % would be right if its class "
            f"{_first(moved)}. Check the order of the classes."
        )


def _notes_on_balanced_labels(
    examples: Examples, weighted: bool
) -> Iterator[str]:
    """Yield a note if the labels seem to have been balanced by class.

    They seem so if the counts of the labels are more even than in 95 % of
    random samples from balanced data, although the teacher's mean probabilities
    are more uneven than chance can explain.
    """
    classes, number = examples.num_classes, len(examples.labels)
    shares = [
        t.mean(axis=0) for t in examples.teacher_probs if t.shape[1] == classes
    ]
    if weighted or not shares:
        return
    counts = np.bincount(examples.labels, minlength=classes)
    expected = number / classes
    # One half is added, because counts are integers.
    distance = np.sum((np.abs(counts - expected) + 0.5) ** 2) / expected
    of_teacher = np.sum((number * np.mean(shares, axis=0) - expected) ** 2)
    chi2 = scipy.stats.chi2(classes - 1)
    if chi2.cdf(distance) <= 0.05 and chi2.sf(of_teacher / expected) <= 0.01:
        yield (
            f"The labels look balanced by class ({counts.min()} to "
            f"{counts.max()} per class), but the teacher predicts unbalanced "
            "classes. If the labels are not a random sample of the data, pass "
            "sample_weight: each example's weight is the share of its class in "
            "the data, divided by the share of its class in the labels."
        )


def _notes_on_absent_classes(
    examples: Examples, found: Found, class_names: Sequence[str]
) -> Iterator[str]:
    """Yield a note on the classes that have no label."""
    absent = np.setdiff1d(np.arange(examples.num_classes), examples.labels)
    shares = [
        t[:, absent].sum(axis=1).mean()
        for t in examples.teacher_probs
        if t.shape[1] == examples.num_classes
    ]
    if not len(absent) or not shares or examples.random_sample:
        return
    correction = found.correction
    kept = (
        correction.kept_classes
        or correction.is_identity
        or found.chosen.startswith("teacher")
    )
    effect = (
        "keep the teacher's probabilities"
        if kept
        else "change only in confidence"
    )
    yield (
        f"{len(absent)} of {examples.num_classes} classes have no label and "
        f"{effect} ({_first([class_names[c] for c in absent])}; together "
        f"{100 * np.mean(shares):.1f} % of the teacher's mean probabilities). "
        "If the labels are a random sample of the data, pass "
        "random_sample=True."
    )


def _first(names: list[str]) -> str:
    """Return the first ten names."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
