"""Reads what a teacher says of labelled examples, and checks it once.

Labels and flags are checked before anything is predicted.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np

from keras_ptloss._ask import answers, as_labels, is_data_set
from keras_ptloss._binary import two_events
from keras_ptloss._checks import (
    as_rows,
    check_count,
    check_examples,
    check_flag,
    check_ignore_class,
    check_label_range,
    check_output_form,
    check_probabilities,
    fail,
    on_simplex,
    output_shape,
)
from keras_ptloss._several import SideBySide, given_each, is_several


@runtime_checkable
class StoredOutputs(Protocol):
    """Outputs that say of themselves whether they are logits."""

    @property
    def from_logits(self) -> bool:
        """Whether the rows are logits."""

    def __array__(self) -> np.ndarray:
        """Return the rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledOutputs:
    """A teacher's outputs on labelled examples.

    Attributes:
        outputs: `(N, C)` in float64, checked; probabilities are normalised.
            Those of several teachers stand side by side.
        labels: classes, `(N,)` in int64.
        from_logits: whether `outputs` are logits; of several teachers one flag
            each.
        classes: C, the number of classes of the labels.
        row: which columns are whose, of several teachers, or of one with other
            classes than the labels; else None.
    """

    outputs: np.ndarray
    labels: np.ndarray
    from_logits: Any
    classes: int
    row: SideBySide | None = None


def read_labelled(
    teacher: Any,
    labels: Any,
    *,
    inputs: Any = None,
    from_logits: Any = None,
    ignore_class: int | None = None,
    classes: int | None = None,
) -> LabelledOutputs:
    """Read a teacher's outputs, or several teachers', beside their labels.

    Args:
        teacher: outputs, `(N, ..., C)`, or a Keras model, or a list of these.
        labels: classes, `(N, ...)`; or, with models alone, batches of
            `(inputs, labels)`.
        inputs: the examples, with a model and an array of labels.
        from_logits: whether the outputs are logits, of several teachers one
            flag for all or one each; None is what `StoredOutputs` say of
            themselves, and False of others.
        ignore_class: a label that marks positions to leave out.
        classes: C of the labels; None is that of the teachers.

    Returns:
        `LabelledOutputs`, every position of the leading axes a row.

    Raises:
        ValueError: if an argument is not of this form.
    """
    ignore_class = check_ignore_class(ignore_class)
    if inputs is not None:
        check_examples("inputs", inputs)
    if classes is not None:
        classes = check_count("classes", classes, at_least=2)
    teachers = list(teacher) if is_several(teacher) else [teacher]
    several = len(teachers) > 1
    given = given_each("from_logits", from_logits, len(teachers))
    flags = tuple(map(_says_logits, teachers, given))
    asked = any(isinstance(one, keras.Model) for one in teachers)
    if asked and not is_data_set(labels):
        _check_before_asking(teachers, labels, classes, ignore_class)
    outputs, labels = answers(teachers, labels, inputs)
    if ignore_class is not None:
        seen = _seen(labels, ignore_class)
        outputs = [_looked_at(rows, seen) for rows in outputs]
    if several:
        parts = _read_each(outputs, flags)
    else:
        parts = [read_outputs(outputs[0], from_logits=flags[0])]
    counts = tuple(part.shape[-1] for part in parts)
    classes = _classes(classes, counts)
    row = None
    rows = parts[0]
    if several or counts != (classes,):
        row = SideBySide(counts, flags)
        rows = np.asarray(row.join("teacher", parts))
    kept, labels = _kept(labels, rows.shape, classes, ignore_class)
    rows = rows.reshape(-1, rows.shape[-1])[kept]
    return LabelledOutputs(
        rows,
        labels.astype("int64"),
        flags[0] if row is None else row.from_logits,
        classes,
        row,
    )


def _check_before_asking(
    teachers: list[Any],
    labels: Any,
    classes: int | None,
    ignore_class: int | None,
) -> None:
    """Refuse labels for what models' answers need not tell.

    The shape of these answers is known of models that are built.
    """
    labels = as_labels(labels)
    if ignore_class is not None:
        _seen(labels, ignore_class)
    shapes = [_answer_shape(teacher) for teacher in teachers]
    counts = tuple(max(shape[-1], 2) for shape in shapes if shape)
    if classes is None and len(counts) == len(shapes):
        classes = _classes(None, counts)
    for shape in filter(None, shapes):
        _kept(labels, (len(labels), *shape), classes, ignore_class)


def _answer_shape(teacher: Any) -> tuple[int, ...] | None:
    """Return the shape of a model's answer to an example, where it is known."""
    if not isinstance(teacher, keras.Model):
        return None
    shape = output_shape("teacher", teacher)
    return None if shape is None or None in shape[1:] else shape[1:]


def _seen(labels: np.ndarray, ignore_class: int) -> np.ndarray:
    """Return where the labels are not the ignored one."""
    seen = labels != ignore_class
    if not seen.any():
        fail("ignore_class", "a label that some rows lack", ignore_class)
    return np.asarray(seen)


def _kept(
    labels: np.ndarray,
    shape: tuple[int, ...],
    classes: int | None,
    ignore_class: int | None,
) -> tuple[Any, np.ndarray]:
    """Return an index of the rows that are not ignored, and their labels.

    Args:
        labels: of outputs of `shape`, one a row.
        shape: `(N, ..., C)`; the rows are those of all leading axes.
        classes: C of the labels; None where it is not known yet.
        ignore_class: a label that marks rows to leave out.
    """
    labels = _aligned(labels, shape)
    kept: Any = slice(None)
    if ignore_class is not None:
        kept = labels != ignore_class
        labels = labels[kept]
    if classes is not None:
        check_label_range(
            labels,
            classes,
            "the classes (`ignore_class` leaves rows out; `classes` says how "
            "many there are where the teacher has others)",
        )
    return kept, labels


