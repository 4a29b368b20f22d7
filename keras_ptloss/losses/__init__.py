"""Losses between a teacher and a student: PTLoss (Eq. 7) and baselines."""

# The old modules stay until their replacements are merged.
from keras_ptloss.losses._fused_top_k import fused_top_k_pt_loss
from keras_ptloss.losses._label_perturbed import LabelPerturbedLoss
from keras_ptloss.losses._top_k import TopKPTLoss, top_k_pt_loss
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
    "LabelPerturbedLoss",
    "LabelSmoothingLoss",
    "PTLoss",
    "TeacherLoss",
    "TopKPTLoss",
    "focal_epsilon",
    "fused_top_k_pt_loss",
    "label_smoothing_epsilon",
    "pt_loss",
    "temperature_epsilon",
    "top_k_pt_loss",
]
