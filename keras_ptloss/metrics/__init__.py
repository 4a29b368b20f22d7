"""Metrics of a student: against its teacher, and of its calibration."""

from keras_ptloss.metrics._metrics import (
    BrierScore,
    ExpectedCalibrationError,
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
