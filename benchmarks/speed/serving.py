"""Serve an exported student over the wire, and time it.

    pip install tensorflow-serving-api
    KERAS_BACKEND=jax python benchmarks/speed/serving.py

exports a student, serves it on loopback from a process that has neither Keras
nor this package, and sends requests: by gRPC in TensorFlow Serving's
PredictionService and, with `--rest-python`, by REST in its `:predict` form
from KServe, which wants an environment of its own:

    python -m venv /tmp/kserve && /tmp/kserve/bin/pip install kserve tensorflow
    ... serving.py --rest-python /tmp/kserve/bin/python

With `--clients 8 --seconds 120` that many clients send requests without a
pause, check every answer, and the server's memory is read on the way.

TensorFlow Serving's own program is on no package index; both servers here
load the SavedModel by `tf.saved_model.load` and call its signature
`serving_default`, as that program does. The tests use them too.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import numpy as np

MODEL = "student"


# Servers. They import what they need where they need it: each environment has
# its own packages.


class Signature:
    """`serving_default` of the highest version in `directory`."""

    def __init__(self, directory):
        """Load the version."""
        import tensorflow as tf

        versions = [
            int(entry.name)
            for entry in pathlib.Path(directory).iterdir()
            if entry.name.isdigit()
        ]
        self.version = max(versions)
        # Kept: the variables live as long as it does.
        self.model = tf.saved_model.load(
            os.path.join(directory, str(self.version))
        )
        self.function = self.model.signatures["serving_default"]
        self.specs = self.function.structured_input_signature[1]

    def __call__(self, inputs):
        """Return the outputs; ValueError for inputs that do not fit."""
        if set(inputs) != set(self.specs):
            raise ValueError(
                f"inputs must be {sorted(self.specs)}, got {sorted(inputs)}"
            )
        for name, value in inputs.items():
            spec = self.specs[name]
            if not spec.shape.is_compatible_with(value.shape):
                raise ValueError(
                    f"{name} must have shape {spec.shape}, got {value.shape}"
                )
        outputs = self.function(**inputs)
        return {name: value.numpy() for name, value in outputs.items()}


def serve_grpc(directory, port):
    """Serve PredictionService.Predict."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import (
        predict_pb2,
        prediction_service_pb2_grpc,
    )

    signature = Signature(directory)

    class PredictionService(
        prediction_service_pb2_grpc.PredictionServiceServicer
    ):
        def Predict(self, request, context):
            spec = request.model_spec
            if spec.name != MODEL:
                context.abort(
                    grpc.StatusCode.NOT_FOUND, f"no model {spec.name!r}"
                )
            try:
                inputs = {}
                for name, proto in request.inputs.items():
                    value = tf.make_ndarray(proto)
                    known = signature.specs.get(name)
                    if known is not None and known.dtype != proto.dtype:
                        raise ValueError(
                            f"{name} must be {known.dtype.name}, got "
                            + tf.as_dtype(proto.dtype).name
                        )
                    inputs[name] = value
                outputs = signature(
                    {name: tf.constant(v) for name, v in inputs.items()}
                )
            except (ValueError, TypeError, tf.errors.OpError) as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            response = predict_pb2.PredictResponse()
            response.model_spec.name = MODEL
            response.model_spec.version.value = signature.version
            for name, value in outputs.items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(), server
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def serve_rest(directory, port):
    """Serve `/v1/models/student:predict` by KServe."""
    import kserve
    import tensorflow as tf
    from kserve.errors import InvalidInput

    signature = Signature(directory)

    class Student(kserve.Model):
        def __init__(self):
            super().__init__(MODEL)
            self.ready = True

        def predict(self, payload, headers=None, response_headers=None):
            rows = payload.get("instances")
            if not isinstance(rows, list) or not rows:
                raise InvalidInput("`instances` must be a non-empty list")
            if not isinstance(rows[0], dict):  # the short form of one input
                if len(signature.specs) != 1:
                    raise InvalidInput(f"name the inputs: {signature.specs}")
                (name,) = signature.specs
                rows = [{name: row} for row in rows]
            try:
                inputs = {
                    name: tf.constant(
                        [row[name] for row in rows],
                        signature.specs[name].dtype,
                    )
                    for name in rows[0]
                }
                outputs = signature(inputs)
            except KeyError as error:
                raise InvalidInput(f"no such input: {error}") from error
            except (ValueError, TypeError, tf.errors.OpError) as error:
                raise InvalidInput(str(error)) from error
            columns = {
                name: [
                    v.decode() if isinstance(v, bytes) else v
                    for v in value.tolist()
                ]
                for name, value in outputs.items()
            }
            return {
                "predictions": [
                    dict(zip(columns, row, strict=True))
                    for row in zip(*columns.values(), strict=True)
                ]
            }

    kserve.ModelServer(
        http_port=port, enable_grpc=False, enable_docs_url=False
    ).start([Student()])


# Clients.


