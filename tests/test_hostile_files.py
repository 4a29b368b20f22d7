"""Files from elsewhere are data: none that is loaded runs code."""

import importlib
import pathlib

import keras
import numpy as np
import pytest

from keras_ptloss import Correction, Distiller, PTLoss
from keras_ptloss.layers import CorrectedTeacher
from keras_ptloss.losses import Flooding, ProxyKLDivergence

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
CODE_WAS_RUN = []


class Bomb:
    """Its pickle, when loaded, leaves a trace."""

    def __reduce__(self):
        return (explode, (None,))


@pytest.fixture(autouse=True)
def nothing_was_run():
    CODE_WAS_RUN.clear()
    yield
    assert not CODE_WAS_RUN


def explode(x):
    CODE_WAS_RUN.append(1)
    return x


def with_lambda():
    """A model whose layer is Python code, and the code's serialized form."""
    layer = keras.layers.Lambda(
        lambda x: __import__("test_hostile_files").explode(x),
        output_shape=(3,),
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(keras.layers.Dense(3)(inputs)))
    code = keras.saving.serialize_keras_object(layer)["config"]["function"]
    assert code["class_name"] == "__lambda__"
    CODE_WAS_RUN.clear()
    return model, code


@pytest.mark.parametrize("kind", ["student", "distiller"])
def test_keras_files_with_a_lambda(tmp_path, kind):
    model, _ = with_lambda()
    if kind == "distiller":
        model = Distiller(model, small_model())
        loss = PTLoss(0.5, from_logits=True, teacher_from_logits=True)
        model.compile("sgd", loss)
        model.fit(np.ones((4, 4), "float32"), verbose=0)
        assert CODE_WAS_RUN
        CODE_WAS_RUN.clear()
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="lambda"):
        keras.saving.load_model(tmp_path / "m.keras")
    assert not CODE_WAS_RUN
    # The file is hostile: who trusts it, runs it.
    keras.saving.load_model(tmp_path / "m.keras", safe_mode=False)(
        np.ones((1, 4), "float32")
    )
    assert CODE_WAS_RUN
    CODE_WAS_RUN.clear()


def small_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


CONFIGS = {
    "loss": lambda: Flooding(PTLoss(0.5), 0.1),
    "correction": lambda: ProxyKLDivergence(Correction(0.5)),
    "layer's correction": lambda: CorrectedTeacher(Correction(0.5)),
    "student": lambda: Distiller(small_model(), small_model()),
    "hard_label_loss": lambda: Distiller(small_model(), small_model()),
}


@pytest.mark.parametrize("place", CONFIGS)
def test_configs_with_a_lambda(place):
    _, code = with_lambda()
    thing = CONFIGS[place]()
    config = {**thing.get_config(), place.split()[-1]: code}
    with pytest.raises(ValueError, match="lambda"):
        type(thing).from_config(config)


def pickled(path):
    np.save(path, np.array([[Bomb()] * 3] * 4, object), allow_pickle=True)
    return path


def test_the_pickle_is_hostile(tmp_path):
    np.load(pickled(tmp_path / "a.npy"), allow_pickle=True)
    assert CODE_WAS_RUN
    CODE_WAS_RUN.clear()


@pytest.mark.parametrize("name", ["image_resnet", "text_bert"])
def test_examples_run_no_pickle(tmp_path, name, monkeypatch):
    if name == "text_bert":
        pytest.importorskip("keras_hub")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module(name)
    with pytest.raises(ValueError, match="allow_pickle"):
        example.load_probabilities(pickled(tmp_path / "a.npy"), 4, 3)
