"""Distil a BERT classifier on SST-2 with stored probabilities and 300 labels.

The teacher is a BERT-base model, fine-tuned on 1,000 sentences. We store its
probabilities once, correct them with 300 labels, and train BERT-tiny on the
corrected probabilities.

    pip install 'keras_ptloss[examples]'
    python examples/text_sst2.py           # needs a GPU
    python examples/text_sst2.py --quick   # few sentences, BERT-tiny as teacher

TensorFlow Datasets downloads the texts, and KerasHub the models.
"""

import sys

import keras
import keras_hub
import numpy as np
import tensorflow_datasets as tfds
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from keras_ptloss import SoftLabels, distillation_targets

# --- Setup ---

QUICK = "--quick" in sys.argv
TEACHER = "bert_tiny_en_uncased" if QUICK else "bert_base_en_uncased"
STUDENT = "bert_tiny_en_uncased"
NUM_TRAIN = 2_000 if QUICK else 60_000
NUM_TEACHER = 200 if QUICK else 1_000  # sentences that the teacher learns from
NUM_LABELS = 300  # sentences whose labels correct the teacher
EPOCHS = 1 if QUICK else 3
keras.utils.set_random_seed(0)


def classifier(preset):
    """Load a BERT classifier that ends in a softmax."""
    model = keras_hub.models.BertTextClassifier.from_preset(
        preset, num_classes=2, activation="softmax"
    )
    # KerasHub's default metric takes integer labels, not probabilities.
    model.compile(
        keras.optimizers.Adam(5e-5),
        "categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


# --- Data ---

print("Loading SST-2")
splits = ["train", "validation"]
train, test = tfds.load("glue/sst2", split=splits, batch_size=-1)
texts = np.array([text.decode() for text in tfds.as_numpy(train["sentence"])])
true_labels = np.asarray(train["label"])
order = np.random.default_rng(0).permutation(len(texts))
for_teacher = order[:NUM_TEACHER]
for_student = order[NUM_TEACHER:][:NUM_TRAIN]
x = texts[for_student]
labels = np.full(len(x), -1)  # -1: unknown
labels[:NUM_LABELS] = true_labels[for_student][:NUM_LABELS]
x_test = np.array([t.decode() for t in tfds.as_numpy(test["sentence"])])
y_test = np.asarray(test["label"])

# --- Teacher ---

print(f"Fine-tuning the teacher on {NUM_TEACHER} sentences")
teacher = classifier(TEACHER)
one_hot = keras.utils.to_categorical(true_labels, 2)
# The sentences are in random order already. KerasHub cannot shuffle texts, and
# warns if shuffle is True.
options = {"epochs": EPOCHS, "shuffle": False}
teacher.fit(texts[for_teacher], one_hot[for_teacher], batch_size=16, **options)

print("Storing its probabilities; after an interruption, run again")
store = SoftLabels.write(
    teacher,
    x,
    "sst2-quick.softlabels" if QUICK else "sst2.softlabels",
    teacher_name=f"{TEACHER}, {NUM_TEACHER} sentences",
    class_names=["negative", "positive"],
)
teacher_probs = np.asarray(store)

# --- Correct ---


def labels_only():
    """Build a classifier that learns only from the labelled sentences."""
    return make_pipeline(TfidfVectorizer(), LogisticRegression(C=10.0))


targets = distillation_targets(
    teacher_probs,
    labels,
    x=x,
    build_model=labels_only,
    class_names=["negative", "positive"],
)
targets.summary()

# --- Distil ---


def distil(values, sample_weight=None):
    """Train a student and return its accuracy on the test sentences."""
    keras.utils.set_random_seed(1)
    student = classifier(STUDENT)
    student.fit(x, values, sample_weight=sample_weight, **options)
    predicted = student.predict(x_test).argmax(axis=1)
    return np.mean(predicted == y_test)


plain = distil(teacher_probs)
ours = distil(targets.values, targets.sample_weight)

# --- Compare ---

print(f"student of the teacher            {100 * plain:.1f} %")
print(f"student of distillation_targets   {100 * ours:.1f} %")
