"""Teacher outputs that are stored once and read for every student."""

from keras_ptloss.soft_labels.answers import Answers, read_answers
from keras_ptloss.soft_labels.attach import attach_several
from keras_ptloss.soft_labels.inputs import fingerprint
from keras_ptloss.soft_labels.soft_labels import SoftLabels
from keras_ptloss.soft_labels.tables import Table, read_table
from keras_ptloss.soft_labels.tokens import TokenAnswers, read_tokens

__all__ = [
    "Answers",
    "SoftLabels",
    "Table",
    "TokenAnswers",
    "attach_several",
    "fingerprint",
    "read_answers",
    "read_table",
    "read_tokens",
]
