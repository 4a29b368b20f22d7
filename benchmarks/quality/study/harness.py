"""What a study is made of: a task, methods, and rows that are appended.

A task is data, a teacher, a student and a budget; a method is a loss and its
targets. Every method trains the same student on the same seeds. A method with
several settings tries them all with the first seed, and keeps the one whose
student is best on the validation rows; the other seeds use that.

Rows go to a CSV as they come. A study that was stopped goes on where it was.
"""

import csv
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import scipy.special

from benchmarks.quality.proxy import judge

COLUMNS = (
    "method",
    "setting",
    "seed",
    "accuracy_last",
    "accuracy_best",
    "validation_best",
    "agreement",
    "nll",
    "ece",
    "search_seconds",
    "train_seconds",
    "note",
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples: inputs, the teacher's probabilities, and true classes.

    Attributes:
        x: an array, or a dict of arrays, whose first axis is examples.
        labels: `(N,)`. Those of the distillation set are not for a method that
            is to run without labels.
        teacher: `(N, C)`, or None where the teacher has not seen the rows; of
            several teachers their mean.
        several: the teachers, `(N, C)` each, where there are several.
    """

    x: Any
    labels: np.ndarray
    teacher: np.ndarray | None = None
    several: tuple[np.ndarray, ...] = ()

    @property
    def outputs(self) -> Any:
        """What a search is given: the teacher, or all of them."""
        return list(self.several) or self.teacher

    @property
    def side_by_side(self) -> np.ndarray:
        """What a loss is given: the teacher, or all in one row."""
        if not self.several:
            return self.teacher
        return np.concatenate(self.several, axis=1)

    def take(self, index: Any) -> "Rows":
        """Return the rows at `index`."""
        x = (
            {key: value[index] for key, value in self.x.items()}
            if isinstance(self.x, dict)
            else self.x[index]
        )
        teacher = None if self.teacher is None else self.teacher[index]
        several = tuple(one[index] for one in self.several)
        return Rows(x, self.labels[index], teacher, several)


@dataclasses.dataclass(frozen=True)
class Task:
    """One distillation problem.

    Attributes:
        name: names its files in `benchmarks/results`.
        search: labelled rows for the search of epsilon.
        distill: the rows that students are trained on.
        test: what students are judged on.
        make_student: builds an untrained model that ends in logits.
        make_optimizer: of the number of steps that it will make.
        epochs: passes over the distillation rows.
        batch_size: of the distillation.
        other_tests: further test sets, by name; their accuracy, last epoch, is
            in a row's note.
        validation: labelled rows that choose settings and the best epoch; None
            for the search's.
        teachers: probabilities of other teachers on the distillation rows.
        truth: the true distribution on the distillation rows, where known.
        labelled: whether the distillation rows' labels belong to the problem.
    """

    name: str
    search: Rows
    distill: Rows
    test: Rows
    make_student: Callable[[], Any]
    make_optimizer: Callable[[int], Any]
    epochs: int
    batch_size: int
    other_tests: dict[str, Rows] = dataclasses.field(default_factory=dict)
    validation: Rows | None = None
    teachers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    truth: np.ndarray | None = None
    labelled: bool = False

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.search.teacher.shape[1]


@dataclasses.dataclass(frozen=True)
class Training:
    """What a method makes of a task: inputs, targets and a loss.

    Attributes:
        x: inputs, as in `Rows`.
        targets: what the loss takes as `y_true`.
        loss: a Keras loss of targets and logits.
        weights: weights of the examples, `(N,)`, or None.
        note: what is worth telling of it, such as the search's choice.
    """

    x: Any
    targets: np.ndarray
    loss: Any
    weights: np.ndarray | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Method:
    """A name, the settings to choose from, and what they make of a task.

    Attributes:
        name: as in the tables.
        prepare: of `(task, setting, seed)`, returns a `Training`.
        settings: chosen from with the first seed.
        fits: whether a task allows the method.
    """

    name: str
    prepare: Callable[[Task, Any, int], Training]
    settings: tuple[Any, ...] = (None,)
    fits: Callable[[Task], bool] = lambda task: True


class BestEpoch(keras.callbacks.Callback):
    """Keep the weights of the epoch that is best on labelled rows."""

    def __init__(self, rows: Rows) -> None:
        """Set the rows that decide."""
        super().__init__()
        self.rows = rows
        self.accuracy = -1.0
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Judge the epoch; the first of equals stays."""
        logits = predict(self.model, self.rows.x)
        accuracy = float(np.mean(logits.argmax(axis=1) == self.rows.labels))
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self.weights = self.model.get_weights()


def predict(model: Any, x: Any) -> np.ndarray:
    """Return logits `(N, C)`."""
    return model.predict(x, batch_size=1000, verbose=0)


def train(task: Task, training: Training, seed: int) -> tuple[Any, BestEpoch]:
    """Train one student; return it, and its best epoch."""
    keras.utils.set_random_seed(seed)
    student = task.make_student()
    steps = task.epochs * -(-len(training.targets) // task.batch_size)
    student.compile(task.make_optimizer(steps), loss=training.loss)
    best = BestEpoch(task.validation or task.search)
    student.fit(
        training.x,
        training.targets,
        sample_weight=training.weights,
        batch_size=task.batch_size,
        epochs=task.epochs,
        callbacks=[best],
        verbose=0,
    )
    return student, best


def run_one(task: Task, method: Method, setting: Any, seed: int) -> dict:
    """Prepare, train and judge; return a row of the table."""
    begin = time.perf_counter()
    training = method.prepare(task, setting, seed)
    prepared = time.perf_counter()
    student, best = train(task, training, seed)
    trained = time.perf_counter()
    rows = task.validation or task.search
    agreement = np.mean(
        predict(student, rows.x).argmax(axis=1) == rows.teacher.argmax(axis=1)
    )
    last = judge(softmax(predict(student, task.test.x)), task.test.labels)
    note = training.note
    for name, other in task.other_tests.items():
        right = predict(student, other.x).argmax(axis=1) == other.labels
        note += f" {name} {right.mean():.4f}"
    student.set_weights(best.weights)
    kept = judge(softmax(predict(student, task.test.x)), task.test.labels)
    return {
        "method": method.name,
        "setting": "" if setting is None else str(setting),
        "seed": str(seed),
        "accuracy_last": f"{last['accuracy']:.5f}",
        "accuracy_best": f"{kept['accuracy']:.5f}",
        "validation_best": f"{best.accuracy:.5f}",
        "agreement": f"{agreement:.4f}",
        "nll": f"{last['nll']:.4f}",
        "ece": f"{last['ece']:.4f}",
        "search_seconds": f"{prepared - begin:.2f}",
        "train_seconds": f"{trained - prepared:.1f}",
        "note": note.strip(),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities, in float64."""
    return scipy.special.softmax(logits.astype("float64"), axis=1)


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows that a study has so far."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def chosen_setting(rows: list[dict[str, str]], method: Method) -> str:
    """Return the setting whose first student is best on the validation rows.

    Raises:
        LookupError: if not all of them have been tried.
    """
    first = [row for row in rows if row["method"] == method.name]
    first = [row for row in first if row["seed"] == "0"]
    if len(first) < len(method.settings):
        raise LookupError(f"{method.name}: not all settings have been tried")
    return max(first, key=lambda r: float(r["validation_best"]))["setting"]


def run(
    task: Task, methods: list[Method], seeds: int, path: pathlib.Path
) -> None:
    """Append the rows that are missing, all methods of a seed after another."""
    rows = read(path)
    done = {(r["method"], r["setting"], r["seed"]) for r in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for seed in range(seeds):
            for method in methods:
                settings = method.settings
                if seed:
                    name = chosen_setting(rows, method)
                    settings = [s for s in settings if str(s or "") == name]
                for setting in settings:
                    key = (method.name, str(setting or ""), str(seed))
                    if key in done:
                        continue
                    row = run_one(task, method, setting, seed)
                    rows.append(row)
                    writer.writerow(row)
                    file.flush()
                    print(
                        f"{task.name} {key} last {row['accuracy_last']} best "
                        f"{row['accuracy_best']} {row['train_seconds']} s "
                        f"{row['note']}",
                        flush=True,
                    )
