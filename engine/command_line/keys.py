"""Every key of a config with its type, its default and its comment, read from the dataclasses: one source for both.

`train.py --keys` prints `listing`; `python docs/configs.py` writes `page` to docs/configs.md.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import config
from distill.condense.gradient_matching import MatchingSettings
from distill.condense.head_matching import HeadSettings
from engine.comparison.decision import DecisionRule
from engine.comparison.study import RowFile
from engine.condensing.config import CondenseConfig
from errors import UserError

SECTIONS: list[tuple[str, str, type]] = [  # title, what stands before a key on the command line, the dataclass
    ("The top level", "", config.Config),
    ("data", "data.", config.DataConfig),
    ("data.unlabelled", "data.unlabelled.", config.UnlabelledConfig),
    ("data.unlabelled.pseudo", "data.unlabelled.pseudo.", config.PseudoBoxConfig),
    ("student", "student.", config.ModelConfig),
    ("student.inherit", "student.inherit.", config.InheritConfig),
    ("teachers, a list", "teachers.0.", config.TeacherConfig),
    ("terms, a list", "terms.0.", config.TermConfig),
    ("terms.0.weight, if it is measured", "terms.0.weight.", config.GradientShare),
    ("optimizer", "optimizer.", config.OptimizerConfig),
    ("augment", "augment.", config.AugmentConfig),
    ("evaluation", "evaluation.", config.EvaluationConfig),
    ("rows of a study", "rows.NAME.", RowFile),
    ("decide, of a study", "decide.", DecisionRule),
    ("condense, of condense.py and of studies", "condense.", CondenseConfig),
    ("condense.matching", "condense.matching.", MatchingSettings),
    ("condense.head", "condense.head.", HeadSettings),
]
NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    dict: "keys and values",
    type(None): "null",
}
INTRODUCTION = """\
# Every key of a config

Written by `python docs/configs.py` from the dataclasses in `config.py` and their comments; change those. A config is
one YAML file. An unknown key is an error that names the nearest one, and every value is checked against its type. Any
key can be given on the command line: `epochs=20`, `terms.0.weight=2.0`, `teachers=[]`. `python train.py --keys` prints
this list, `--keys mosaic` the lines with a word.
[own_data.yaml](../configs/own_data.yaml) is a file with every line explained; [the losses](losses/README.md) have their
`parameters`.
"""


class Key(NamedTuple):
    """One key, as texts of YAML. name: as on the command line."""

    name: str
    type: str
    default: str
    comment: str


def page() -> str:
    """The text of docs/configs.md."""
    return INTRODUCTION + "".join(section(*row) for row in SECTIONS)


def section(title: str, prefix: str, cls: type) -> str:
    """A heading, the docstring, and a row of a table for each key."""
    lines = [
        f"\n## {title}\n",
        inspect.getdoc(cls) or "",
        "\n| key | type | default | what it is |",
        "|---|---|---|---|",
    ]
    for key in keys_of(prefix, cls):
        kind = re.sub(r"(\w+)(?=, )|(?<=, )(\w+)", r"`\g<0>`", key.type)  # the choices of a text
        default = key.default if key.default in ("required", "its defaults") else f"`{key.default}`"
        cells = (f"`{key.name}`", kind, default, key.comment)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def listing(word: str = "") -> str:
    """The lines of `train.py --keys`: all keys, or those in whose line `word` stands. UserError for none."""
    blocks = []
    for title, prefix, cls in SECTIONS:
        lines = [f"{key.name:<34} {key.default:<14} {key.comment} ({key.type})" for key in keys_of(prefix, cls)]
        if found := [line for line in lines if word.lower() in line.lower()]:
            blocks.append("\n".join([f"# {title}", *found]))
    if not blocks:
        raise UserError(f"argument --keys: no key, default or comment has {word!r}; --keys alone lists all")
    return "\n\n".join(blocks)


def keys_of(prefix: str, cls: type) -> Iterator[Key]:
    """The keys that the class itself declares, not those of its base class."""
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    for f in dataclasses.fields(cls):
        if f.name in comments:
            comment = re.sub(r"\bNone\b", "null", comments[f.name])  # as a YAML file has it
            yield Key(prefix + f.name, type_name(hints[f.name]), default_of(f), comment)


def field_comments(cls: type) -> dict[str, str]:
    """Of each field that the class itself declares, the comment at the end of its line, or nothing."""
    found = re.findall(r"^    (\w+): [^#\n]*?(?:#\s*(.*))?$", inspect.getsource(cls), re.MULTILINE)
    names = inspect.get_annotations(cls)
    return {name: comment for name, comment in found if name in names}


def type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(arg) for arg in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        return "list of " + {int: "integers", float: "numbers", str: "texts"}.get(args[0], "sections")
    if dataclasses.is_dataclass(hint):
        return "section"
    return NAMES[origin or hint]


def default_of(f: dataclasses.Field) -> str:
    """As YAML would have it."""
    if f.default_factory is not dataclasses.MISSING:
        value = f.default_factory()
    elif f.default is dataclasses.MISSING:
        return "required"
    else:
        value = f.default
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)
