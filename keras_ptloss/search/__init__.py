"""The search for a teacher's correction on labelled examples."""

from keras_ptloss.search._calibration_search import CalibrationSearch
from keras_ptloss.search._cross_validated import CrossValidatedSearch
from keras_ptloss.search._gradient import GradientSearch
from keras_ptloss.search._random import RandomSearch
from keras_ptloss.search._result import SearchResult
from keras_ptloss.search._search import ProxyTeacherSearch

__all__ = [
    "CalibrationSearch",
    "CrossValidatedSearch",
    "GradientSearch",
    "ProxyTeacherSearch",
    "RandomSearch",
    "SearchResult",
]
