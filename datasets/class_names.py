"""Which classes of two lists mean the same: COCO, Pascal VOC, KITTI, and lists with similar names.

    map_classes(dataset_names, model_names) -> ClassMap: the model's class for every class of the dataset
    join_classes(student_names, teacher_names) -> columns: the classes that a teacher and its student both have

A class of the dataset is mapped to the model's class of the same name, up to case, spaces, underscores and hyphens;
else to a synonym (SAME); else to a broader class (KIND_OF): a Person_sitting is a person. A broad class is never mapped
to a narrow one: a detector of pedestrians does not find every person.

A class without such a partner is left out. If a prediction of a near class (NEAR) on its objects would be reasonable,
that prediction is neither rewarded nor punished: KITTI has no rule for `person` on its Cyclist, whose box holds rider
and bicycle. The benchmark treats Van beside Car, and Person_sitting beside Pedestrian, in this way.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError, counted, expect, shortened

# fmt: off
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # category ids in 1..90 that were never annotated
# fmt: on
SAME = (  # synonyms; case, spaces, underscores and hyphens never matter
    ("airplane", "aeroplane"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("tv", "tvmonitor", "television"),
)
KIND_OF = {
    "pedestrian": "person",
    "person sitting": "person",
    "tram": "train",  # COCO labels trams, where it does, as trains
}
NEAR = {
    "van": ("car", "truck"),
    "cyclist": ("person", "bicycle"),
    "person sitting": ("pedestrian",),
}


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names of classes are "0", "1", ...: those of a file that has none."""
    return tuple(names) == tuple(map(str, range(len(names))))


def doubtful_numbers(names: Sequence[str], others: Sequence[str]) -> str:
    """A message for lists such as ("1", "2", "3") and ("0", "1", "2"), where a number may be a name or a position.

    "" for all other lists. Equal numbers in another order are names, and so are lists of different lengths.
    """
    are_alike = len(names) == len(others) and set(names) != set(others) and bool(set(names) & set(others))
    if not (are_alike and all(map(str.isdecimal, (*names, *others))) and (are_numbers(names) or are_numbers(others))):
        return ""
    return f"{shortened(names)} and {shortened(others)} may be names, or places in one list"


def coco_by_id() -> tuple[str, ...]:
    """The 90 classes of models that predict category ids (torchvision's detectors): column k is the id k + 1.

    Ids without a category are named "N/A 12" and so on. These names are unique and in no dataset.
    """
    names = iter(COCO)
    return tuple(f"N/A {number}" if number in COCO_GAPS else next(names) for number in range(1, 91))


def released_names(arch: str, num_classes: int) -> tuple[str, ...]:
    """The classes of released weights whose file does not name them, in the order of the model; () where unknown.

    These are COCO's in torchvision's detectors (90, by category id) and in the authors' RT-DETRs (80).
    """
    if arch.startswith("fasterrcnn_") and num_classes == 90:
        return coco_by_id()
    if arch.startswith("rtdetr_r") and num_classes == len(COCO):
        return COCO
    return ()