def _classes(classes: int | None, counts: tuple[int, ...]) -> int:
    """Return C: as said, or that of the teachers where they agree."""
    if classes is not None:
        return classes
    if len(set(counts)) > 1:
        raise ValueError(
            "`classes` must say how many classes the labels have where the "
            f"teachers differ. Received: classes=None, with teachers of "
            f"{', '.join(map(str, counts))} classes"
        )
    return counts[0]


def _looked_at(outputs: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return a teacher's outputs, uniform ones where labels are ignored.

    Outputs that do not fit the labels, or are no numbers, come back as they
    are: what follows refuses them.
    """
    if outputs.dtype.kind not in "fiu" or outputs.ndim < 2 or not outputs.size:
        return outputs
    *axes, classes = outputs.shape
    if seen.size != np.prod(axes):
        return outputs
    return np.where(seen.reshape(*axes, 1), outputs, 1.0 / classes)


def read_outputs(
    outputs: Any,
    *,
    from_logits: bool,
    if_logits: str = "say from_logits=True",
    argument: str = "teacher",
) -> np.ndarray:
    """Check a teacher's outputs, `(..., C)`; return them in float64.

    A binary head's one column becomes two; probabilities are normalised.

    Raises:
        ValueError: if they are not numbers of this form, or not logits or
            probabilities as `from_logits` says.
    """
    rows = as_rows(argument, outputs)
    if rows.dtype.kind not in "fiu" or rows.ndim < 2 or not rows.size:
        raise ValueError(
            f"`{argument}` must give numbers of shape (examples, ..., "
            f"classes). Received: {argument} outputs of shape {rows.shape} and "
            f"dtype {rows.dtype}"
        )
    rows = two_events(rows.astype("float64"), from_logits=from_logits)
    if not from_logits:
        check_probabilities(argument, rows, if_logits)
        return np.asarray(rows / rows.sum(axis=-1, keepdims=True))
    if not np.all(np.isfinite(rows)):
        fail(argument, "finite logits", rows)
    if rows.size > rows.shape[-1] and on_simplex(rows).all():
        raise ValueError(
            f"`from_logits` must be False for probabilities: all rows of "
            f"`{argument}` are non-negative and sum to 1. Received: "
            f"from_logits=True, {argument}[0]={rows[0]}"
        )
    return rows


def read_row(row: SideBySide, outputs: Any) -> np.ndarray:
    """Check the outputs of several teachers; return them side by side.

    Args:
        row: which columns are whose.
        outputs: a list of one array a teacher, or one array of all.

    Returns:
        `(..., C_1 + C_2 + ...)`, in float64; probabilities are normalised.

    Raises:
        ValueError: as `read_outputs`, naming the teacher; if one did not answer
            all examples (a row with NaN), or other examples than the first.
    """
    if isinstance(outputs, (list, tuple)):
        row.check_number("outputs", len(outputs))
    else:
        whole = row.join("outputs", as_rows("outputs", outputs))
        outputs = [whole[..., columns] for columns in row.columns]
    parts = _read_each(outputs, row.from_logits, "outputs")
    return np.asarray(row.join("outputs", parts))


def _read_each(
    outputs: Any, flags: tuple[bool, ...], argument: str = "teacher"
) -> list[np.ndarray]:
    pairs = enumerate(zip(outputs, flags, strict=True))
    return [_read_answers(f"{argument}[{k}]", *pair) for k, pair in pairs]


def _read_answers(argument: str, outputs: Any, from_logits: bool) -> np.ndarray:
    """Check one of several teachers' outputs, `(..., C_k)`, all answered."""
    rows = as_rows(argument, outputs)
    if rows.dtype.kind == "f" and rows.ndim:
        missing = np.isnan(rows).any(axis=-1).ravel()
        if missing.any():
            raise ValueError(
                f"`{argument}` must answer every example (leave out, of all "
                "teachers, those that it did not). Received: NaN in "
                f"{np.count_nonzero(missing)} of {missing.size} rows, first in "
                f"{argument}[{int(np.argmax(missing))}]"
            )
    return read_outputs(rows, from_logits=from_logits, argument=argument)


def _says_logits(teacher: Any, from_logits: bool | None) -> bool:
    """Return whether the teacher's outputs are logits, by the one who knows."""
    if from_logits is not None:
        check_flag("from_logits", from_logits)
    if isinstance(teacher, keras.Model):
        if from_logits:
            check_output_form("teacher", teacher, True, "from_logits")
        return bool(from_logits)
    if not isinstance(teacher, StoredOutputs):
        return bool(from_logits)
    own = bool(teacher.from_logits)
    if from_logits is not None and from_logits != own:
        fail("from_logits", f"{own}, as these soft labels say", from_logits)
    return own


def _aligned(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return one label a row of outputs of `shape`, in one axis."""
    if labels.shape == (*shape[:-1], 1):
        labels = labels[..., 0]
    if labels.ndim != len(shape) - 1:
        raise ValueError(
            "`labels` must have one class a row of the teacher, shape "
            f"{shape[:-1]}. Received: labels of shape {labels.shape}"
        )
    if labels.shape != shape[:-1]:
        raise ValueError(
            "`labels` must have one entry for each of the teacher's rows, "
            f"{shape[:-1]}. Received: labels of shape {labels.shape}"
        )
    return labels.ravel()
