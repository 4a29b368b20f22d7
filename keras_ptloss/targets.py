"""Training targets for a student, made from a teacher and some labels."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import scipy.special

from keras_ptloss import _math
from keras_ptloss._backend import no_retracing_warning
from keras_ptloss._progress import (
    Epochs,
    Progress,
    Verbose,
    predict,
    track,
)
from keras_ptloss.search import ProxyTeacherSearch, SearchResult

__all__ = ["DistillationTargets", "distillation_targets"]

TEACHER = "teacher as it is"
CORRECTED = "teacher, corrected"
LABELS_ONLY = "labels-only model, corrected"
BOTH = "teacher and labels-only model, corrected"

FOLDS = 5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DistillationTargets:
    """What `distillation_targets` returns.

    Attributes:
        values: the student's targets, probabilities `(N, C)` in float32.
            Labelled rows are one-hot.
        sample_weight: `(N,)`, float32: `label_weight` for labelled rows, 1 for
            the others.
        chosen: the name of the candidate with the lowest score.
        averaged: the names of the candidates that `values` were computed from:
            the chosen candidate and those within one standard error of it.
        scores: the out-of-fold NLL of each candidate on the labelled rows.
        result: the search result of the chosen candidate.
        model: the labels-only model, trained on all labelled examples, or None.
    """

    values: np.ndarray
    sample_weight: np.ndarray
    chosen: str
    averaged: tuple[str, ...]
    scores: dict[str, float]
    result: SearchResult
    model: Any = None

    def summary(self) -> None:
        """Print the candidates with their scores."""
        print(self)

    def __repr__(self) -> str:
        """Return the text that `summary` prints."""
        width = max(map(len, self.scores)) + 2
        lines = [f"{'candidate':{width}}NLL out of fold"]
        for name, score in self.scores.items():
            mark = "  <- level with it" if name in self.averaged else ""
            mark = "  <- chosen" if name == self.chosen else mark
            lines.append(f"{name:{width}}{score:15.4f}{mark}")
        return "\n".join(lines)


def distillation_targets(
    teacher: Any,
    labels: Any,
    *,
    x: Any = None,
    build_model: Callable[[], Any] | None = None,
    label_weight: float = 1.0,
    from_logits: bool | Sequence[bool | None] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    random_sample: bool = False,
    epochs: int = 200,
    batch_size: int = 32,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> DistillationTargets:
    """Return a student's targets: the corrected teacher and the known labels.

    The labels are used twice: they correct the teacher, and the targets of the
    labelled examples are their one-hot labels. With `build_model`, they are
    used a third time: a model that is trained only on the labelled examples
    becomes one more teacher.

    The candidates are the uncorrected teacher, the corrected teacher, the
    corrected labels-only model and a correction of both together. The candidate
    with the lowest NLL on the labelled rows is chosen. Each row's NLL comes
    from models and corrections that were fitted without that row. If other
    candidates have an NLL within one standard error of the lowest, the targets
    are the geometric mean of all of these.

    The labels-only model is trained six times: once without each of five folds,
    and once on all labelled examples. In each fold, a fifth of the training
    examples decides when a Keras model stops early. The last training takes the
    median number of epochs. For reproducible model weights, call
    `keras.utils.set_random_seed` first.

    Args:
        teacher: the teacher's outputs for all rows, `(N, C)`, or a Keras model,
            which is called on `x`; or a list of these, for several teachers.
        labels: `(N,)` integers: the true class, or -1 where it is unknown.
        x: the inputs of all rows, for `build_model` and for a teacher that is a
            model: an array, a list of texts, a dict of arrays, or batches that
            come in the same order each time (`tf.data.Dataset`, `PyDataset`).
            Only the labelled examples of a data set are kept in memory.
        build_model: a function that returns a new labels-only model. It can be
            a Keras classifier with C outputs (or one output for two classes),
            whose loss takes class indices or one-hot labels; a model that is
            not compiled is trained with Adam and cross-entropy. It can also be
            a scikit-learn classifier with `predict_proba`.
        label_weight: the `sample_weight` given to each labelled example.
        from_logits: whether the teacher's outputs are logits. Pass one flag for
            all teachers, or one per teacher.
        num_classes: the number of classes, C. The default is the number of the
            first teacher's outputs.
        class_names: names for the reports.
        random_sample: whether the labelled rows are a random sample. If not,
            classes without any label keep the teacher's probabilities.
        epochs: the maximum number of epochs for a Keras `build_model()`.
        batch_size: the batch size for a Keras `build_model()`.
        seed: the random seed of the folds.
        verbose: 1 shows progress bars, 0 does not; "auto" shows them for steps
            that take more than two seconds.

    Returns:
        `DistillationTargets`.

    Raises:
        ValueError: if an argument is invalid, or if sizes do not match.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss import distillation_targets
        >>> rng = np.random.default_rng(0)
        >>> true_labels = rng.integers(3, size=400)
        >>> taken_for = np.array([0, 1, 1])  # The teacher takes 2 for 1.
        >>> teacher_probs = rng.dirichlet(np.ones(3), size=400) / 2
        >>> teacher_probs[np.arange(400), taken_for[true_labels]] += 0.5
        >>> labels = np.where(np.arange(400) < 50, true_labels, -1)
        >>> targets = distillation_targets(teacher_probs, labels, verbose=0)
        >>> targets.chosen
        'teacher, corrected'
        >>> targets.values.shape, targets.sample_weight.shape
        ((400, 3), (400,))
    """
    labels = _check_labels(labels)
    labelled = np.flatnonzero(labels >= 0)
    known = labels[labelled]
    x = _check_inputs(x)
    few = None if x is None else _gather(x, labelled, len(labels), verbose)
    teachers = (
        list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    )
    if from_logits is None:  # Stored outputs have an attribute for it.
        from_logits = [getattr(one, "from_logits", None) for one in teachers]
    outputs = [_outputs(one, x, len(labels), verbose) for one in teachers]
    num_classes = num_classes or max(outputs[0].shape[1], 2)

    def search(outputs: list[np.ndarray], from_logits: Any) -> _Candidate:
        result = ProxyTeacherSearch(seed=seed).search(
            _one_or_list([array[labelled] for array in outputs]),
            known,
            from_logits=from_logits,
            num_classes=num_classes,
            class_names=class_names,
            random_sample=random_sample,
            verbose=verbose,
        )
        return _Candidate(result, outputs)

    corrected = search(outputs, from_logits)
    # The search has chosen the uncorrected teacher or its correction.
    as_it_is = corrected.result.chosen.startswith("teacher")
    candidates = {TEACHER if as_it_is else CORRECTED: corrected}
    scores = {
        TEACHER: corrected.result.baseline_score,
        CORRECTED: corrected.result.score,
    }
    model = None
    if build_model is not None:
        if x is None:
            raise ValueError(
                "`x` must hold the inputs that `build_model` learns from. "
                "Received: x=None"
            )
        if len(known) < 2 * FOLDS:
            raise ValueError(
                f"`build_model` needs at least {2 * FOLDS} labelled rows. "
                f"Received: {len(known)} labels"
            )
        labels_only = _LabelsOnly(build_model, num_classes, epochs, batch_size)
        with no_retracing_warning():
            out_of_fold, model = labels_only.cross_fit(
                few, known, seed, verbose
            )
            own = labels_only.predict(model, x, len(known), verbose)
        own[labelled] = out_of_fold
        given = corrected.result.correction.from_logits
        flags = list(given) if isinstance(given, tuple) else [given]
        if not random_sample:
            missing = np.setdiff1d(np.arange(num_classes), known)
            own = _keep_classes(own, missing, outputs, flags)
        with warnings.catch_warnings():
            # The first search has already issued the warnings about the labels.
            warnings.simplefilter("ignore")
            candidates[LABELS_ONLY] = search([own], False)
            candidates[BOTH] = search([*outputs, own], [*flags, False])
        for name in (LABELS_ONLY, BOTH):
            scores[name] = candidates[name].result.score

    chosen = min(candidates, key=lambda name: candidates[name].result.score)
    averaged = tuple(
        name
        for name, candidate in candidates.items()
        if _is_level(candidate.result.losses, candidates[chosen].result.losses)
    )
    values = _geometric_mean(
        [candidates[name].correct(verbose) for name in averaged]
    )
    values[labelled] = np.eye(num_classes)[known]
    weight = np.where(labels >= 0, label_weight, 1.0)
    return DistillationTargets(
        values.astype("float32"),
        weight.astype("float32"),
        chosen,
        averaged,
        scores,
        candidates[chosen].result,
        model,
    )


# --- Candidates --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """What a search found for some teachers.

    Attributes:
        result: the search's result.
        outputs: the teachers' outputs for all rows.
    """

    result: SearchResult
    outputs: list[np.ndarray]

    def correct(self, verbose: Verbose) -> np.ndarray:
        """Return the corrected probabilities of all rows, `(N, C)`."""
        return self.result.correct(_one_or_list(self.outputs), verbose=verbose)


def _is_level(losses: np.ndarray, lowest: np.ndarray) -> bool:
    """Return whether the mean is within one standard error of the lowest."""
    excess = losses - lowest
    return excess.mean() <= excess.std() / np.sqrt(len(excess))


def _geometric_mean(candidates: list[np.ndarray]) -> np.ndarray:
    """Return the geometric mean of probabilities, normalized."""
    if len(candidates) == 1:
        return candidates[0]
    z = [_math.log_teacher_probs(probs) for probs in candidates]
    return scipy.special.softmax(np.mean(z, axis=0), axis=1)


def _one_or_list(arrays: list[np.ndarray]) -> Any:
    """Return one teacher's outputs as an array, several teachers' as a list."""
    return arrays[0] if len(arrays) == 1 else arrays


def _check_labels(labels: Any) -> np.ndarray:
    """Check the labels and return them as integers `(N,)`."""
    array = np.asarray(labels)
    if (
        array.ndim != 1
        or array.dtype.kind not in "iuf"
        or np.any(array != np.round(array))
        or np.any(array < -1)
    ):
        raise ValueError(
            "`labels` must be integers of shape (N,): a class, or -1 where the "
            f"class is unknown. Received: labels={labels!r}"
        )
    if not np.any(array >= 0):
        raise ValueError(
            "`labels` must hold the class of at least some rows. Label some "
            "rows first. Received: labels that are all -1"
        )
    return array.astype("int64")


def _outputs(
    teacher: Any, x: Any, num_rows: int, verbose: Verbose
) -> np.ndarray:
    """Return a teacher's outputs for all rows, `(N, C)`."""
    if isinstance(teacher, keras.Model):
        if x is None:
            raise ValueError(
                "`x` must hold the inputs of a teacher that is a Keras model. "
                "Received: x=None"
            )
        teacher = predict(teacher, x, verbose=verbose)
    outputs = np.asarray(teacher)
    if outputs.ndim != 2 or len(outputs) != num_rows:
        raise ValueError(
            "`teacher` must have one row of outputs for each label, "
            f"({num_rows}, num_classes). Received: outputs of shape "
            f"{outputs.shape}"
        )
    return outputs


