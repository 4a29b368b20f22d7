"""The result of a search."""

import dataclasses
import json
import os
import textwrap
from typing import Any

import numpy as np

from keras_ptloss._math import negative_log_likelihood as nll
from keras_ptloss._progress import Verbose
from keras_ptloss.correction import Correction
from keras_ptloss.losses.corrected_kl import CorrectedKLDivergence
from keras_ptloss.search.method import Examples, Found

CLASSES_SHOWN = 10


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """The result of a search: the correction, and how well it works.

    `print(result)` or `result.summary()` shows the whole result in one table.

    Attributes:
        correction: the chosen `Correction`. If no correction was better than
            the teacher, it leaves the teacher unchanged.
        method: name of the method, such as `"ridge"`.
        trials: everything that was tried, as a dictionary of columns, for
            `pandas.DataFrame(trials)`.
        notes: what may be wrong with the teacher, the labels or the result.
        class_names: names of the classes.
        seconds: duration of the search.
        score: NLL of the corrected teacher on the labels.
        baseline_score: NLL of the uncorrected teacher. With several teachers,
            it is the NLL of the best teacher that has the student's classes. If
            no teacher has them, it is the NLL of the shares of the classes
            among the labels.
        losses: NLL of the corrected teacher on each example, `(N,)`.
        scores: the rows of the summary's table by name, each with `nll`,
            `accuracy` and `ece`, the expected calibration error in 15 bins.
        chosen: the name of the row of `scores` that is the correction.
        out_of_fold: whether scores and shares come from cross-validation, so
            that each example is corrected without its own label. If not, they
            come from the examples that were fitted, and results on new data
            will be worse.
        class_shares: the share of each class among the labels, and the mean
            probability that the teacher and the corrected teacher give it.
        verdict: one sentence that says whether the correction helps.
    """

    correction: Correction
    method: str
    trials: dict[str, list[Any]]
    notes: tuple[str, ...]
    class_names: tuple[str, ...]
    seconds: float
    score: float
    baseline_score: float
    losses: np.ndarray
    scores: dict[str, dict[str, float]]
    chosen: str
    out_of_fold: bool
    class_shares: dict[str, np.ndarray]
    verdict: str

    @property
    def epsilon(self) -> np.ndarray:
        """The coefficients of PTLoss, `(M,)`, or `(C, M)` per class.

        For one teacher, `PTLoss(result.epsilon,
        teacher_temperature=result.temperature)` is step 1 of the correction as
        a loss. For several teachers, epsilon applies to their combination
        `softmax(sum_k z_k / temperature_k)`, with z_k the logarithms of the
        probabilities of teacher k.
        """
        return np.asarray(self.correction.epsilon)

    @property
    def temperature(self) -> float | tuple[float, ...]:
        """The teacher's temperature; for several teachers, one per teacher.

        If K teachers all have temperature K, they are combined into their
        geometric mean. A teacher with temperature `inf` is not used in step 1.
        """
        return self.correction.temperature

    def correct(
        self, teacher_outputs: Any, *, verbose: Verbose = "auto"
    ) -> np.ndarray:
        """Return the corrected probabilities of teacher outputs.

        Args:
            teacher_outputs: `(..., C)`, probabilities or logits, as they were
                passed to `search`. For several teachers, pass a list of arrays,
                or one array with their outputs side by side.
            verbose: 1 shows a progress bar, 0 does not; "auto" shows it after
                two seconds.

        Returns:
            Probabilities, `(..., C)`, float64.
        """
        return self.correction.correct(teacher_outputs, verbose=verbose)

    def loss(
        self, *, from_logits: bool = False, **kwargs: Any
    ) -> CorrectedKLDivergence:
        """Return the loss for a live teacher: KL from the corrected teacher.

        Args:
            from_logits: whether the student gives logits.
            **kwargs: `reduction`, `name` and `dtype` of a Keras loss.
        """
        return CorrectedKLDivergence(
            self.correction, from_logits=from_logits, **kwargs
        )

    def plot(self, *, ax: Any = None) -> Any:
        """Plot the share of each class: labels, teacher, corrected teacher.

        Args:
            ax: Matplotlib axes to draw on, or None for a new figure.

        Returns:
            The axes.
        """
        from keras_ptloss.plots import plot_classes

        return plot_classes(self, ax=ax)

    def summary(self) -> None:
        """Print whether the correction helps, and what it changes."""
        print(self)

    def __repr__(self) -> str:
        """Return the text that `summary` prints."""
        mark = "" if self.out_of_fold else "*"
        wide = max(map(len, self.scores))
        lines = [
            self.verdict,
            "",
            f"{'':{wide}}  {'NLL' + mark:>8} {'accuracy' + mark:>10} "
            f"{'ECE' + mark:>7}",
        ]
        for name, row in self.scores.items():
            lines.append(
                f"{name:{wide}}  {row['nll']:8.3f} "
                f"{100 * row['accuracy']:8.1f} % {row['ece']:7.3f}"
                + ("  <- chosen" if name == self.chosen else "")
            )
        lines += ["", *self._share_lines(mark)]
        if not self.out_of_fold:
            lines += ["* on the labels that were fitted; worse on new data"]
        epsilon = np.array2string(
            self.epsilon, precision=3, threshold=10, edgeitems=2
        ).replace("\n", "")
        temperature = np.array2string(np.asarray(self.temperature), precision=3)
        step_2 = ", then a correction between classes"
        lines += [
            "",
            f"epsilon {epsilon}, temperature {temperature}"
            f"{step_2 * (self.correction.matrix is not None)}; "
            f"{self.seconds:.1f} s",
        ]
        for note in self.notes:
            lines += textwrap.wrap(
                f"Note: {note}", width=88, subsequent_indent="  "
            )
        return "\n".join(lines)

    def _share_lines(self, mark: str) -> list[str]:
        """Return a table of the classes whose share changes most."""
        shares = self.class_shares
        change = np.abs(shares["corrected"] - shares["teacher"])
        order = np.sort(np.argsort(-change, kind="stable")[:CLASSES_SHOWN])
        names = [n if len(n) < 25 else f"{n[:23]}…" for n in self.class_names]
        wide = max(5, *(len(names[c]) for c in order))
        lines = [
            f"{'class':{wide}}  {'labels':>10} {'teacher' + mark:>10} "
            f"{'corrected' + mark:>10}"
        ]
        for c in order:
            values = [f"{100 * share[c]:8.1f} %" for share in shares.values()]
            lines.append(f"{names[c]:{wide}}  {' '.join(values)}")
        if len(order) < len(names):
            lines.append(
                f"(the {len(order)} of {len(names)} classes that change most)"
            )
        return lines

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a JSON file."""
        fields = {**vars(self), "correction": self.correction.get_config()}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(fields, file, default=lambda value: value.tolist())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SearchResult":
        """Read a result that `save` wrote."""
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        fields["correction"] = Correction.from_config(fields["correction"])
        fields["losses"] = np.asarray(fields["losses"])
        fields["notes"] = tuple(fields["notes"])
        fields["class_names"] = tuple(fields["class_names"])
        fields["class_shares"] = {
            name: np.asarray(shares)
            for name, shares in fields["class_shares"].items()
        }
        return cls(**fields)


def summarize(examples: Examples, found: Found) -> dict[str, Any]:
    """Return the fields of a `SearchResult` that depend on the labels."""
    labels, weights = examples.labels, examples.sample_weight
    name, baseline = _baseline(examples)
    candidates = {name: baseline[None]}
    for n, probs in found.out_of_fold.items():
        if not n.startswith("teacher"):
            candidates[n] = probs
    chosen = found.chosen if found.chosen in candidates else name
    if not found.out_of_fold and not found.correction.is_identity:
        chosen = "corrected"
        t = examples.teacher_probs
        correction = dataclasses.replace(found.correction, from_logits=False)
        candidates[chosen] = correction.correct(
            t if len(t) > 1 else t[0], verbose=0
        )[None]
    corrected = candidates[chosen]
    scores = {
        n: _scores(probs, labels, weights) for n, probs in candidates.items()
    }
    shares = np.bincount(labels, weights, examples.num_classes) / len(labels)
    return {
        "score": scores[chosen]["nll"],
        "baseline_score": scores[name]["nll"],
        "losses": nll(corrected, labels).mean(axis=0),
        "scores": scores,
        "chosen": chosen,
        "out_of_fold": bool(found.out_of_fold),
        "class_shares": {
            "labels": shares,
            "teacher": np.average(baseline, axis=0, weights=weights),
            "corrected": np.average(corrected.mean(0), axis=0, weights=weights),
        },
        "verdict": _verdict(examples, found, name, baseline, corrected),
    }


def _baseline(examples: Examples) -> tuple[str, np.ndarray]:
    """Return the best uncorrected teacher, or else the shares of the labels."""
    labels, weights = examples.labels, examples.sample_weight
    alike = {
        k: t
        for k, t in enumerate(examples.teacher_probs)
        if t.shape[1] == examples.num_classes
    }
    if not alike:
        counts = np.bincount(labels, weights, examples.num_classes) + 1.0
        shares = np.tile(counts / counts.sum(), (len(labels), 1))
        return "shares of the labels", shares
    if len(examples.teacher_probs) == 1:
        return "teacher", alike[0]
    best = min(alike, key=lambda k: weights @ nll(alike[k], labels))
    return f"teacher {best}, the best", alike[best]


def _scores(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    """Return one row of the table: means over the splits.

    Args:
        probs: `(splits, N, C)`.
        labels: `(N,)`.
        weights: `(N,)`, with mean 1.
    """
    right = probs.argmax(axis=-1) == labels
    confidence = probs.max(axis=-1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        np.bincount(*of_split)
        for of_split in zip(bins, weights * (right - confidence), strict=True)
    ]
    return {
        "nll": float(np.mean(weights * nll(probs, labels))),
        "accuracy": float(np.mean(weights * right)),
        "ece": float(
            np.mean([np.abs(gap).sum() for gap in gaps]) / len(labels)
        ),
    }


def _verdict(
    examples: Examples,
    found: Found,
    name: str,
    baseline: np.ndarray,
    corrected: np.ndarray,
) -> str:
    """Return one sentence that says whether the correction helps.

    Args:
        examples: the labelled examples.
        found: the output of the search method.
        name: name of the baseline.
        baseline: probabilities of the baseline, `(N, C)`.
        corrected: probabilities of the correction, `(splits, N, C)`.
    """
    labels, weights = examples.labels, examples.sample_weight
    number = len(labels)
    if found.correction.is_identity or found.chosen.startswith("teacher"):
        several = len(examples.teacher_probs) > 1
        return (
            f"The teacher{'s' * several} could not be improved with these "
            f"{number} labels; use {name + ',' if several else 'it'} as it is."
        )

    def mean_and_error(values: np.ndarray) -> tuple[float, float]:
        mean = np.mean(weights * values)
        error = np.linalg.norm(weights * (values - mean)) / number
        return float(mean), float(error)

    where = f"Out of fold on your {number} labels"
    if not found.out_of_fold:
        where = f"On the {number} labels that were fitted"
    before, _ = mean_and_error(baseline.argmax(axis=1) == labels)
    right = corrected.argmax(axis=-1) == labels
    after, error = mean_and_error(right.mean(axis=0))
    accuracy = f"{100 * after:.1f} % (± {100 * error:.1f}) are right"
    instead = f"instead of {100 * before:.1f} %"
    if after > before:
        return f"{where}, {accuracy} {instead}."
    change, error = mean_and_error(
        nll(corrected, labels).mean(axis=0) - nll(baseline, labels)
    )
    return (
        f"{where}, the NLL is {abs(change):.3f} (± {error:.3f}) "
        f"{'lower' if change < 0.0 else 'higher'}, and {accuracy} "
        f"{instead if after < before else 'as before'}."
    )
