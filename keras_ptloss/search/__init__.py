"""Search for the correction of a teacher."""

from keras_ptloss.search.gradient_search import GradientSearch
from keras_ptloss.search.method import Examples, Found, SearchMethod
from keras_ptloss.search.random_search import RandomSearch

__all__ = [
    "Examples",
    "Found",
    "GradientSearch",
    "RandomSearch",
    "SearchMethod",
]
