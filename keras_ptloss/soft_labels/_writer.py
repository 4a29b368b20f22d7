"""The writing of a store of soft labels, in steps that may be cut anywhere."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss._checks import check_count, fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels import _store
from keras_ptloss.soft_labels._journal import Journal, reserve, sync
from keras_ptloss.soft_labels._spec import (
    SoftLabelSpec,
    array_formats,
    encode_measured,
)


def with_num_examples(spec: SoftLabelSpec, dataset: Any) -> SoftLabelSpec:
    """Complete `spec` by the length of the data set."""
    if not data.is_streamed(dataset):
        found = data.length(dataset)
        if spec.num_examples not in (None, found):
            fail("num_examples", f"the data set's {found}", spec.num_examples)
        return dataclasses.replace(spec, num_examples=found)
    if spec.num_examples is None:
        fail(
            "num_examples",
            "given, as spec=SoftLabelSpec(num_examples=...), because such a"
            " data set does not tell its length",
            None,
        )
    return spec


class ShardWriter(Journal):
    """Writes one shard into files of its whole length, reserved at once."""

    rows, read = "rows", staticmethod(_store.read_manifest)

    def __init__(
        self, store: Path, spec: SoftLabelSpec, shard: tuple[int, int]
    ) -> None:
        total = check_count("num_examples", spec.num_examples)
        self._total = total
        if not isinstance(shard, tuple) or len(shard) != 2:
            fail("shard", "a tuple (index, count)", shard)
        index = check_count("shard", shard[0], at_least=0)
        count = check_count("shard", shard[1])
        if index >= count or count > total:
            fail(
                "shard",
                f"(index, count) with index < count <= {total} examples",
                shard,
            )
        super().__init__(store, (index, count), spec)
        self.start, self.stop = _store.shard_rows(spec, index, count)
        self._offsets: dict[str, int] = {}

    @property
    def stored(self) -> int:
        """How many rows of the shard are stored."""
        return self.manifest.get("stored", 0)

    @property
    def num_classes(self) -> int | None:
        """The number of classes, as far as known."""
        if self.manifest:
            return int(self.manifest["num_classes"])
        names = self.spec.class_names
        return len(names) if names else self.spec.num_classes

    def _stored_fingerprints(self) -> Any:
        hashes = _store.load(self.directory, "fingerprints")
        return np.array(hashes[: self.stored])

    def _create(self, num_classes: int) -> None:
        """Preallocate the arrays; the manifest that counts them is last."""
        rows = self.stop - self.start
        arrays = array_formats(self.spec, num_classes)
        for name, (dtype, columns) in arrays.items():
            path = self.path(name)
            np.lib.format.open_memmap(
                path,
                mode="w+",
                dtype=np.dtype(dtype),
                shape=(rows,) if columns is None else (rows, columns),
            )
            reserve(path)
            sync(path)
        self.put_manifest(
            {
                "format": _store.FORMATS[-1],
                "spec": dataclasses.asdict(self.spec),
                "num_classes": num_classes,
                "shard": list(self.shard),
                "rows": [self.start, self.stop],
                "stored": 0,
                "total_variation": {"sum": 0.0, "max": 0.0},
                "checksums": None,
            }
        )
        self._open_files()

    def _open_files(self) -> None:
        rows = self.stop - self.start
        for name, form in _store.formats_of(self.manifest).items():
            array = _store.map_array(self.directory, name, form, rows, None)
            self._offsets[name] = array.offset
            self.open_file(name)

    def missing(
        self, dataset: Any, batch_size: int
    ) -> Iterator[tuple[int, Any, Any]]:
        """Yield `(position, inputs, fingerprints)` of what is not stored.

        The stored rows are compared with `dataset` on the way.
        """
        for row, x in data.batches(
            dataset,
            batch_size=batch_size,
            start=self.start,
            stop=self.stop,
            total=self._total,
        ):
            found, first = data.fingerprint(x), row - self.start
            known = max(0, min(len(found), self.stored - first))
            if known:
                rows = np.arange(first, first + known)
                data.check_differing(
                    self.fingerprints, found[:known], rows, row
                )
            if known < len(found):
                x = data.take(x, slice(known, None))
                yield row + known, x, found[known:]

    def append(self, hashes: Any, outputs: Any) -> None:
        """Store the next rows, `(n, C)` float64."""
        num_classes = outputs.shape[1]
        self._check_top_k(num_classes)
        logs = not self.manifest or _store.has_logs(self.manifest)
        encoded, distance = encode_measured(self.spec, outputs, logs=logs)
        self.append_encoded(hashes, encoded, num_classes, distance)

    def append_encoded(
        self,
        hashes: Any,
        encoded: dict[str, Any],
        num_classes: int,
        distance: Any,
    ) -> None:
        """Store the next rows, as `encode` gives them.

        Args:
            hashes: Their fingerprints, `(n,)`.
            encoded: Their arrays.
            num_classes: C.
            distance: Their total variation from the teacher's rows, `(n,)`.
        """
        self._check_top_k(num_classes)
        with self.disk():
            if not self.manifest:
                self._create(num_classes)
            for name, rows in {**encoded, "fingerprints": hashes}.items():
                offset = self._offsets[name]
                offset += self.stored * (rows.nbytes // len(rows))
                self.write_at(name, rows.tobytes(), offset)
            self.count(self.stored + len(hashes), distance)

    def _check_top_k(self, num_classes: int) -> None:
        k = self.spec.top_k
        if k is not None and k >= num_classes:
            fail("top_k", f"below the {num_classes} classes", k)
