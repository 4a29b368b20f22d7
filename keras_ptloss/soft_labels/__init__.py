"""Stored teacher outputs: written once, then read for every student."""

from keras_ptloss.soft_labels.answers import (
    Answers,
    import_answers,
    read_answers,
)
from keras_ptloss.soft_labels.inputs import fingerprint
from keras_ptloss.soft_labels.soft_labels import SoftLabels
from keras_ptloss.soft_labels.tokens import (
    TokenAnswers,
    import_tokens,
    read_tokens,
)

__all__ = [
    "Answers",
    "SoftLabels",
    "TokenAnswers",
    "fingerprint",
    "import_answers",
    "import_tokens",
    "read_answers",
    "read_tokens",
]