# --- The labels-only model ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LabelsOnly:
    """A model that learns only from labelled examples.

    Attributes:
        build: a function that returns a new Keras model or scikit-learn
            classifier.
        num_classes: the number of classes, C.
        epochs: the maximum number of epochs for a Keras model.
        batch_size: the batch size for a Keras model.
    """

    build: Callable[[], Any]
    num_classes: int
    epochs: int
    batch_size: int

    def cross_fit(
        self, x: Any, labels: np.ndarray, seed: int, verbose: Any
    ) -> tuple[np.ndarray, Any]:
        """Return out-of-fold probabilities `(N, C)` and the final model."""
        progress = Progress(
            f"Training {FOLDS + 1} models on the {len(labels)} labels",
            FOLDS + 1,
            unit="model",
            verbose=verbose,
        )
        bar = [Epochs(progress)]
        rng = np.random.default_rng(seed)
        folds = _folds(labels, rng)
        out_of_fold = np.empty((len(labels), self.num_classes))
        best_epochs = []
        for fold in range(FOLDS):
            rows = np.flatnonzero(folds != fold)
            held_out = np.flatnonzero(folds == fold)
            stop = rows[_folds(labels[rows], rng) == 0]
            model, epoch = self.fit(x, labels, rows, stop, callbacks=bar)
            probs = self.predict(model, _take(x, held_out), len(rows))
            out_of_fold[held_out] = probs
            best_epochs.append(epoch)
            progress.update(fold + 1)
        epochs = int(np.median(best_epochs))
        rows = np.arange(len(labels))
        model, _ = self.fit(x, labels, rows, epochs=epochs, callbacks=bar)
        progress.update(FOLDS + 1)
        progress.close()
        return out_of_fold, model

    def fit(
        self,
        x: Any,
        labels: np.ndarray,
        rows: np.ndarray,
        stop: np.ndarray | None = None,
        epochs: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> tuple[Any, int]:
        """Train a new model on `rows`.

        Args:
            x: the inputs.
            labels: the classes of the inputs.
            rows: indices of the rows to train on.
            stop: indices of those rows that a Keras model does not learn from,
                but which decide when it stops. With None, it learns from all
                rows, for `epochs`.
            epochs: number of epochs for a Keras model without `stop`.
            callbacks: callbacks for a Keras model.

        Returns:
            The model, and its best epoch.
        """
        model = self.build()
        if not isinstance(model, keras.Model):
            return model.fit(_take(x, rows), labels[rows]), 0
        if not model.compiled:
            outputs = model.predict(_take(x, rows), verbose=0)
            if outputs.shape[1] == 1:
                loss = keras.losses.BinaryCrossentropy
                logits = outputs.min() <= 0 or outputs.max() >= 1
            else:
                loss = keras.losses.SparseCategoricalCrossentropy
                logits = not np.allclose(outputs.sum(axis=1), 1, atol=0.01)
            model.compile("adam", loss(from_logits=bool(logits)))
        loss_name = getattr(model.loss, "name", None) or str(model.loss)
        if "sparse" not in loss_name and "binary" not in loss_name:
            labels = np.eye(self.num_classes, dtype="float32")[labels]
        options: dict[str, Any] = {"epochs": epochs, "callbacks": callbacks}
        if stop is not None:
            rows = np.setdiff1d(rows, stop)
            early = keras.callbacks.EarlyStopping(
                patience=max(self.epochs // 10, 5), restore_best_weights=True
            )
            options = {
                "epochs": self.epochs,
                "validation_data": (_take(x, stop), labels[stop]),
                "callbacks": [early, *callbacks],
            }
        history = model.fit(
            _take(x, rows),
            labels[rows],
            batch_size=self.batch_size,
            verbose=0,
            **options,
        ).history
        return model, 1 + int(np.argmin(history.get("val_loss", [0])))

    def predict(
        self, model: Any, x: Any, num_rows: int, verbose: Verbose = 0
    ) -> np.ndarray:
        """Return probabilities `(N, C)` of a model fitted to `num_rows`."""
        if isinstance(model, keras.Model):
            logits = getattr(model.loss, "from_logits", False)
            outputs = predict(model, x, verbose=verbose).astype("float64")
            outputs = _math.two_events(outputs, from_logits=logits)
            return scipy.special.softmax(outputs, axis=1) if logits else outputs
        seen = np.concatenate([model.predict_proba(b) for b in _batches(x)])
        # Classes that a classifier has not seen get a small probability, as in
        # Laplace's rule of succession.
        share = 1 / (num_rows + self.num_classes)
        probs = np.full((len(seen), self.num_classes), share)
        missing = self.num_classes - seen.shape[1]
        probs[:, model.classes_] = seen * (1 - missing * share)
        return probs


def _folds(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return each row's fold, with each class spread evenly over the folds."""
    folds = np.empty(len(labels), "int64")
    order = np.lexsort((rng.random(len(labels)), labels))
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def _keep_classes(
    own: np.ndarray,
    missing: np.ndarray,
    teacher_outputs: list[np.ndarray],
    flags: list[bool],
) -> np.ndarray:
    """Give classes without labels the teachers' mean probability.

    The labels-only model has not seen any example of these classes.
    """
    probs = [
        scipy.special.softmax(outputs, axis=1) if flag else outputs
        for outputs, flag in zip(teacher_outputs, flags, strict=True)
        if outputs.shape == own.shape
    ]
    if not len(missing) or not probs:
        return own
    kept = np.mean(probs, axis=0)[:, missing]
    own = own.copy()
    own[:, missing] = 0
    own *= (1 - kept.sum(axis=1, keepdims=True)) / own.sum(
        axis=1, keepdims=True
    )
    own[:, missing] = kept
    return own


# --- Inputs ------------------------------------------------------------------


def _check_inputs(x: Any) -> Any:
    """Check that a data set can be read twice; return texts as an array."""
    if isinstance(x, list) and isinstance(x[0], str):
        return np.array(x, dtype=object)
    if x is not None and _is_data_set(x):
        # A shuffled data set starts with a different batch each time.
        first, second = (next(_batches(x)) for _ in range(2))
        same = keras.tree.map_structure(np.array_equal, first, second)
        if not all(keras.tree.flatten(same)):
            raise ValueError(
                "`x` must return the same rows in the same order each time it "
                "is read. Remove shuffling and random augmentation. "
                f"Received: x={x!r}"
            )
    return x


def _is_data_set(x: Any) -> bool:
    """Return whether inputs come in batches."""
    return not (hasattr(x, "shape") or isinstance(x, (list, tuple, dict)))


def _batches(x: Any) -> Iterator[Any]:
    """Yield the inputs of each batch; arrays are a single batch."""
    if not _is_data_set(x):
        yield x
        return
    if isinstance(x, keras.utils.PyDataset):
        x = (x[index] for index in range(len(x)))
    for batch in x:
        inputs = keras.utils.unpack_x_y_sample_weight(batch)[0]
        yield keras.tree.map_structure(np.asarray, inputs)


def _take(x: Any, rows: np.ndarray) -> Any:
    """Return some rows of an array, or of a structure of arrays."""
    return keras.tree.map_structure(
        lambda one: one.iloc[rows] if hasattr(one, "iloc") else one[rows], x
    )


def _gather(x: Any, rows: np.ndarray, num_rows: int, verbose: Verbose) -> Any:
    """Return some rows of the inputs, which must have `num_rows` rows."""
    parts = []
    start = 0
    batches = track(
        _batches(x), "Reading the inputs", None, unit="batch", verbose=verbose
    )
    for batch in batches:
        size = keras.tree.flatten(batch)[0].shape[0]
        here = rows[(rows >= start) & (rows < start + size)] - start
        parts.append(_take(batch, here))
        start += size
        if start > num_rows:  # This also stops an infinite data set.
            break
    if start != num_rows:
        raise ValueError(
            f"`x` must have one row for each label, {num_rows}. Received: x "
            f"with {'more' if start > num_rows else start} rows"
        )
    if len(parts) == 1:
        return parts[0]
    return keras.tree.map_structure(lambda *each: np.concatenate(each), *parts)
