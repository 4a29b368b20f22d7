"""Metrics of a student: against its teacher, and of its calibration."""

from keras_ptloss.metrics._calibration import (
    BrierScore,
    ExpectedCalibrationError,
)
from keras_ptloss.metrics._teacher import (
    KLToTeacher,
    TeacherAgreement,
    TotalVariationDistance,
)

__all__ = [
    "BrierScore",
    "ExpectedCalibrationError",
    "KLToTeacher",
    "TeacherAgreement",
    "TotalVariationDistance",
]
