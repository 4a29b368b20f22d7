"""Losses of a teacher and a student: Eq. 7 and what the paper compares with.

All take rows `(..., C)`. The one column of a binary head, `(..., 1)`, is the
two events that it stands for: `p` or its logit is of the second class.

What needs no class of its own, with `t` stored teacher probabilities:

* KL from the teacher: `PTLoss(0.0)`.
* Temperature scaling: `PTLoss(0.0, teacher_temperature=tau)`; vector and
  matrix scaling: with `teacher_scale` and `teacher_bias` besides.
* Hard-label mix: `Distiller(..., hard_label_loss=loss, hard_label_weight=w)`.
* One-hot labels (OHT): `keras.utils.to_categorical(labels)` for `t`, where
  `PTLoss(0.0)` is `keras.losses.CategoricalCrossentropy`.
* Early-stopped teacher (ESKD, Cho and Hariharan 2019): fit the teacher with
  `keras.callbacks.EarlyStopping("val_accuracy", patience=epochs,
  restore_best_weights=True)`; it ends with the weights of its best epoch.
* Teacher-free self-distillation (Tf-KD_self, Yuan et al. 2020): fit a student
  on labels, and distil it into `keras.models.clone_model(student)`, a copy
  with new weights, by a `Distiller` with `hard_label_weight`. The temperature
  is the teacher's alone, as everywhere here; Yuan et al. soften both.
"""

from keras_ptloss.losses._equivalents import (
    focal_epsilon,
    label_smoothing_epsilon,
    temperature_epsilon,
)
from keras_ptloss.losses._flooding import Flooding
from keras_ptloss.losses._focal import FocalLoss
from keras_ptloss.losses._fused_top_k import fused_top_k_pt_loss
from keras_ptloss.losses._label_perturbed import LabelPerturbedLoss
from keras_ptloss.losses._label_smoothing import LabelSmoothingLoss
from keras_ptloss.losses._proxy_kl import ProxyKLDivergence
from keras_ptloss.losses._pt_loss import PTLoss, pt_loss
from keras_ptloss.losses._top_k import TopKPTLoss, top_k_pt_loss

__all__ = [
    "Flooding",
    "FocalLoss",
    "LabelPerturbedLoss",
    "LabelSmoothingLoss",
    "PTLoss",
    "ProxyKLDivergence",
    "TopKPTLoss",
    "focal_epsilon",
    "fused_top_k_pt_loss",
    "label_smoothing_epsilon",
    "pt_loss",
    "temperature_epsilon",
    "top_k_pt_loss",
]
