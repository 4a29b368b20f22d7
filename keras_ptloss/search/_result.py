"""What a search found."""

import base64
import dataclasses
import html
import importlib.util
import io
import textwrap
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import check_output_form
from keras_ptloss._correction import Correction
from keras_ptloss.layers import CorrectedTeacher, TeachersSideBySide
from keras_ptloss.losses import ProxyKLDivergence, PTLoss
from keras_ptloss.plots import plot_classes
from keras_ptloss.proxy import ProxyTeacherResult

# A summary prints coefficients and scales of so many classes in full.
CLASSES_SHOWN = 5
WIDTH = 100  # of its lines, in characters


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found, every trial, and what it cost.

    Attributes:
        correction: the teacher's `Correction`: calibration and epsilon; plain
            KL where nothing better was found.
        score: the objective at the corrected teacher, on the search's examples.
        score_at_zero: the objective at the teacher itself: plain KL. Of several
            teachers, at the geometric mean of those with the labels' classes;
            if there are none, at the labels' frequencies.
        objective: its name.
        method: `"cross_validation"`, `"gradient"`, `"calibration"` or
            `"random"`.
        trials: what was tried, column by column (`pandas.DataFrame(trials)`);
            each method says which columns.
        unconverged: rows whose proxy teacher did not converge, all solves
            together.
        solves: proxy teachers computed, one a row and trial.
        seconds: time of the search, compilation included.
        classes: the share of each class among the search's examples, `(C,)`
            each: `labels`, `teacher` and `corrected` (mean probabilities).
        notes: what the user should know of teacher and result.
    """

    correction: Correction
    score: float
    score_at_zero: float
    objective: str
    method: str
    trials: dict[str, list[Any]]
    unconverged: int
    solves: int
    seconds: float
    classes: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()

    @property
    def epsilon(self) -> np.ndarray:
        """The coefficients, `(M,)` or `(C, M)`; they go into `PTLoss`."""
        return np.asarray(self.correction.epsilon)

    def loss(
        self, *, from_logits: bool = False, **arguments: Any
    ) -> PTLoss | ProxyKLDivergence:
        """Build the loss that leads a student to the corrected teacher.

        `y_true` are the teacher's outputs, in the form in which the search was
        given them. `PTLoss(result.epsilon)` is the paper's loss.

        Args:
            from_logits: whether the student's outputs are logits.
            **arguments: `reduction`, `name` and `dtype` of a Keras loss.

        Returns:
            A `ProxyKLDivergence` where there is an epsilon: students that
            cannot answer each example by itself end at better probabilities
            than by PTLoss. Else a `PTLoss`, which then is KL to the calibrated
            teacher, where it can carry the calibration.
        """
        if self.epsilon.any():
            return ProxyKLDivergence(
                self.correction, from_logits=from_logits, **arguments
            )
        return self.correction.loss(from_logits=from_logits, **arguments)

    def proxy_teacher(self, outputs: Any) -> ProxyTeacherResult:
        """Return what students distilled with `loss()` end at.

        Args:
            outputs: the teacher's outputs, `(N, C)`, in the form in which the
                search was given them; of several teachers a list, or one array
                of their outputs side by side.

        Returns:
            The corrected teacher's rows.

        Raises:
            ValueError: if `outputs` are not of this form.
        """
        return self.correction.proxy(outputs)

    def proxy_model(self, teacher: Any) -> keras.Model:
        """Build the corrected teacher of a live one, as a model.

        Args:
            teacher: a Keras model whose outputs, `(N, C)`, are in the form in
                which the search was given them; or the list of all teachers,
                of the same inputs, in the search's order.

        Returns:
            A model of the teacher's inputs that gives probabilities, `(N, C)`.
            It holds the teacher, and does not train what the search found.

        Raises:
            ValueError: if `teacher` is not a Keras model, or ends in a softmax
                where the search was given logits. On the first call, if it has
                another class count than the search's.
        """
        several = isinstance(teacher, (list, tuple))
        models = list(teacher) if several else [teacher]
        row, flags = self.correction.row, self.correction.teacher_from_logits
        if row is not None:
            row.check_number("teacher", len(models))
        elif len(models) != 1:
            raise ValueError(
                "`teacher` must be the one teacher that was searched. "
                f"Received: teacher={teacher!r}"
            )
        for model, from_logits in zip(models, np.ravel(flags), strict=True):
            if not isinstance(model, keras.Model):
                raise ValueError(
                    "`teacher` must be a Keras model; for stored outputs there "
                    "is `proxy_teacher`. Received: teacher="
                    f"{type(model).__name__}"
                )
            check_output_form(
                "teacher",
                model,
                from_logits,
                "ProxyTeacherSearch.search(from_logits)",
            )
        first = models[0]
        if row is not None:
            first = TeachersSideBySide(
                models, row.counts, from_logits=row.from_logits
            )
        layer = CorrectedTeacher(self.correction)
        model = keras.Sequential([first, layer], name="proxy_teacher")
        # Whatever the global policy, which would blur the teachers' inputs.
        model.dtype_policy = "float32"
        return model

    def plot(self, *, ax: Any = None) -> Any:
        """Plot the share of each class: labels, teacher, corrected teacher.

        Args:
            ax: Matplotlib axes to draw on; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: if Matplotlib is absent.
        """
        return plot_classes(self, ax=ax)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the summary, and `plot` if it can."""
        rows = "".join(
            f"<tr><td>{html.escape(line[2:10].strip())}</td>"
            f"<td>{html.escape(line[10:].strip())}</td></tr>"
            for line in self._lines()[1:]
        )
        title = html.escape(self._lines()[0])
        table = f"<table><caption>{title}</caption>{rows}</table>"
        return table + self._picture()

    def _picture(self) -> str:
        """Return `plot` as an image, or nothing without Matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            return ""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 2.5), layout="constrained")
        self.plot(ax=figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="png")
        image = base64.b64encode(file.getvalue()).decode()
        return f'<img src="data:image/png;base64,{image}">'

    def summary(self) -> None:
        """Print what was found and what it cost."""
        print(self)

    def __str__(self) -> str:
        """Return the text that `summary` prints."""
        wrap = textwrap.TextWrapper(
            WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False
        )
        return "\n".join(map(wrap.fill, self._lines()))

    def _lines(self) -> list[str]:
        """Return the lines of the text, long ones whole."""
        found = self.correction
        lines = [
            f"Teacher's correction: {self.method}, objective {self.objective}",
            f"  score    {self.score:.5g} ({self._zero}: "
            f"{self.score_at_zero:.5g})",
            *_of_teachers(found),
            *_describe("epsilon", found.epsilon),
            *_describe("scale", found.scale),
            *_describe("bias", found.bias),
            *_describe("A'", found.proxy_scale),
            *_describe("b'", found.proxy_bias),
        ]
        if found.is_identity:
            lines.append("  this is plain KL from the teacher")
        elif not np.any(found.epsilon):
            lines.append(
                "  epsilon = 0: this is KL from the teacher, calibrated"
            )
        lines += self._of_classes()
        lines += self._of_trials()
        lines += [f"  note     {note}" for note in self.notes]
        lines.append(
            f"  cost     {_count(len(self.trials['score']), 'trial')}, "
            f"{_count(self.solves, 'solve')}, "
            f"{_count(self.unconverged, 'row')} not converged, "
            f"{self.seconds:.3g} s"
        )
        return "\n".join(lines).splitlines()

    @property
    def _zero(self) -> str:
        """What gains are counted from."""
        if self.correction.teachers is None:
            return "plain KL"
        alike = len(self.classes["labels"]) in self.correction.teachers
        return "the teachers' mean" if alike else "the labels' frequencies"

    def _of_classes(self) -> list[str]:
        """Say which classes gain and lose most."""
        change = self.classes["corrected"] - self.classes["teacher"]
        if not np.any(np.abs(change) > 5e-4):
            return []
        order = np.argsort(change)
        lose = [c for c in order[:3] if change[c] < 0]
        gain = [c for c in order[::-1][:3] if change[c] > 0]

        def text(classes: list[Any]) -> str:
            return ", ".join(f"{c} ({100 * change[c]:+.1f} %)" for c in classes)

        return [f"  classes  {text(gain)} gain; {text(lose)} lose"]

    def _of_trials(self) -> list[str]:
        trials = self.trials
        if "chosen" in trials:
            chosen = trials["chosen"].index(True)
            row = {name: column[chosen] for name, column in trials.items()}
            return [
                "  chosen   {calibration} calibration, {epsilon} epsilon, "
                "penalty {penalty:g}: {gain:.4g} +- {standard_error:.2g} below "
                "{zero}, held out".format(zero=self._zero, **row)
            ]
        if "best_of_order" in trials:
            return [
                f"  best of order {order}: {score:.5g}"
                for order, score, best in zip(
                    trials["order"],
                    trials["score"],
                    trials["best_of_order"],
                    strict=True,
                )
                if best
            ]
        return []


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _of_teachers(found: Correction) -> list[str]:
    """Return a line on several teachers: what the matrix takes of each."""
    if found.row is None:
        return []
    taken = np.array(
        [np.abs(found.scale[:, c]).sum() for c in found.row.columns]
    )
    shares = 100.0 * taken / max(taken.sum(), np.finfo("float64").tiny)
    text = ", ".join(
        f"{count} classes ({share:.0f} %)"
        for count, share in zip(found.row.counts, shares, strict=True)
    )
    return [f"  teachers {text} of the matrix"]


def _describe(name: str, values: np.ndarray) -> list[str]:
    """Return a line on values; of many classes, what stands out in them."""
    name = name.ljust(8)
    identity = 1.0 if name.startswith(("scale", "A")) else 0.0
    if values.ndim < 2 and np.all(values == identity):
        return []
    most = CLASSES_SHOWN if values.ndim == 2 else CLASSES_SHOWN + 5
    if max(values.shape, default=1) <= most:
        text = np.array2string(values, precision=3, suppress_small=True)
        return [f"  {name} {text.replace(chr(10), chr(10) + ' ' * 11)}"]
    # A perturbation per class is (C, M), also where there are as many of both.
    matrix = values.ndim == 2 and identity == 1.0
    if matrix and values.shape[0] == values.shape[1]:
        off = np.array(values)
        np.fill_diagonal(off, 0.0)
        to, of = np.unravel_index(np.argmax(off), off.shape)
        return [
            f"  {name} matrix {values.shape[0]} x {values.shape[1]}, diagonal "
            f"{np.diag(values).min():.3g} to {np.diag(values).max():.3g}; most "
            f"of all class {to} gains from what the teacher calls {of} "
            f"({off[to, of]:.3g})"
        ]
    if matrix:
        return [f"  {name} matrix {values.shape[0]} x {values.shape[1]}"]
    per_class = values if values.ndim == 1 else values.sum(axis=1)
    low, high = int(np.argmin(per_class)), int(np.argmax(per_class))
    return [
        f"  {name} per class, {values.shape}, from {per_class[low]:.3g} (class "
        f"{low}) to {per_class[high]:.3g} (class {high})"
    ]
