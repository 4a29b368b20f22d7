"""Losses of a teacher and a student: Eq. 7 and what the paper compares with."""

from keras_ptloss.losses._baselines import (
    Flooding,
    FocalLoss,
    LabelPerturbedLoss,
    LabelSmoothingLoss,
)
from keras_ptloss.losses._equivalents import (
    focal_epsilon,
    label_smoothing_epsilon,
    temperature_epsilon,
)
from keras_ptloss.losses._proxy_kl import ProxyKLDivergence
from keras_ptloss.losses._pt_loss import PTLoss, pt_loss

__all__ = [
    "Flooding",
    "FocalLoss",
    "LabelPerturbedLoss",
    "LabelSmoothingLoss",
    "PTLoss",
    "ProxyKLDivergence",
    "focal_epsilon",
    "label_smoothing_epsilon",
    "pt_loss",
    "temperature_epsilon",
]
