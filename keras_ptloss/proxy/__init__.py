"""The proxy teacher: where a student trained with PTLoss ends. No labels."""

from keras_ptloss.proxy._layer import ProxyTeacher
from keras_ptloss.proxy._proxy_teacher import ProxyTeacherResult, proxy_teacher

__all__ = ["ProxyTeacher", "ProxyTeacherResult", "proxy_teacher"]
