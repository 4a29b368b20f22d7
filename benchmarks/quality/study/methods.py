"""The methods that are compared: the paper's (Table 1), and more.

Each makes inputs, targets and a loss of a task. Where the distillation rows
have no labels, a method has those of the search rows alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.quality.proxy import choice
from benchmarks.quality.study.harness import (
    Method,
    Task,
    Training,
    predict,
    softmax,
    train,
)
from keras_ptloss import ProxyTeacherSearch, PTLoss, proxy_teacher
from keras_ptloss.losses import (
    Flooding,
    FocalLoss,
    LabelPerturbedLoss,
    LabelSmoothingLoss,
    ProxyKLDivergence,
)
from keras_ptloss.search import (
    CalibrationSearch,
    CrossValidatedSearch,
    GradientSearch,
    RandomSearch,
    SearchResult,
)
from keras_ptloss.search._objectives import OBJECTIVES

PROBABILITIES = {"from_logits": True, "teacher_from_logits": False}
KL = PTLoss(0.0, **PROBABILITIES)
CEILING = "true labels on all"


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return rows `(N, C)` of 0 and 1."""
    return np.eye(classes, dtype="float32")[labels]


def distil(
    name: str, loss: Callable[[Any], Any], settings: Any = (None,)
) -> Method:
    """A loss, of its setting, on the teacher's outputs."""

    def prepare(task: Task, setting: Any, seed: int) -> Training:
        return Training(task.distill.x, task.distill.teacher, loss(setting))

    return Method(name, prepare, settings)


