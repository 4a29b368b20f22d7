"""Export a student, and get predictions from TensorFlow Serving.

    pip install 'keras_ptloss[export]' scikit-learn
    python examples/serve_student.py           # needs a server, see below
    python examples/serve_student.py --quick   # calls the SavedModel directly

Start the server in another terminal, in the same folder, in one line:

    docker run -p 8500:8500 -e MODEL_NAME=digits
        -v "$PWD/served/digits:/models/digits" tensorflow/serving
"""

import sys

import grpc
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from keras_ptloss import export_student

# --- Setup ---

QUICK = "--quick" in sys.argv
NAMES = "zero one two three four five six seven eight nine".split()
keras.utils.set_random_seed(0)

# --- Data ---

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")

# --- Student ---

print("Training the student")
student = keras.Sequential(
    [
        keras.Input((64,), name="pixels"),
        keras.layers.Dense(32, "relu"),
        keras.layers.Dense(10, "softmax"),
    ]
)
student.compile("adam", "sparse_categorical_crossentropy")
student.fit(images[:1500], labels[:1500], epochs=5 if QUICK else 30)

# --- Export ---

path = export_student(student, "served/digits", class_names=NAMES)
print(f"Exported {path}")

# --- Ask ---

new = images[1500:]
if QUICK:
    model = tf.saved_model.load(str(path))
    answer = model.signatures["serving_default"](pixels=tf.constant(new))
    answer = {name: value.numpy() for name, value in answer.items()}
else:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "digits"
    request.inputs["pixels"].CopyFrom(tf.make_tensor_proto(new))
    channel = grpc.insecure_channel("localhost:8500")
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    response = stub.Predict(request, timeout=30)
    answer = {n: tf.make_ndarray(v) for n, v in response.outputs.items()}

# --- Compare ---

served = answer["probabilities"]
difference = np.abs(served - student.predict(new, verbose=0)).max()
print(f"The server and the student differ by at most {difference:.1e}")
for name, probabilities in list(zip(answer["class_name"], served, strict=True))[
    :5
]:
    print(f"{name.decode():6} {100 * probabilities.max():.1f} %")
