"""Knowledge distillation for Keras 3 that corrects a biased teacher."""

from keras_ptloss._losses import PTLoss as PTLoss
from keras_ptloss._losses import pt_loss as pt_loss
from keras_ptloss._proxy_teacher import ProxyTeacherResult as ProxyTeacherResult
from keras_ptloss._proxy_teacher import proxy_teacher as proxy_teacher
from keras_ptloss._search import ProxyTeacherSearch as ProxyTeacherSearch
from keras_ptloss._search import SearchResult as SearchResult