def labels_alone(task: Task, setting: Any, seed: int) -> Training:
    """The search's labels, as many steps as the others make."""
    rows = task.search
    copies = -(-len(task.distill.labels) // len(rows.labels))
    rows = rows.take(np.tile(np.arange(len(rows.labels)), copies))
    return Training(rows.x, one_hot(rows.labels, task.classes), KL)


def one_hot_labels(task: Task, setting: Any, seed: int) -> Training:
    """All true labels of the distillation rows: OHT, and the ceiling."""
    rows = task.distill
    return Training(rows.x, one_hot(rows.labels, task.classes), KL)


def smoothed_labels(task: Task, setting: Any, seed: int) -> Training:
    """True labels, smoothed (LS, as Ren et al. run it)."""
    rows = task.distill
    loss = LabelSmoothingLoss(setting, **PROBABILITIES)
    return Training(rows.x, one_hot(rows.labels, task.classes), loss)


def true_distribution(task: Task, setting: Any, seed: int) -> Training:
    """The distribution that the data were drawn from (GT)."""
    return Training(task.distill.x, task.truth.astype("float32"), KL)


def other_teacher(name: str) -> Any:
    """KL from another of the task's teachers."""

    def prepare(task: Task, setting: Any, seed: int) -> Training:
        return Training(task.distill.x, task.teachers[name], KL)

    return prepare


def self_teacher(task: Task, setting: Any, seed: int) -> Training:
    """A student that was trained on labels teaches a new one (Tf-KD_self)."""
    labels = one_hot_labels if task.labelled else labels_alone
    student, _ = train(task, labels(task, None, seed), seed)
    teacher = softmax(predict(student, task.distill.x)).astype("float32")
    return Training(task.distill.x, teacher, KL)


def hard_label_mix(task: Task, setting: float, seed: int) -> Training:
    """KL on the distillation rows and the search's labels, weighed together.

    `setting` is the labels' share of the weight.
    """
    few, many = len(task.search.labels), len(task.distill.labels)
    targets = one_hot(task.search.labels, task.classes)
    weights = np.concatenate(
        [np.full(few, setting / few), np.full(many, (1 - setting) / many)]
    )
    return Training(
        join(task.search.x, task.distill.x),
        np.concatenate([targets, task.distill.teacher]),
        KL,
        weights=(weights / weights.mean()).astype("float32"),
    )


def join(first: Any, second: Any) -> Any:
    """Join inputs along the examples."""
    if isinstance(first, dict):
        return {key: join(first[key], second[key]) for key in first}
    return np.concatenate([first, second])


def released_code(task: Task, setting: Any, seed: int) -> Training:
    """The authors' released loss: order 1, on the label's probability."""
    labels = one_hot(task.distill.labels, task.classes)
    targets = np.stack([task.distill.teacher, labels], axis=-2)
    loss = LabelPerturbedLoss(0.1, **PROBABILITIES)
    return Training(task.distill.x, targets, loss)


def search(
    name: str, method: Any, loss: Callable[..., Any] = SearchResult.loss
) -> Method:
    """A search, seeded as the run, and its loss on the teacher's outputs.

    Args:
        name: the method's.
        method: of `ProxyTeacherSearch`.
        loss: makes the loss of the search's result.
    """

    def prepare(task: Task, setting: Any, seed: int) -> Training:
        found = ProxyTeacherSearch(method, seed=seed).search(
            task.search.outputs, task.search.labels, verbose=False
        )
        made = loss(found, from_logits=True)
        note = describe(found)
        if not found.correction.is_identity:
            note += f"; {type(made).__name__}"
        rows = task.distill
        return Training(rows.x, rows.side_by_side, made, note=note)

    return Method(name, prepare)


def describe(found: SearchResult) -> str:
    """Say what a search found, in a line."""
    text = f"score {found.score_at_zero:.4f} -> {found.score:.4f}"
    if choice(found):
        return f"{text}; {choice(found)}"
    for name in ("scale", "epsilon"):
        values = getattr(found.correction, name)
        if values.ndim < 2 and np.any(values != (name == "scale")):
            text += f"; {name} {np.round(values, 3).tolist()}"
    return text


def kl_to_the_proxy(
    found: SearchResult, *, from_logits: bool
) -> ProxyKLDivergence:
    """KL to the corrected teacher: the optimum of PTLoss by another way."""
    return ProxyKLDivergence(found.correction, from_logits=from_logits)


def by_pt_loss(found: SearchResult, *, from_logits: bool) -> Any:
    """PTLoss, where it can carry what the search found."""
    return found.correction.loss(from_logits=from_logits)


def both_ways(order: int) -> list[Method]:
    """One correction by PTLoss and by KL to its proxy, to compare the two.

    It has an epsilon, and nothing after it, whatever the default search finds.
    """
    method = GradientSearch(
        order=order, per_class=True, calibration="vector", penalty=0.01
    )
    return [
        search("vector + per class, PTLoss", method, by_pt_loss),
        search("vector + per class, KL to the proxy", method, kl_to_the_proxy),
    ]


def random_proxies(count: int, order: int) -> list[Method]:
    """PTLoss with random coefficients, as Algorithm 1 draws them (Fig. 3).

    The note holds how far the proxies are from the truth on the distillation
    rows (mean L2), and their scores on the search's rows.
    """
    generator = np.random.default_rng(0)
    return [
        _random_proxy(k, generator.uniform(-1.0, 10.0, size=order))
        for k in range(count)
    ]


def _random_proxy(number: int, epsilon: np.ndarray) -> Method:
    def prepare(task: Task, setting: Any, seed: int) -> Training:
        q = proxy_teacher(task.distill.teacher, epsilon).probabilities
        distances = {"l2": np.linalg.norm(q - task.truth, axis=1).mean()}
        q = proxy_teacher(task.search.teacher, epsilon).probabilities
        for name, objective in OBJECTIVES.items():
            distances[name] = objective.score(q, task.search.labels)
        note = " ".join(f"{k}={float(v):.6f}" for k, v in distances.items())
        loss = PTLoss(epsilon, **PROBABILITIES)
        return Training(task.distill.x, task.distill.teacher, loss, note=note)

    return Method(f"proxy {number}", prepare, fits=known_truth)


def known_truth(task: Task) -> bool:
    """Whether the distribution that the data were drawn from is known."""
    return task.truth is not None


def labelled(task: Task) -> bool:
    """Whether the distillation rows have labels."""
    return task.labelled


def all_methods(order: int = 5) -> list[Method]:
    """Return every method, the cheap and telling ones first."""
    return [
        distil("KL", lambda setting: KL),
        search("temperature scaling", CalibrationSearch("temperature")),
        distil(
            "label smoothing",
            lambda delta: LabelSmoothingLoss(delta, **PROBABILITIES),
            (0.05, 0.1, 0.2),
        ),
        search("vector scaling", CalibrationSearch("vector")),
        search("matrix scaling", CalibrationSearch("matrix")),
        search("searched", CrossValidatedSearch(order=order)),
        search(
            "searched, by PTLoss", CrossValidatedSearch(order=order), by_pt_loss
        ),
        *both_ways(order),
        search("PTLoss, Algorithm 1", RandomSearch(order=order), by_pt_loss),
        search(
            "PTLoss, gradient per class",
            GradientSearch(order=order, per_class=True, penalty=0.01),
            by_pt_loss,
        ),
        Method(CEILING, one_hot_labels),
        Method("labels alone", labels_alone),
        Method("hard-label mix", hard_label_mix, (0.1, 0.3, 0.5)),
        search(
            "PTLoss, Algorithm 1 per class",
            RandomSearch(order=order, per_class=True),
            by_pt_loss,
        ),
        distil(
            "focal",
            lambda gamma: FocalLoss(gamma, **PROBABILITIES),
            (1.0, 2.0, 3.0),
        ),
        distil(
            "flooding",
            lambda level: Flooding(KL, level),
            (0.01, 0.03, 0.1),
        ),
        Method("Tf-KD_self", self_teacher),
        Method(
            "FilterKD",
            other_teacher("filtered"),
            fits=lambda task: "filtered" in task.teachers,
        ),
        Method(
            "ESKD",
            other_teacher("early-stopped"),
            fits=lambda task: "early-stopped" in task.teachers,
        ),
        Method("LS", smoothed_labels, (0.03,), fits=labelled),
        Method("GT", true_distribution, fits=known_truth),
        Method("released code", released_code, fits=labelled),
        *random_proxies(10, order),
    ]


def check_names(names: list[str], methods: list[Method]) -> None:
    """Raise ValueError for a name that is no method's."""
    known = [method.name for method in methods]
    for name in names:
        if name not in known:
            raise ValueError(
                f"`--methods` must be among {known}. Received: {name!r}"
            )
