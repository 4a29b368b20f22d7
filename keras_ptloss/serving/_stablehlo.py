"""SavedModels from JAX, in a form that TensorFlow releases read.

JAX writes StableHLO for readers that are at most four weeks older than itself,
and TensorFlow's releases lag behind by months: 2.21, the newest beside JAX
0.12, cannot load what that writes. The same module in an older form is read by
both, and by servers that were installed before.
"""

import contextlib
import pathlib

# Of 2024, as TensorFlow 2.18, the oldest that this package takes.
VERSION = "1.7.0"


def for_older_readers(directory: pathlib.Path) -> None:
    """Rewrite a SavedModel's StableHLO in the form of `VERSION`.

    A module with operations that are younger stays as it is.

    Args:
        directory: the folder of a SavedModel that the JAX backend wrote.
    """
    from jax.extend.mlir.dialects import stablehlo
    from tensorflow.core.protobuf import saved_model_pb2

    file = directory / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for graph in saved.meta_graphs:
        for function in graph.graph_def.library.function:
            for node in function.node_def:
                if node.op == "XlaCallModule":
                    module = node.attr["module"]
                    with contextlib.suppress(ValueError):
                        module.s = stablehlo.serialize_portable_artifact_str(
                            stablehlo.deserialize_portable_artifact_str(
                                module.s
                            ),
                            VERSION,
                        )
    file.write_bytes(saved.SerializeToString())
