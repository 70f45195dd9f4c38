"""Class names of a detection dataset as sentences like CLIP's training captions, and their embeddings.

    "traffic_light" ── clean_name ── "traffic light" ── fill_templates ── "a photo of a traffic light." and others ──
    ── class_embeddings ── (D,)

CLIP was trained on captions. It recognises a class better from a sentence, and from the mean over several sentences,
than from the bare word (Radford et al., arXiv:2103.00020, sec. 3.1.4).
"""

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError, expect

TEMPLATES = (  # {name}, and its {article}, "a" or "an"
    "a photo of {article} {name}.",
    "a photo of the {name}.",
    "a close-up photo of {article} {name}.",
    "a low resolution photo of {article} {name}.",
    "a photo of a small {name}.",
    "a photo of a large {name}.",
    "there is {article} {name} in the picture.",
)
BACKGROUND_TEXTS = (  # descriptions of a box without an object
    "a photo of the background.",
    "a photo of nothing.",
    "a photo of an empty scene.",
    "a blurry texture.",
)
NO_NAME = re.compile(r"[\W\d]*|(?:class|cls|label|category|object|obj|id)\W*\d[\W\d]*", re.IGNORECASE)
SILENT_H = ("hour", "honest", "honor", "honour", "heir")
SPOKEN_YOU = re.compile(r"uni(?![dmn])|us[aeu]|ut[ei]|ur[ai]|ufo|eu|ew|on(?:e\b|ce)")  # begin like "you" or "won"


def clean_name(name: str) -> str:
    """Split a class name into words; the case stays.

    "traffic_light" -> "traffic light", "DontCare" -> "Dont Care", "TVMonitor" -> "TV Monitor". "RBCs" and "T-shirt"
    stay. Underscores become spaces. A capital starts a word if two small letters precede it, or if it follows a capital
    and two small letters follow it.
    """
    spaced = re.sub(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", " ", name.replace("_", " "))
    return " ".join(spaced.split())


def article_of(name: str) -> str:
    """ "a" or "an", guessed from the letters of the first word; a word without vowels is read letter by letter.

    "a dog", "an apple", "an hour", "a unicorn", "an RBC", "a TV".
    """
    word = name.split()[0]
    if not re.search("[aeiouy]", word, re.IGNORECASE):
        return "an" if word[0].upper() in "FHLMNRSX8" else "a"
    word = word.lower()
    is_vowel = word[0] in "aeiou" and not SPOKEN_YOU.match(word)
    return "an" if is_vowel or word.startswith(SILENT_H) else "a"


def readable_names(names: Sequence[str]) -> list[str]:
    """The cleaned names of K classes.

    UserError for an empty list, for a name without letters or with nothing but a count ("3", "class_3"), and for two
    names with the same words.
    """
    expect(len(names) > 0, "class names", "none", "at least one")
    cleaned_names = [clean_name(name) for name in names]
    first: dict[str, str] = {}
    for name, cleaned in zip(names, cleaned_names):
        expect(not NO_NAME.fullmatch(cleaned), "class names", repr(name), "a word that describes the class")
        key = cleaned.casefold()
        if key in first:
            raise UserError(
                f"class names: found {first[key]!r} and {name!r}, "
                f"expected names that differ: CLIP reads both as {cleaned.lower()!r}"
            )
        first[key] = name
    return cleaned_names


def fill_templates(name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """One text per template for a cleaned name. UserError if there is no template, or one without {name}."""
    is_met = bool(templates) and not isinstance(templates, str)
    expect(is_met, "prompt templates", repr(templates), "a list of at least one")
    for template in templates:
        if "{name}" not in template:
            raise UserError(f"prompt template {template!r}: expected {{name}} in it, where the class name goes")
    return [template.replace("{article}", article_of(name)).replace("{name}", name) for template in templates]


@torch.no_grad()
def class_embeddings(
    encode_texts: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """K names -> (K, D): for each class the mean of the unit vectors of its prompts, scaled to length 1.

        e_k = u(sum_t u(encode(prompt_kt))),    u(x) = x / |x|

    encode_texts: T texts -> (T, D). UserError as readable_names and fill_templates raise it.
    """
    prompts = [fill_templates(name, templates) for name in readable_names(names)]
    texts = [text for one_class in prompts for text in one_class]
    embeddings = F.normalize(encode_texts(texts).float(), dim=-1).unflatten(0, (len(names), len(templates)))
    return F.normalize(embeddings.mean(1), dim=-1)  # (K, D)
