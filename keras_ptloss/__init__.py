"""Knowledge distillation for Keras 3 that corrects a biased teacher."""

from keras_ptloss import losses, proxy, search
from keras_ptloss._version import __version__
from keras_ptloss.correction import Correction
from keras_ptloss.losses import PTLoss, pt_loss
from keras_ptloss.proxy import ProxyTeacher, proxy_teacher
from keras_ptloss.search import ProxyTeacherSearch, SearchResult
from keras_ptloss.targets import DistillationTargets, distillation_targets

__all__ = [
    "Correction",
    "DistillationTargets",
    "PTLoss",
    "ProxyTeacher",
    "ProxyTeacherSearch",
    "SearchResult",
    "__version__",
    "distillation_targets",
    "losses",
    "proxy",
    "proxy_teacher",
    "pt_loss",
    "search",
]
