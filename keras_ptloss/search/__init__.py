"""The search for a teacher's correction on a few labelled examples."""

from keras_ptloss.search.gradient_search import GradientSearch
from keras_ptloss.search.method import Examples, Found, SearchMethod
from keras_ptloss.search.random_search import RandomSearch
from keras_ptloss.search.result import SearchResult
from keras_ptloss.search.ridge import RidgeSearch
from keras_ptloss.search.search import ProxyTeacherSearch

__all__ = [
    "Examples",
    "Found",
    "GradientSearch",
    "ProxyTeacherSearch",
    "RandomSearch",
    "RidgeSearch",
    "SearchMethod",
    "SearchResult",
]
