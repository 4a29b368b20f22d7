"""Train a student from live, frozen teachers."""

from keras_ptloss.distiller._distiller import Distiller

__all__ = ["Distiller"]
