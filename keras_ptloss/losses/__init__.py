"""Losses between a teacher and a student: PTLoss (Eq. 7) and baselines."""

from keras_ptloss.losses.base import TeacherLoss
from keras_ptloss.losses.baselines import (
    Flooding,
    FocalLoss,
    LabelSmoothingLoss,
    focal_epsilon,
    label_smoothing_epsilon,
    temperature_epsilon,
)
from keras_ptloss.losses.corrected_kl import CorrectedKLDivergence
from keras_ptloss.losses.pt_loss import PTLoss, pt_loss

__all__ = [
    "CorrectedKLDivergence",
    "Flooding",
    "FocalLoss",
    "LabelSmoothingLoss",
    "PTLoss",
    "TeacherLoss",
    "focal_epsilon",
    "label_smoothing_epsilon",
    "pt_loss",
    "temperature_epsilon",
]
