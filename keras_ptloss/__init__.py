"""Knowledge distillation for Keras 3 that corrects a biased teacher."""

from keras_ptloss import losses, proxy, search
from keras_ptloss._version import __version__
from keras_ptloss.correction import Correction
from keras_ptloss.losses import PTLoss, pt_loss
from keras_ptloss.proxy import ProxyTeacher, proxy_teacher
from keras_ptloss.search import ProxyTeacherSearch, SearchResult

__all__ = [
    "Correction",
    "PTLoss",
    "ProxyTeacher",
    "ProxyTeacherSearch",
    "SearchResult",
    "__version__",
    "losses",
    "proxy",
    "proxy_teacher",
    "pt_loss",
    "search",
]
