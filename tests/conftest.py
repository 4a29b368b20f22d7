"""Settings that must be made before a backend starts."""

import os
import tempfile

# Many tests compile the same programs. A cache on disk, which the workers of a
# run share, saves 40 % of the time on JAX. It is deleted at the end of the run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="keras_ptloss-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The same for programs that TensorFlow compiles by XLA.
if "--tf_xla_persistent_cache" not in os.environ.get("TF_XLA_FLAGS", ""):
    XLA_CACHE = tempfile.TemporaryDirectory(prefix="keras_ptloss-tests-")
    os.environ["TF_XLA_FLAGS"] = (
        os.environ.get("TF_XLA_FLAGS", "")
        + f" --tf_xla_persistent_cache_directory={XLA_CACHE.name}"
    )

import keras
import pytest

pytest_plugins = ["required_packages"]


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.config.backend()}"


def pytest_configure():
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # Two devices, for the tests of distribution strategies.
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )


@pytest.fixture(autouse=True, scope="module")
def free_memory():
    """Drop compiled programs, which JAX keeps as long as the process lives."""
    yield
    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()
