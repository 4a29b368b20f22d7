"""Search for the correction of a teacher."""

from keras_ptloss.search.method import Examples, Found, SearchMethod

__all__ = ["Examples", "Found", "SearchMethod"]
