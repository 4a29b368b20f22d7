"""Stored teacher outputs: written once, checked, attached to data."""

from keras_ptloss.soft_labels._data import fingerprint
from keras_ptloss.soft_labels._import import import_soft_labels
from keras_ptloss.soft_labels._report import ImportReport
from keras_ptloss.soft_labels._retries import with_retries
from keras_ptloss.soft_labels._several import attach_several
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec
from keras_ptloss.soft_labels._tokens.imports import (
    TokenImportReport,
    import_token_labels,
)
from keras_ptloss.soft_labels._tokens.labels import TokenLabels
from keras_ptloss.soft_labels._tokens.spec import TokenLabelSpec

__all__ = [
    "ImportReport",
    "SoftLabelSpec",
    "SoftLabels",
    "TokenImportReport",
    "TokenLabelSpec",
    "TokenLabels",
    "attach_several",
    "fingerprint",
    "import_soft_labels",
    "import_token_labels",
    "with_retries",
]
