"""Calls that may be slow say what they do, under Keras's progress bar."""

import json
import logging

import keras
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from keras_ptloss import (
    ProxyTeacherSearch,
    SoftLabels,
    _progress,
    distillation_targets,
    export_student,
    proxy_teacher,
)
from keras_ptloss._backend import no_retracing_warning
from keras_ptloss.soft_labels import fingerprint, read_answers, read_tokens

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype("float32")
Y = np.arange(60) % 3
PROBS = RNG.dirichlet(np.ones(3), 60)
LABELS = np.where(np.arange(60) < 30, Y, -1)
BAR = "━"


def network():
    dense = keras.layers.Dense(3, "softmax")
    model = keras.Sequential([keras.Input((4,), name="x"), dense])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.fixture
def store(tmp_path):
    return SoftLabels.from_array(PROBS, tmp_path / "labels", inputs=X)


@pytest.fixture
def answers(tmp_path):
    """A file with one answer, of the token " yes"."""
    listed = [{"token": " yes", "logprob": -0.2}]
    listed += [{"token": " no", "logprob": -2.0}]
    content = [{**listed[0], "top_logprobs": listed}]
    choice = {"message": {"content": "yes"}, "logprobs": {"content": content}}
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"choices": [choice]}))
    return file


def targets(**options):
    return distillation_targets(
        network(), LABELS, x=X, epochs=2, batch_size=64, **options
    )


CALLS = {
    "search": lambda verbose: ProxyTeacherSearch().search(
        PROBS, Y, verbose=verbose
    ),
    "search of a model": lambda verbose: ProxyTeacherSearch("gradient").search(
        network(), Y, inputs=X, verbose=verbose
    ),
    "targets": lambda verbose: targets(build_model=network, verbose=verbose),
    "targets of scikit-learn": lambda verbose: targets(
        build_model=LogisticRegression, verbose=verbose
    ),
    "closed form": lambda verbose: proxy_teacher(PROBS, 0.5, verbose=verbose),
    "newton": lambda verbose: proxy_teacher(PROBS, [0, 1], verbose=verbose),
    "fsolve": lambda verbose: proxy_teacher(
        PROBS, [0, 1], solver="fsolve", verbose=verbose
    ),
    "fingerprint": lambda verbose: fingerprint(X, verbose=verbose),
}


def shown(capsys, call):
    capsys.readouterr()
    call()
    return capsys.readouterr().out


