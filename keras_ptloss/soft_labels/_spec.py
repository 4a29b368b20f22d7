"""What a store of soft labels holds, and how a row is put on disk."""

import dataclasses
from typing import Any, TypeVar

import numpy as np

from keras_ptloss._checks import (
    check_choice,
    check_count,
    check_flag,
    check_real,
    fail,
)

Spec = TypeVar("Spec")
# Dtype and columns of an array on disk; no columns, a number a row.
Format = tuple[str, int | None]
_DTYPES = {"float16": "<f2", "float32": "<f4"}


@dataclasses.dataclass(frozen=True)
class SoftLabelSpec:
    """What a store holds; kept in it, and the same for all of its shards.

    The error of a stored row is measured while writing, as its total variation
    distance from the teacher's row, `0.5 * sum_c |stored_c - teacher_c|`, and
    kept in the manifest. Bounds: `"float32"` 1e-6; `"float16"` 5e-4 for
    probabilities of up to 1,000 classes, and for logits the largest
    `|logit| / 4096`. `top_k` stores log-probabilities, in which float16 loses
    5e-4 times the row's entropy (nats) at most, and adds the mass outside of
    the k largest classes.

    Args:
        num_examples: Length of the data set; needed for what does not tell it:
            `tf.data`, `keras.utils.PyDataset`, Grain's and PyTorch's loaders.
        class_names: One name per class, in the order of the teacher's outputs.
        from_logits: Whether the teacher gives logits, not probabilities. They
            are stored and read as they are.
        temperature: Temperature that the teacher's outputs already contain.
            A note for the reader; nothing is rescaled.
        teacher_name: A name for the teacher, checked on resuming.
        dtype: `"float16"` or `"float32"`, on disk. Rows are read as float32.
        top_k: Store only the k most probable classes, as log-probabilities,
            and the logarithm of the remaining mass, which is read spread
            evenly over the other classes, or as it is by `attach(...,
            targets="top_k")`. The teacher must give probabilities.
        num_classes: Number of classes; needed only where neither names nor
            rows tell it, as in Parquet files of the k largest.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from keras_ptloss.soft_labels import SoftLabelSpec
        >>> SoftLabelSpec(class_names=("no", "yes"), dtype="float32").dtype
        'float32'
    """

    num_examples: int | None = None
    class_names: tuple[str, ...] | None = None
    from_logits: bool = False
    temperature: float = 1.0
    teacher_name: str | None = None
    dtype: str = "float16"
    top_k: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        """Check the fields; keep what JSON has, not NumPy's numbers."""
        found: dict[str, Any] = check_notes(self)
        if self.num_examples is not None:
            found["num_examples"] = check_count(
                "num_examples", self.num_examples
            )
        names = self.class_names
        if names is not None:
            names = found["class_names"] = _class_names(names)
        if self.num_classes is not None:
            count = check_count("num_classes", self.num_classes, at_least=2)
            if names is not None and len(names) != count:
                fail("num_classes", f"the {len(names)} class names'", count)
            found["num_classes"] = count
        check_choice("dtype", self.dtype, _DTYPES)
        found["dtype"] = str(self.dtype)
        if self.top_k is not None:
            found["top_k"] = check_count("top_k", self.top_k)
            if found["from_logits"]:
                fail(
                    "top_k",
                    "None for logits (let the teacher end in a softmax to"
                    " store its k largest probabilities)",
                    self.top_k,
                )
        for field, value in found.items():
            object.__setattr__(self, field, value)


def _class_names(names: Any) -> tuple[str, ...]:
    wanted = "at least two different strings"
    try:
        listed = () if isinstance(names, str) else tuple(names)
    except TypeError:
        fail("class_names", wanted, names)
    texts = all(isinstance(name, str) for name in listed)
    if not texts or len(listed) < 2 or len(set(listed)) != len(listed):
        fail("class_names", wanted, names)
    return tuple(str(name) for name in listed)


def check_notes(spec: Any) -> dict[str, Any]:
    """What a spec of either kind says of the teacher, checked."""
    temperature = check_real(
        "temperature", spec.temperature, "a positive number"
    )
    if not 0 < temperature < float("inf"):
        fail("temperature", "a positive number", spec.temperature)
    name = spec.teacher_name
    if not isinstance(name, (str, type(None))):
        fail("teacher_name", "a text, or None", name)
    return {
        "from_logits": check_flag("from_logits", spec.from_logits),
        "temperature": temperature,
        "teacher_name": None if name is None else str(name),
    }


def check_spec(spec: Any, kind: type) -> None:
    """Require a spec of the kind, not a dictionary of its fields."""
    if not isinstance(spec, kind):
        fail("spec", f"a {kind.__name__}", spec)


def read_spec(kind: type[Spec], stored: dict[str, Any]) -> Spec:
    """The spec in a file's record.

    Earlier stores may have any JSON as the name of the teacher.
    """
    fields = {**stored}
    name = fields.get("teacher_name")
    if not isinstance(name, (str, type(None))):
        fields["teacher_name"] = str(name)
    return kind(**fields)


