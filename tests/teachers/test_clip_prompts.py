"""teachers.clip_prompts: class names in words, articles, names CLIP cannot be asked for, and mean embeddings."""

import numpy as np
import pytest
import torch

from errors import UserError
from teachers.clip_prompts import (
    BACKGROUND_TEXTS,
    TEMPLATES,
    article_of,
    class_embeddings,
    clean_name,
    fill_templates,
    readable_names,
)


@pytest.mark.parametrize(
    "name, words",
    [
        ("dog", "dog"),
        ("Person_sitting", "Person sitting"),
        ("DontCare", "Dont Care"),
        ("trafficLight", "traffic Light"),
        ("TVMonitor", "TV Monitor"),
        ("RBC", "RBC"),
        ("RBCs", "RBCs"),
        ("iPhone", "iPhone"),
        ("T-shirt", "T-shirt"),
        ("  fire__hydrant ", "fire hydrant"),
        ("Müllwagen", "Müllwagen"),
        ("狗", "狗"),
    ],
)
def test_names_in_words(name, words):
    assert clean_name(name) == words == clean_name(words)


def test_articles():
    spoken = "dog apple hour unicorn uniform umbrella unidentified one-way used urn ewer RBC TV SUV Platelets eagle"
    articles = "a an an a a an an a a an a an a a a an"
    assert [article_of(word) for word in spoken.split()] == articles.split()
    assert article_of("orange traffic light") == "an" and article_of("狗") == "a"


def test_templates_are_filled():
    assert fill_templates("apple", ("{article} {name}, the {name}",)) == ["an apple, the apple"]
    assert fill_templates("{article}", ("{name}",)) == ["{article}"]  # what stands in a name is only text
    for text in fill_templates("zebra crossing"):
        assert "zebra crossing" in text and "{" not in text
    assert len(set(TEMPLATES)) == len(TEMPLATES) and len(set(BACKGROUND_TEXTS)) == len(BACKGROUND_TEXTS)


@pytest.mark.parametrize("templates", [(), ["a photo"], ["{name}", "{ name }"], "{name}"])
def test_templates_that_say_nothing(templates):
    with pytest.raises(UserError, match="template") as caught:
        fill_templates("dog", templates)
    assert "\n" not in str(caught.value)


def test_names_of_public_datasets_are_readable():
    names = ["aeroplane", "pottedplant", "tvmonitor", "RBC", "WBC", "Platelets", "Car", "DontCare", "object", "ID card"]
    assert readable_names(names) == [*names[:7], "Dont Care", "object", "ID card"]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "found none"),
        ([""], "found ''"),
        (["dog", "  "], "found '  '"),
        (["dog", "7"], "found '7'"),
        (["0", "1"], "found '0'"),
        (["12.5"], "found '12.5'"),
        (["???"], r"found '\?\?\?'"),
        (["_"], "found '_'"),
        (["class_3"], "found 'class_3', expected a word"),
        (["Label 12"], "found 'Label 12'"),
        (["dog", "Dog"], "'dog' and 'Dog', expected names that differ: CLIP reads both as 'dog'"),
        (["traffic_light", "cat", "trafficLight"], "'traffic_light' and 'trafficLight'"),
    ],
)
def test_names_clip_cannot_be_asked_for(names, message):
    with pytest.raises(UserError, match=message) as caught:
        readable_names(names)
    assert "\n" not in str(caught.value)


def vectors_of(texts: list[str]) -> torch.Tensor:
    """A vector of any length for each text, a function of the text alone."""
    return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(hash_of(t))) for t in texts]) * 9


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


def test_class_embeddings_are_unit_means_of_unit_vectors():
    names, templates = ["dog", "apple_tree", "RBC"], ("a {name}", "{article} {name}!", "{name}?")
    got = class_embeddings(vectors_of, names, templates)
    texts = [
        ["a dog", "a dog!", "dog?"],
        ["a apple tree", "an apple tree!", "apple tree?"],
        ["a RBC", "an RBC!", "RBC?"],
    ]
    for row, of_class in zip(got.double().numpy(), texts):
        x = vectors_of(of_class).double().numpy()
        mean = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
    assert not got.requires_grad and got.shape == (3, 6)


def test_one_template_gives_that_text_alone():
    got = class_embeddings(vectors_of, ["dog"], ("a {name}",))
    torch.testing.assert_close(got, torch.nn.functional.normalize(vectors_of(["a dog"]), dim=1))
