"""Knowledge distillation for Keras 3 that corrects a biased teacher.

The names that most users need are here. Others are in the modules, such as
`keras_ptloss.losses.FocalLoss` and `keras_ptloss.metrics.BrierScore`.
"""

from keras_ptloss import (
    callbacks,
    correction,
    distiller,
    losses,
    metrics,
    plots,
    proxy,
    search,
    serving,
    soft_labels,
    targets,
)
from keras_ptloss._version import __version__
from keras_ptloss.correction import Correction
from keras_ptloss.distiller import Distiller
from keras_ptloss.losses import PTLoss, pt_loss
from keras_ptloss.proxy import ProxyTeacher, proxy_teacher
from keras_ptloss.search import ProxyTeacherSearch, SearchResult
from keras_ptloss.serving import export_student
from keras_ptloss.soft_labels import SoftLabels
from keras_ptloss.targets import distillation_targets

__all__ = [
    "Correction",
    "Distiller",
    "PTLoss",
    "ProxyTeacher",
    "ProxyTeacherSearch",
    "SearchResult",
    "SoftLabels",
    "__version__",
    "callbacks",
    "correction",
    "distillation_targets",
    "distiller",
    "export_student",
    "losses",
    "metrics",
    "plots",
    "proxy",
    "proxy_teacher",
    "pt_loss",
    "search",
    "serving",
    "soft_labels",
    "targets",
]