@dataclass(frozen=True)
class ClassMap:
    """The model's class for every class of a dataset, for the evaluation of a model that has other classes.

    columns: for each dataset class the model's column; None: the class is left out.
    near: for each dataset class that is left out, the columns that are neither rewarded nor punished on its objects.
    """

    dataset_names: tuple[str, ...]
    model_names: tuple[str, ...]
    columns: tuple[int | None, ...]
    near: tuple[tuple[int, ...], ...]

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The model's evaluated columns in the order of the dataset's classes. The new label is the position here."""
        return tuple(dict.fromkeys(column for column in self.columns if column is not None))

    @property
    def names(self) -> tuple[str, ...]:
        """The dataset's names of the evaluated classes; "Pedestrian+Person_sitting" where two share a column."""
        return tuple(
            "+".join(name for name, column in zip(self.dataset_names, self.columns) if column == evaluated)
            for evaluated in self.evaluated
        )

    @property
    def is_identity(self) -> bool:
        return self.columns == tuple(range(len(self.model_names)))

    def fates(self) -> dict[str, str]:
        """Class of the dataset -> a few words: the model's class, or that it is left out."""
        texts = {}
        for name, column, near in zip(self.dataset_names, self.columns, self.near):
            nearby = " and ".join(self.model_names[k] for k in near)
            left_out = f"left out ({nearby} not judged there)" if near else "left out"
            texts[name] = left_out if column is None else f"-> {self.model_names[column]}"
        return texts

    def lines(self) -> list[str]:
        """`fates` in three lines for people, with the number of the model's classes that are left out."""
        fates = self.fates()
        kept = [name if fate == f"-> {name}" else f"{name} {fate}" for name, fate in fates.items() if "->" in fate]
        left = [name + fate.removeprefix("left out") for name, fate in fates.items() if "->" not in fate]
        return [
            f"{counted(len(self.dataset_names), 'class')} of the dataset, {len(self.model_names)} of the model, "
            f"{len(self.evaluated)} evaluated: {', '.join(kept)}",
            f"  left out of the dataset: {', '.join(left) or 'none'}",
            f"  left out of the model's answers: {counted(len(self.model_names) - len(self.evaluated), 'class')}",
        ]

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON."""
        unused = [name for column, name in enumerate(self.model_names) if column not in self.evaluated]
        return {"dataset": self.fates(), "model_left_out": unused}


def map_classes(
    dataset_names: Sequence[str], model_names: Sequence[str], given: Mapping[str, str | None] | None = None
) -> ClassMap:
    """Map the classes of a dataset to those of a model by their meaning.

    given: the user's choices, class of the dataset -> class of the model; None leaves the class out.
    UserError for no class in common, two classes of the model that both fit, names in `given` that do not exist, and
    doubtful_numbers without any given.
    """
    if not given and (doubt := doubtful_numbers(dataset_names, model_names)):
        raise UserError(f"classes {doubt}: expected --names FILE with the model's classes, or --class-map")
    of_model = places_by_name(model_names)
    chosen = {find_one(name, dataset_names, "dataset"): model for name, model in (given or {}).items()}
    columns: list[int | None] = []
    near: list[tuple[int, ...]] = []
    for row, name in enumerate(dataset_names):
        if row in chosen:
            choice = chosen[row]
            column = None if choice is None else find_one(choice, model_names, "model")
        else:
            found = find_columns(name, of_model, model_names)
            if len(found) > 1:
                raise UserError(
                    f"{unclear(name, found, model_names)}; choose by --class-map '{name}={model_names[found[0]]}', "
                    f"or leave it out by '{name}='"
                )
            column = found[0] if found else None
        columns.append(column)
        near.append(() if column is not None else columns_of(neighbours_of(name), of_model))
    taken = {column for column in columns if column is not None}
    if not taken:
        raise UserError(
            f"no class in common: the dataset has {shortened(dataset_names)}; the model has {shortened(model_names)}"
        )
    near = [tuple(column for column in found if column in taken) for found in near]
    return ClassMap(tuple(dataset_names), tuple(model_names), tuple(columns), tuple(near))


def released_columns(
    names: Sequence[str], released_names: Sequence[str], source: str, aliases: Mapping[str, str] | None = None
) -> tuple[int | None, ...]:
    """For each class the column of a weights file's model, by the rules of map_classes; None if there is none.

    aliases: class -> the file's class, where the user says it; the names are compared as everywhere.
    UserError, which names the file `source`, for a class that fits two of the file's, for an alias from or to a class
    that does not exist, and for doubtful_numbers without aliases.
    """
    if not aliases and (doubt := doubtful_numbers(names, released_names)):
        raise UserError(f"{source}: classes {doubt}; new_head=true starts the head fresh")
    of_file, own = places_by_name(released_names), places_by_name(names)
    chosen: dict[int, int] = {}
    for name, theirs in (aliases or {}).items():
        rows, places = own.get(normalize_class_name(name)), of_file.get(normalize_class_name(theirs))
        if not rows or not places:
            alias = f"alias {name}: {theirs}"
            raise UserError(f"{source}: {alias} must lead from a class of the dataset to one of the file")
        chosen[rows[0]] = places[0]
    columns: list[int | None] = []
    for row, name in enumerate(names):
        found = (chosen[row],) if row in chosen else find_columns(name, of_file, released_names)
        if len(found) > 1:
            raise UserError(f"{source}: {unclear(name, found, released_names)}; new_head=true starts the head fresh")
        columns.append(found[0] if found else None)
    return tuple(columns)


def places_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(normalize_class_name(name), []).append(place)
    return places


def alike(names: Sequence[str]) -> list[str]:
    """A line for each classes that differ only in case, spaces, underscores and hyphens: one class, written twice?"""
    groups = (places for places in places_by_name(names).values() if len(places) > 1)
    return [
        f"{' and '.join(repr(names[place]) for place in places)} are counted as different classes" for places in groups
    ]


def find_columns(name: str, of_model: dict[str, list[int]], model_names: Sequence[str]) -> tuple[int, ...]:
    """The model's columns for a class of the dataset: of the same name, else of a synonym, else of a broader class.

    () if there is none; more than one where the choice is unclear.
    """
    for words in ([normalize_class_name(name)], other_words(name), broader_words(name)):
        if found := columns_of(words, of_model):
            exact = tuple(column for column in found if model_names[column] == name)
            return exact or found
    return ()


def unclear(name: str, found: tuple[int, ...], model_names: Sequence[str]) -> str:
    both = " and ".join(repr(model_names[column]) for column in found)
    return f"class {name!r} of the dataset may be {both} of the model"


def other_words(name: str) -> list[str]:
    return [
        normalize_class_name(word)
        for group in SAME
        if normalize_class_name(name) in map(normalize_class_name, group)
        for word in group
    ]


def broader_words(name: str) -> list[str]:
    broader = [wide for kind, wide in KIND_OF.items() if normalize_class_name(kind) == normalize_class_name(name)]
    return [normalize_class_name(word) for wide in broader for word in (wide, *other_words(wide))]


def neighbours_of(name: str) -> list[str]:
    return [
        normalize_class_name(word)
        for kind, words in NEAR.items()
        if normalize_class_name(kind) == normalize_class_name(name)
        for word in words
    ]


def columns_of(words: Iterable[str], of_model: dict[str, list[int]]) -> tuple[int, ...]:
    return tuple(column for word in dict.fromkeys(words) for column in of_model.get(word, ()))


def find_one(name: str, names: Sequence[str], whose: str) -> int:
    """The position of a name that the user gave: of the equal name, else of the only one with the same normal form."""
    exact = [place for place, other in enumerate(names) if other == name]
    found = exact or [
        place for place, other in enumerate(names) if normalize_class_name(other) == normalize_class_name(name)
    ]
    if len(found) != 1:
        expected = f"one of {shortened(names)}" if not found else f"exactly one of {shortened(names[k] for k in found)}"
        raise UserError(f"--class-map: found {name!r}, expected of the {whose}'s classes {expected}")
    return found[0]


def read_class_map(pairs: Sequence[str]) -> dict[str, str | None]:
    """["person=Pedestrian", "Misc="] -> {"person": "Pedestrian", "Misc": None}."""
    given: dict[str, str | None] = {}
    for pair in pairs:
        name, equals, model = pair.partition("=")
        expect(bool(equals and name), "--class-map", repr(pair), "DATASET_CLASS=MODEL_CLASS, or DATASET_CLASS=")
        if name in given:
            raise UserError(f"--class-map: class {name!r} is given twice")
        given[name] = model or None
    return given


def join_classes(
    student_names: Sequence[str], teacher_names: Sequence[str], *, aliases: dict[str, str] | None = None
) -> tuple[Tensor, Tensor]:
    """Columns that mean the same class: (student's (J,), teacher's (J,)) int64, in the student's order.

    aliases: the student's class -> the teacher's, such as {"pedestrian": "person"}. The other classes are joined to the
    teacher's class of the same name, up to case, spaces, underscores and hyphens ("Potted Plant" is "pottedplant");
    else to a synonym (SAME: "aeroplane" is "airplane") that no other class of the student has taken. Unlike in
    map_classes, a class is not joined to a broader one: a teacher's score for any person is no score for a pedestrian.
    Raises ValueError for a name that stands twice in a list, an alias from or to a class that does not exist, two
    classes of the student that are joined to one of the teacher, a class of the student that fits two of the teacher,
    no class in common, and doubtful_numbers without aliases.
    """
    if not aliases and (doubt := doubtful_numbers(student_names, teacher_names)):
        raise ValueError(f"classes {doubt}: expected aliases")
    s_columns, t_columns = columns_by_name("student", student_names), columns_by_name("teacher", teacher_names)
    t_name_of = {normalize_class_name(s): normalize_class_name(t) for s, t in (aliases or {}).items()}
    for s, t in t_name_of.items():
        if s not in s_columns or t not in t_columns:
            raise ValueError(f"alias {s}: {t} must lead from a class of the student to one of the teacher")
    t_name_of |= {name: name for name in s_columns if name not in t_name_of and name in t_columns}
    taken = set(t_name_of.values())
    for name in s_columns:
        found = [word for word in other_words(name) if word in t_columns and word not in taken]
        if name not in t_name_of and len(found) > 1:
            raise ValueError(
                f"the student's class {name} may be the teacher's {' and '.join(found)}: expected an alias"
            )
        if found:
            t_name_of.setdefault(name, found[0])
    for name in t_name_of:
        others = [other for other in t_name_of if other != name and t_name_of[other] == t_name_of[name]]
        if others:
            raise ValueError(f"the student's classes {name} and {others[0]} are both the teacher's {t_name_of[name]}")
    pairs = [(column, t_columns[t_name_of[name]]) for name, column in s_columns.items() if name in t_name_of]
    if not pairs:
        student, teacher = shortened(student_names), shortened(teacher_names)
        raise ValueError(f"no class in common: the student has {student}; the teacher has {teacher}")
    s_index, t_index = torch.tensor(pairs, dtype=torch.int64).T
    return s_index, t_index


def columns_by_name(who: str, names: Sequence[str]) -> dict[str, int]:
    columns = {normalize_class_name(name): column for column, name in enumerate(names)}
    if len(columns) < len(names):
        twice = next(n for column, n in enumerate(names) if columns[normalize_class_name(n)] != column)
        raise ValueError(f"the {who}'s class {twice!r} stands twice in its list")
    return columns


def normalize_class_name(name: str) -> str:
    """A form that is equal for names that differ only in case, spaces, underscores and hyphens."""
    return "".join(name.casefold().replace("_", " ").replace("-", " ").split())
