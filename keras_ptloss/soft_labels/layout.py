"""The Arrow schema of a store, and conversion between NumPy and Arrow.

A store has rows of one of three kinds:

* `probabilities`: C probabilities for each example.
* `top_k`: the k most likely classes of each example, their log-probabilities,
  and the log-probability of all other classes together.
* `tokens`: as `top_k`, for each position of a sequence. Positions without an
  entry at the start and end of a sequence are not stored; `start` is the first
  stored position.

In memory, the last two are events of shape `(..., k + 1, 2)`, as `TopKPTLoss`
takes them: ids and natural log-probabilities. The last entry, of id -1, is all
other classes. An id of -2 means that there is no entry.
"""

import dataclasses
import json
from typing import Any, Literal

import numpy as np

from keras_ptloss._validation import check_choice, fail

REST = -1
NO_ENTRY = -2

# Columns by name. For tokens, there is also an array `offsets`: sequence i has
# the positions from `offsets[i]` to `offsets[i + 1]`.
Values = dict[str, Any]


def pyarrow() -> Any:
    """Import pyarrow, which is an optional dependency.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(
            "SoftLabels needs pyarrow, because it stores rows in Arrow files. "
            "Run `pip install pyarrow`."
        ) from error
    return pa


@dataclasses.dataclass
class Layout:
    """What kind of rows a store has.

    Args:
        kind: kind of rows; see the module's docstring.
        dtype: dtype of the probabilities or log-probabilities, `"float16"` or
            `"float32"`.
        num_classes: number of classes, for `probabilities`.
        top_k: k, for `top_k` and `tokens`.
        class_names: names of the classes, in their order.
        teacher: a name or a fingerprint of the teacher.
        from_logits: whether the teacher gave logits. Probabilities are stored
            in either case.
        has_fingerprints: whether rows have fingerprints of their inputs.
        has_ids: whether rows have the user's ids.
    """

    kind: Literal["probabilities", "top_k", "tokens"]
    dtype: str = "float16"
    num_classes: int | None = None
    top_k: int | None = None
    class_names: tuple[str, ...] | None = None
    teacher: str | None = None
    from_logits: bool = False
    has_fingerprints: bool = False
    has_ids: bool = False

    def __post_init__(self) -> None:
        """Check the user's choices; restore the tuple that JSON made a list."""
        check_choice("dtype", self.dtype, ("float16", "float32"))
        if self.class_names is not None:
            self.class_names = tuple(self.class_names)
            if len(set(self.class_names)) < len(self.class_names):
                fail("class_names", "unique names", self.class_names)

    @classmethod
    def of(cls, values: Values, **about: Any) -> "Layout":
        """Return the layout of columns; `about` has the other fields."""
        about["has_fingerprints"] = "fingerprint" in values
        about["has_ids"] = "id" in values
        if "probabilities" in values:
            num_classes = values["probabilities"].shape[1]
            return cls("probabilities", num_classes=num_classes, **about)
        top_k = values["top_ids"].shape[1]
        tokens = "offsets" in values
        return cls("tokens" if tokens else "top_k", top_k=top_k, **about)

    @classmethod
    def of_schema(cls, schema: Any) -> "Layout":
        """Return the layout in the metadata of a schema."""
        return cls(**json.loads(schema.metadata[b"keras_ptloss"]))

    def schema(self) -> Any:
        """Return the Arrow schema, with this layout as JSON metadata."""
        pa = pyarrow()
        floats = pa.float16() if self.dtype == "float16" else pa.float32()
        types = {"fingerprint": pa.uint64()} if self.has_fingerprints else {}
        if self.has_ids:
            types["id"] = pa.string()
        if self.kind == "probabilities":
            types["probabilities"] = pa.list_(floats, self.num_classes)
        else:
            entries = {
                "top_ids": pa.list_(pa.int32(), self.top_k),
                "log_probs": pa.list_(floats, self.top_k),
                "log_rest": floats,
            }
            if self.kind == "tokens":
                types["start"] = pa.int32()
                entries = {n: pa.list_(kind) for n, kind in entries.items()}
            types |= entries
        about = json.dumps(vars(self))
        return pa.schema(list(types.items()), {"keras_ptloss": about})

    def encode(self, values: Values) -> Any:
        """Return columns as an Arrow record batch."""
        pa = pyarrow()
        schema = self.schema()
        columns = []
        for name, kind in zip(schema.names, schema.types, strict=True):
            if pa.types.is_list(kind):
                offsets = pa.array(values["offsets"], pa.int32())
                array = _as_arrow(values[name], kind.value_type)
                array = pa.ListArray.from_arrays(offsets, array, type=kind)
            else:
                array = _as_arrow(values[name], kind)
            columns.append(array)
        return pa.record_batch(columns, schema=schema)


def _as_arrow(values: Any, kind: Any) -> Any:
    """Return an Arrow array of texts, of numbers, or of lists of k numbers."""
    pa = pyarrow()
    if pa.types.is_string(kind):
        return pa.array(values, kind)
    lists = pa.types.is_fixed_size_list(kind)
    numbers = kind.value_type if lists else kind
    with np.errstate(over="ignore"):  # float16 has -inf for less than -65504
        flat = np.ascontiguousarray(values, numbers.to_pandas_dtype())
    array = pa.array(flat.reshape(-1), numbers)
    return (
        pa.FixedSizeListArray.from_arrays(array, type=kind) if lists else array
    )


def views(batch: Any) -> Values:
    """Return NumPy views of a record batch's columns, and copies of ids."""
    pa = pyarrow()
    found: Values = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_list(array.type):
            found["offsets"] = array.offsets.to_numpy()
            array = array.values
        if pa.types.is_fixed_size_list(array.type):
            numbers = array.flatten().to_numpy()
            found[name] = numbers.reshape(-1, array.type.list_size)
        else:
            texts = pa.types.is_string(array.type)
            found[name] = array.to_numpy(zero_copy_only=not texts)
    return found


def events(
    values: Values, rows: Any, out: np.ndarray | None = None
) -> np.ndarray:
    """Return rows of `top_k` or `tokens` columns as events, in float32.

    The shape is `(n, k + 1, 2)`.
    """
    top_ids = values["top_ids"][rows]
    if out is None:
        out = np.empty((len(top_ids), top_ids.shape[1] + 1, 2), "float32")
    out[:, :-1, 0] = top_ids
    out[:, :-1, 1] = values["log_probs"][rows]
    out[:, -1, 0] = REST
    out[:, -1, 1] = values["log_rest"][rows]
    out[top_ids[:, 0] == NO_ENTRY, -1] = NO_ENTRY, 0
    return out
