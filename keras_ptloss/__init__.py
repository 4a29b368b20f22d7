"""Knowledge distillation for Keras 3 that corrects a biased teacher."""

from keras_ptloss._distiller import Distiller as Distiller
from keras_ptloss._equivalents import focal_epsilon as focal_epsilon
from keras_ptloss._equivalents import (
    label_smoothing_epsilon as label_smoothing_epsilon,
)
from keras_ptloss._equivalents import temperature_epsilon as temperature_epsilon
from keras_ptloss._losses import PTLoss as PTLoss
from keras_ptloss._losses import pt_loss as pt_loss
from keras_ptloss._metrics import BrierScore as BrierScore
from keras_ptloss._metrics import (
    ExpectedCalibrationError as ExpectedCalibrationError,
)
from keras_ptloss._metrics import KLToTeacher as KLToTeacher
from keras_ptloss._metrics import TeacherAgreement as TeacherAgreement
from keras_ptloss._metrics import (
    TotalVariationDistance as TotalVariationDistance,
)
from keras_ptloss._proxy_teacher import ProxyTeacherResult as ProxyTeacherResult
from keras_ptloss._proxy_teacher import proxy_teacher as proxy_teacher
from keras_ptloss._proxy_teacher_layer import ProxyTeacher as ProxyTeacher
from keras_ptloss._search import ProxyTeacherSearch as ProxyTeacherSearch
from keras_ptloss._search import SearchResult as SearchResult
from keras_ptloss._version import __version__ as __version__
