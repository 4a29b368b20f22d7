"""The rule by which tokens, keys and columns name classes."""

import pytest

from keras_ptloss.soft_labels._names import ClassNames, shorten


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "Yes",
        " YES ",
        "\u2581yes",  # SentencePiece
        "\u0120Yes",  # byte-level BPE
        "\u010ayes",
        "##yes",  # WordPiece
        "\n yes\u00a0",
    ],
)
def test_what_is_folded(text):
    assert ClassNames(("no", "yes")).find(text) == 1


@pytest.mark.parametrize(
    "text", ["yes.", "ye", "y es", "", " ", "\u2581", "##"]
)
def test_what_is_not(text):
    assert ClassNames(("no", "yes")).find(text) is None


def test_names_of_several_words_and_other_scripts():
    names = ClassNames(("very good", "cafe\u0301", "STRASSE"))
    assert names.find("Very\u2581Good") == 0
    assert names.find("\u0120very\u0120good") == 0
    assert names.find("Caf\u00e9") == 1
    assert names.find("stra\u00dfe") == 2


def test_classes_that_would_become_one():
    names = ClassNames(("US", "us", "IT", " it", "ok"))
    for text, index in {
        "US": 0,
        "us": 1,
        " US": 0,
        "\u2581us": 1,
        "Us": None,
        "IT": 2,
        " it": 3,
        "it": 3,
        "It": None,
        "OK": 4,
    }.items():
        assert names.find(text) == index, text
    # The space decides, so a mark for a space does not.
    names = ClassNames(("a", " a"))
    assert [names.find(t) for t in ("a", " a", "\u2581a")] == [0, 1, None]
    assert ClassNames(("\u2581", "a")).find("\u2581") == 0
    assert ClassNames(("\u2581", "a")).find("") is None


def test_nested():
    assert ClassNames(("toxic", "Non-Toxic")).nested()
    assert not ClassNames(("yes", "no")).nested()


def test_shorten():
    assert shorten(["a", "b"]) == "'a', 'b'"
    assert shorten("abcd", 2) == "'a', 'b' and 2 more"