def array_formats(
    spec: SoftLabelSpec, num_classes: int, *, logs: bool = True
) -> dict[str, Format]:
    """Name, dtype and columns of each array on disk.

    Args:
        spec: What is stored.
        num_classes: C.
        logs: Whether the k largest are stored as logarithms, of which float16
            holds all that are above exp(-65504), and the mass outside of them
            too; stores of format 1 have probabilities.
    """
    dtype, k = _DTYPES[spec.dtype], spec.top_k
    if k is None:
        return {"labels": (dtype, num_classes), "fingerprints": ("<u8", None)}
    least = np.min_scalar_type(num_classes - 1).newbyteorder("<")
    classes = {"classes": (least.str, k)}
    values = (
        {"log_values": (dtype, k), "log_tail": (dtype, None)}
        if logs
        else {"values": (dtype, k)}
    )
    return {**classes, **values, "fingerprints": ("<u8", None)}


def encode(
    spec: SoftLabelSpec, outputs: Any, *, logs: bool = True
) -> dict[str, Any]:
    """The arrays of rows `(n, C)`, float64, as they are put on disk."""
    dtype = _DTYPES[spec.dtype]
    # A logit that overflows float16 is reported by the caller; log(0) is -inf.
    with np.errstate(over="ignore", divide="ignore"):
        if spec.top_k is None:
            return {"labels": outputs.astype(dtype)}
        order = np.argsort(-outputs, axis=-1, kind="stable")
        top = order[:, : spec.top_k]
        values = np.take_along_axis(outputs, top, axis=-1)
        formats = array_formats(spec, outputs.shape[1])
        classes = top.astype(formats["classes"][0])
        if not logs:
            return {"classes": classes, "values": values.astype(dtype)}
        rest = np.take_along_axis(outputs, order[:, spec.top_k :], axis=-1)
        return {
            "classes": classes,
            "log_values": np.log(values).astype(dtype),
            "log_tail": np.log(rest.sum(-1)).astype(dtype),
        }


def encode_measured(
    spec: SoftLabelSpec, outputs: Any, *, logs: bool = True
) -> tuple[dict[str, Any], Any]:
    """As `encode`; and the total variation of what is read, `(n,)`.

    Raises:
        ValueError: If the numbers are too large to be stored.
    """
    arrays = encode(spec, outputs, logs=logs)
    with np.errstate(invalid="ignore"):
        read = decode(spec, arrays, outputs.shape[1])
    if not np.isfinite(read).all():
        if spec.dtype == "float32":
            fail("teacher", "one whose outputs float32 can hold", outputs)
        fail("dtype", "'float32' for outputs so extreme", spec.dtype)
    logits = spec.from_logits
    apart = probabilities_of(read, logits) - probabilities_of(outputs, logits)
    return arrays, 0.5 * np.abs(apart).sum(-1)


def encode_top_k(
    spec: SoftLabelSpec, num_classes: int, given: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The arrays of the k largest, without their full rows.

    Args:
        spec: Of the store.
        num_classes: C.
        given: `classes`, `(n, k)` ints; `log_values`, their log-probabilities,
            and `log_tail`, `(n,)`, log of the mass of the others, float64.

    Returns:
        The arrays, and the total variation of their rows, `(n,)`.
    """
    formats = array_formats(spec, num_classes)
    arrays = {n: a.astype(formats[n][0]) for n, a in given.items()}
    return arrays, log_distance(given, arrays)


def log_distance(one: dict[str, Any], other: dict[str, Any]) -> Any:
    """Total variation `(n,)` of what `log_values` and `log_tail` say."""
    first, second = (
        np.exp(np.column_stack([m["log_values"], m["log_tail"]]), dtype=float)
        for m in (one, other)
    )
    first, second = (m / m.sum(-1, keepdims=True) for m in (first, second))
    return 0.5 * np.abs(first - second).sum(-1)


def decode(
    spec: SoftLabelSpec, arrays: dict[str, Any], num_classes: int
) -> Any:
    """Rows `(n, C)` float32 of what is on disk."""
    if spec.top_k is None:
        rows = arrays["labels"].astype("float32")
    else:
        classes, log_values, log_tail = top_k_of(arrays)
        rest = np.exp(log_tail) / (num_classes - spec.top_k)
        rows = np.repeat(rest[:, None], num_classes, axis=-1)
        np.put_along_axis(rows, classes, np.exp(log_values), axis=-1)
    if not spec.from_logits:
        # Rounded to float16, a row adds up to 1 within 5e-4 only.
        rows /= rows.sum(-1, keepdims=True)
    return rows


def top_k_of(arrays: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Classes int64, log-probabilities `(n, k)` and of the tail `(n,)`."""
    classes = arrays["classes"].astype("int64")
    if "log_values" in arrays:
        log_values = arrays["log_values"].astype("float32")
        return classes, log_values, arrays["log_tail"].astype("float32")
    values = arrays["values"].astype("float32")
    tail = np.maximum(1 - values.sum(-1), 0)
    with np.errstate(divide="ignore"):
        return classes, np.log(values), np.log(tail)


def probabilities_of(rows: Any, from_logits: bool) -> Any:
    """Probabilities in float64, of rows of either kind."""
    rows = rows.astype("float64")
    if from_logits:
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    return rows / rows.sum(-1, keepdims=True)
