"""What Keras has no public way for, in one place, each with its reason."""

import keras


def supports_jit(model: keras.Model) -> bool:
    """Return whether XLA can compile every layer of a model.

    `Model.jit_compile` answers for the model's own training, on this machine;
    `Model.layers` does not show the layers inside of a layer.
    """
    return all(layer.supports_jit for layer in model._flatten_layers())


def forget_jax_state(model: keras.Model) -> None:
    """Put a model's state back into its variables, and keep no copy of it.

    `predict_on_batch` leaves one behind. Keras would put it back after an error
    before the first step of the next run, when its arrays may be gone: another
    model with the same layers may have given them away.
    """
    model.jax_state_sync()
    model._jax_state = None


def set_direction(metric: keras.metrics.Metric, better: str) -> None:
    """Say for `mode="auto"` of Keras's callbacks whether more is better.

    They read a private attribute, as they do of Keras's own metrics; there is
    no public way to be asked, and without it `EarlyStopping` refuses.
    """
    metric._direction = better


def compute_dtypes(model: keras.Model) -> set[str]:
    """Return the dtypes that a model's layers compute in.

    `Model.layers` does not show the layers inside of a layer.
    """
    return {layer.compute_dtype for layer in model._flatten_layers()}
