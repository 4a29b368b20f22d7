"""Stored teacher outputs: written once, then read for every student."""

from keras_ptloss.soft_labels.inputs import fingerprint
from keras_ptloss.soft_labels.soft_labels import SoftLabels

__all__ = ["SoftLabels", "fingerprint"]
