"""The correction of a teacher: what a search finds."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """Placeholder for the interface; see /work/CONTRACT.md."""

    epsilon: Any = 0.0
    temperature: Any = 1.0
    matrix: Any = None
    bias: Any = None
    log_prob_weight: float = 0.0
    prob_weight: float = 0.0
    kept_classes: tuple[int, ...] = ()
    teacher_classes: tuple[int, ...] | None = None
    from_logits: Any = False
