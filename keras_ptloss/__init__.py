"""Knowledge distillation for Keras 3 that corrects a biased teacher."""

# The losses and teachers that the paper compares with.
from keras_ptloss._baselines import FilteredTeacher as FilteredTeacher
from keras_ptloss._baselines import Flooding as Flooding
from keras_ptloss._baselines import FocalLoss as FocalLoss
from keras_ptloss._baselines import LabelPerturbedLoss as LabelPerturbedLoss
from keras_ptloss._baselines import LabelSmoothingLoss as LabelSmoothingLoss

# The loss, the solver, the search.
# Training: from a live teacher, or from stored outputs.
from keras_ptloss._distiller import Distiller as Distiller

# PTLoss as other losses (Appendix A.1).
from keras_ptloss._equivalents import focal_epsilon as focal_epsilon
from keras_ptloss._equivalents import (
    label_smoothing_epsilon as label_smoothing_epsilon,
)
from keras_ptloss._equivalents import temperature_epsilon as temperature_epsilon

# Judging and serving students.
from keras_ptloss._export import export_student as export_student
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

# Figures.
from keras_ptloss._plots import plot_distance_accuracy as plot_distance_accuracy
from keras_ptloss._plots import plot_loss_curve as plot_loss_curve
from keras_ptloss._plots import plot_proxy_teacher as plot_proxy_teacher
from keras_ptloss._plots import plot_reliability as plot_reliability
from keras_ptloss._plots import plot_search as plot_search
from keras_ptloss._proxy_teacher import ProxyTeacherResult as ProxyTeacherResult
from keras_ptloss._proxy_teacher import proxy_teacher as proxy_teacher
from keras_ptloss._proxy_teacher_layer import ProxyTeacher as ProxyTeacher
from keras_ptloss._search import ProxyTeacherSearch as ProxyTeacherSearch
from keras_ptloss._search import SearchResult as SearchResult
from keras_ptloss._soft_label_import import ImportReport as ImportReport
from keras_ptloss._soft_label_import import (
    import_soft_labels as import_soft_labels,
)
from keras_ptloss._soft_label_spec import SoftLabelSpec as SoftLabelSpec
from keras_ptloss._soft_labels import SoftLabels as SoftLabels
from keras_ptloss._soft_labels import with_retries as with_retries
from keras_ptloss._version import __version__ as __version__
