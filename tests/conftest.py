"""Settings that must be made before a backend starts."""

import keras

pytest_plugins = ["required_packages"]


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.config.backend()}"


def pytest_configure():
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # Two devices, for the distribution strategies.
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
