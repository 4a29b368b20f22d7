"""Stored teacher outputs: written once, then read for every student."""

from keras_ptloss.soft_labels.attach import attach_several
from keras_ptloss.soft_labels.inputs import fingerprint
from keras_ptloss.soft_labels.soft_labels import SoftLabels
from keras_ptloss.soft_labels.tables import Table, read_table

__all__ = ["SoftLabels", "Table", "attach_several", "fingerprint", "read_table"]
