"""Load an exported student with gRPC clients; print throughput and latency.

    pip install tensorflow-serving-api
    KERAS_BACKEND=jax python benchmarks/speed/serving.py --seconds 120

TensorFlow Serving's own program is on no package index. A process without
Keras serves the SavedModel in its protocol, by the same signature. Clients send
one image at a time, without a pause, and check the answers.
"""

import argparse
import concurrent.futures
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

SERVER = """
import concurrent.futures, sys
import grpc, tensorflow as tf
from tensorflow_serving.apis import predict_pb2
from tensorflow_serving.apis import prediction_service_pb2_grpc as service

model = tf.saved_model.load(sys.argv[1])
predict = model.signatures["serving_default"]

class PredictionService(service.PredictionServiceServicer):
    def Predict(self, request, context):
        image = tf.constant(tf.make_ndarray(request.inputs["image"]))
        response = predict_pb2.PredictResponse()
        for name, value in predict(image=image).items():
            proto = tf.make_tensor_proto(value.numpy())
            response.outputs[name].CopyFrom(proto)
        return response

server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
service.add_PredictionServiceServicer_to_server(PredictionService(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()
"""


def ask(port, images, expected, begin, stop, seed):
    """Send random images until `stop`; return milliseconds and differences."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2
    from tensorflow_serving.apis import prediction_service_pb2_grpc as service

    rng = np.random.default_rng(seed)
    times, differences = [], []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service.PredictionServiceStub(channel)
        while (start := time.perf_counter()) < stop:
            row = rng.integers(0, len(images), 1)
            request = predict_pb2.PredictRequest()
            request.inputs["image"].CopyFrom(tf.make_tensor_proto(images[row]))
            answer = stub.Predict(request, timeout=60).outputs["probabilities"]
            if start > begin:
                times.append(1000 * (time.perf_counter() - start))
            found = tf.make_ndarray(answer)
            differences.append(float(np.abs(found - expected[row]).max()))
    return times, differences


def main(clients, seconds):
    """Export a student, serve it, and print a table."""
    import keras

    from keras_ptloss import export_student

    layers = keras.layers
    student = keras.Sequential(
        [
            keras.Input((32, 32, 3), name="image"),
            layers.Conv2D(16, 3, 2, activation="relu"),
            layers.Conv2D(32, 3, 2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, "softmax"),
        ]
    )
    images = np.random.default_rng(0).random((1000, 32, 32, 3), "float32")
    expected = student.predict(images, verbose=0)
    with tempfile.TemporaryDirectory() as directory:
        path = export_student(student, directory)
        command = [sys.executable, "-c", SERVER, str(path)]
        pipe = subprocess.PIPE
        with (
            subprocess.Popen(command, stdin=pipe, stdout=pipe) as process,
            concurrent.futures.ThreadPoolExecutor(clients) as pool,
        ):
            port = int(process.stdout.readline())
            begin = time.perf_counter() + seconds / 10  # after warming up
            stop = begin + 0.9 * seconds
            work = (ask, port, images, expected, begin, stop)
            jobs = [pool.submit(*work, seed) for seed in range(clients)]
            used = []
            while time.perf_counter() < stop:
                time.sleep(seconds / 100)
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                used.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
            results = [job.result() for job in jobs]
            process.communicate()
    times = np.concatenate([times for times, _ in results])
    print(f"requests, per second | {len(times) / (0.9 * seconds):.0f}")
    print(f"largest difference | {max(max(d) for _, d in results):.1e}")
    for percent in (50, 95, 99, 100):
        print(f"latency, p{percent} | {np.percentile(times, percent):.1f} ms")
    print(f"memory after 20 % and 100 % | {used[20]:.0f}, {used[-1]:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    main(**vars(parser.parse_args()))