@contextlib.contextmanager
def server(kind, directory, python=sys.executable, timeout=120):
    """Run a server of `kind` in a process; yield the process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, __file__, "--serve", kind, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--directory", directory], stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + timeout
            while not listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"no server: {log.read()[-2000:]!r}")
                time.sleep(0.1)
            yield process, port
        finally:
            process.terminate()
            process.wait(30)


def listens(port):
    """Return whether something takes connections at `port`."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def grpc_client(port):
    """Yield a function from named arrays to named arrays, over gRPC."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import (
        predict_pb2,
        prediction_service_pb2_grpc,
    )

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def predict(inputs, model=MODEL):
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model
            request.model_spec.signature_name = "serving_default"
            for name, value in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            response = stub.Predict(request, timeout=60)
            return {
                name: tf.make_ndarray(proto)
                for name, proto in response.outputs.items()
            }

        yield predict


def rest_predict(port, instances, model=MODEL):
    """POST `:predict`; return the status and the decoded answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/models/{model}:predict",
        json.dumps({"instances": instances}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def latency(predict, requests):
    """Send requests one after the other; return milliseconds and answers."""
    milliseconds, answers = [], []
    for request in requests:
        start = time.perf_counter()
        answers.append(predict(request))
        milliseconds.append(1000 * (time.perf_counter() - start))
    return np.array(milliseconds), answers


def resident_mib(process):
    """Return the memory that a process holds, as Linux counts it."""
    pages = pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(process, port, images, expected, *, clients, seconds):
    """Send requests from all clients at once, and print what came of them.

    A client is a thread with a channel of its own: it waits for the server
    with Python's lock released. A tenth of the time is warm-up, not counted.
    """
    start = time.perf_counter()
    begin, stop = start + seconds / 10, start + seconds

    def run(client):
        rng = np.random.default_rng(client)
        times, errors, difference = [], [], 0.0
        with grpc_client(port) as predict:
            while (before := time.perf_counter()) < stop:
                rows = rng.integers(0, len(images), 1)
                try:
                    answer = predict({"image": images[rows]})
                except Exception as error:  # counted and shown, whatever it is
                    errors.append(repr(error))
                    continue
                if before > begin:
                    times.append(1000 * (time.perf_counter() - before))
                found = np.abs(answer["probabilities"] - expected[rows]).max()
                difference = max(difference, float(found))
        return times, errors, difference

    memory = []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(run, client) for client in range(clients)]
        while (now := time.perf_counter()) < stop:
            if now > begin:
                memory.append(resident_mib(process))
            time.sleep(seconds / 120)
        results = [future.result() for future in futures]
    times = np.concatenate([times for times, _, _ in results])
    errors = [error for _, errors, _ in results for error in errors]
    print(f"{clients} clients, {stop - begin:.0f} s after warm-up")
    print(f"  requests             {len(times)}")
    print(f"  a second             {len(times) / (stop - begin):.0f}")
    print(f"  errors               {len(errors)} {errors[:1] or ''}")
    print(f"  largest difference   {max(d for _, _, d in results):.1e}")
    for percent in (50, 95, 99, 100):
        value = np.percentile(times, percent)
        print(f"  p{percent:<4} ms             {value:.2f}")
    quarter = len(memory) // 4
    for name, part in (
        ("first quarter", memory[:quarter]),
        ("last quarter", memory[-quarter:]),
    ):
        print(f"  MiB, {name:<15} {np.mean(part):.1f}")


def show(name, milliseconds, difference):
    """Print one line of the table."""
    warm = milliseconds[1:]
    print(
        f"{name:<22}{len(milliseconds):>6} requests  first "
        f"{milliseconds[0]:7.1f} ms  p50 {np.percentile(warm, 50):6.2f}  "
        f"p95 {np.percentile(warm, 95):6.2f}  "
        f"p99 {np.percentile(warm, 99):6.2f} ms  "
        f"largest difference {difference:.1e}"
    )


def main(requests, rest_python, clients, seconds):
    """Export a student, serve it, and print latencies."""
    import keras

    from keras_ptloss.serving import export_student

    keras.utils.set_random_seed(0)
    layers = keras.layers
    student = keras.Sequential(
        [
            keras.Input((32, 32, 3), name="image"),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    images = np.random.default_rng(0).normal(size=(requests, 32, 32, 3))
    images = images.astype("float32")
    expected = keras.ops.convert_to_numpy(
        keras.ops.softmax(student.predict(images, verbose=0))
    )
    backend = keras.backend.backend()
    print(f"{backend} backend, {student.count_params()} parameters, CPU")
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        export_student(student, directory, from_logits=True)
        print(f"exported in {time.perf_counter() - start:.1f} s")
        with (
            server("grpc", directory) as (process, port),
            grpc_client(port) as predict,
        ):
            if clients:
                return load(
                    process,
                    port,
                    images,
                    expected,
                    clients=clients,
                    seconds=seconds,
                )
            for batch in (1, 32):
                groups = np.array_split(
                    np.arange(requests * batch) % requests, requests
                )
                times, answers = latency(
                    predict, [{"image": images[rows]} for rows in groups]
                )
                difference = max(
                    np.abs(answer["probabilities"] - expected[rows]).max()
                    for answer, rows in zip(answers, groups, strict=True)
                )
                show(f"gRPC, batch {batch}", times, difference)
        if rest_python:
            with server("rest", directory, rest_python) as (_, port):
                times, answers = latency(
                    lambda rows: rest_predict(port, rows)[1]["predictions"],
                    [images[i : i + 1].tolist() for i in range(requests)],
                )
                got = np.array([rows[0]["probabilities"] for rows in answers])
                show(
                    "REST (KServe), batch 1",
                    times,
                    np.abs(got - expected).max(),
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rest-python", help="python that has KServe")
    parser.add_argument("--clients", type=int, help="so many at once")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--serve", choices=("grpc", "rest"))
    parser.add_argument("--directory", help="what to serve")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    if arguments.serve == "grpc":
        serve_grpc(arguments.directory, arguments.port)
    elif arguments.serve == "rest":
        serve_rest(arguments.directory, arguments.port)
    else:
        main(
            arguments.requests,
            arguments.rest_python,
            arguments.clients,
            arguments.seconds,
        )