@pytest.fixture
def slow(monkeypatch):
    """Let every call count as one that has taken two seconds."""
    monkeypatch.setattr(_progress, "QUIET_SECONDS", -1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_slow_call_shows_a_bar(capsys, slow, name):
    text = shown(capsys, lambda: CALLS[name]("auto"))
    line, bar = text.split("\n")[:2]
    assert BAR not in line and len(line) > 10
    assert BAR in bar
    assert text.endswith("\n")
    assert shown(capsys, lambda: CALLS[name](0)) == ""


def test_stores_show_a_bar(capsys, slow, store, tmp_path):
    paths = (tmp_path / str(number) for number in range(100))
    parquet = tmp_path / "labels.parquet"
    calls = [
        lambda **options: SoftLabels.from_array(PROBS, next(paths), **options),
        lambda **options: SoftLabels.open(store.path, **options),
        lambda **options: store.to_parquet(parquet, **options),
        lambda **options: SoftLabels.from_parquet(
            parquet, next(paths), **options
        ),
        lambda **options: SoftLabels.join([store.path], next(paths), **options),
        lambda **options: SoftLabels.write(
            network().predict_on_batch, X, next(paths), **options
        ),
    ]
    for call in calls:
        text = shown(capsys, call)
        assert "\n" in text and ("━" in text or "Unknown" in text)
    for call in calls[:1] + calls[2:4] + calls[5:]:
        assert shown(capsys, lambda call=call: call(verbose=0)) == ""


def test_write_says_what_it_resumes(capsys, tmp_path):
    def teacher(batch):
        if len(asked) == 2:
            raise OSError("no connection")
        asked.append(len(batch))
        return PROBS[: len(batch)]

    def write():
        return SoftLabels.write(teacher, X, tmp_path / "labels", batch_size=20)

    asked = []
    with pytest.raises(RuntimeError):
        write()
    asked.clear()
    text = shown(capsys, write)
    assert "40 examples are stored at" in text and "20/20" in text
    assert asked == [20]


def test_answers_show_a_bar(capsys, slow, answers, tmp_path):
    def of_classes(**options):
        found = read_answers(answers, ["no", "yes"], **options)
        found.store(None, inputs=["a"], **options)

    def of_tokens(**options):
        found = read_tokens(
            answers,
            top_k=2,
            sequences=[[0, 1]],
            tokenizer={"Well": 0, "Ġyes": 1, "Ġno": 2},
            **options,
        )
        found.store(None, **options)

    for call in (of_classes, of_tokens):
        text = shown(capsys, call)
        assert text.startswith("Reading the answers\n")
        assert "1/1" in text  # the rows that are stored
        assert shown(capsys, lambda call=call: call(verbose=0)) == ""


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="exports nothing"
)
def test_export_shows_a_bar(capsys, tmp_path):
    text = shown(capsys, lambda: export_student(network(), tmp_path / "a"))
    assert text.startswith("Exporting 'sequential") and "2/2" in text
    assert (
        shown(
            capsys,
            lambda: export_student(network(), tmp_path / "a", verbose=False),
        )
        == ""
    )


def test_quick_calls_print_nothing(capsys, store, monkeypatch):
    monkeypatch.setattr(_progress, "QUIET_SECONDS", 1e9)
    text = shown(capsys, lambda: ProxyTeacherSearch().search(PROBS, Y))
    text += shown(capsys, lambda: proxy_teacher(PROBS, 0.5))
    text += shown(capsys, lambda: store.find(X))
    assert text == ""


def test_bar_of_fewer_units_than_it_seemed(capsys):
    progress = _progress.Progress("Trying", 10, unit="trial", verbose=1)
    progress.update(3)
    progress.update(1)  # no step back
    progress.close()
    text = capsys.readouterr().out
    assert text.startswith("Trying\n")
    assert "3/3" in text.split("\r")[-1]
    assert text.endswith("\n")


def test_bar_of_each_epoch(capsys):
    progress = _progress.Progress("Training", 2, unit="model", verbose=0)
    seen = []

    class Spy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(progress.done)

    bars = [_progress.Epochs(progress), Spy()]
    for _ in range(2):
        network().fit(X, Y, epochs=2, verbose=0, callbacks=bars)
        progress.update(round(progress.done))
    assert seen == [0.5, 1.0, 1.5, 2.0]


def test_bar_of_a_model_is_there_before_the_first_epoch(capsys):
    progress = _progress.Progress("Training", 2, unit="model")
    callback = _progress.Epochs(progress)
    assert capsys.readouterr().out == ""
    callback.on_train_begin()
    assert "0/2" in capsys.readouterr().out


def test_keras_turns_it_off(capsys, slow):
    keras.config.disable_interactive_logging()
    try:
        assert shown(capsys, lambda: proxy_teacher(PROBS, 0.5)) == ""
    finally:
        keras.config.enable_interactive_logging()


def test_no_retracing_warning(caplog):
    logger = logging.getLogger("tensorflow")
    with caplog.at_level("WARNING", "tensorflow"):
        logger.propagate, before = True, logger.propagate
        try:
            with no_retracing_warning():
                logger.warning("5 calls triggered tf.function retracing.")
                logger.warning("another warning")
            logger.warning("6 calls triggered tf.function retracing.")
        finally:
            logger.propagate = before
    assert [record.message[0] for record in caplog.records] == ["a", "6"]
