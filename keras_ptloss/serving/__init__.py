"""A trained student as versioned files that a server loads."""

from keras_ptloss.serving._export import export_student

__all__ = ["export_student"]
