"""What Keras has no public way for, in one place, each with its reason."""

import keras


def supports_jit(model: keras.Model) -> bool:
    """Return whether XLA can compile every layer of a model.

    `Model.jit_compile` answers for the model's own training, on this machine;
    `Model.layers` does not show the layers inside of a layer.
    """
    return all(layer.supports_jit for layer in model._flatten_layers())
