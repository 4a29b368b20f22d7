"""Stored teacher outputs: written once, checked, attached to data."""

from keras_ptloss.soft_labels._import import ImportReport, import_soft_labels
from keras_ptloss.soft_labels._retries import with_retries
from keras_ptloss.soft_labels._several import attach_several
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec

__all__ = [
    "ImportReport",
    "SoftLabelSpec",
    "SoftLabels",
    "attach_several",
    "import_soft_labels",
    "with_retries",
]
