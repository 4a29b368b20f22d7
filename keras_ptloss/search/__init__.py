"""The search for a teacher's correction on labelled examples."""

from keras_ptloss.search._search import ProxyTeacherSearch, SearchResult

__all__ = ["ProxyTeacherSearch", "SearchResult"]
