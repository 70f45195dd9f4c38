"""What a run reads by a name, and a digest of what the name stood for: the labels of its splits, files of weights.

A path is no proof: labels are corrected and teachers trained anew under the names that they had. Runs before and after
such a change do not belong in one table, and a run that is resumed after it is not the run that was started.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from config import Config, DataConfig
from datasets.index import DatasetIndex
from engine.training.state import fingerprint, is_covered
from errors import UserError
from weights import file_of_run

Inputs = dict[str, str]  # name of what is read, with its path -> a digest


def inputs_of(config: Config, indexes: Mapping[str, DatasetIndex], *, is_resumed: bool = False) -> Inputs:
    """The inputs of a run. indexes: of splits.open_indexes. is_resumed: start weights are not read."""
    data = config.data
    inputs = {labels_of(data.test_place, data): digest_of_labels(indexes["test"])}
    if data.train is not None:
        inputs[labels_of(data.train_place, data)] = digest_of_labels(indexes["whole"])
    return inputs | weights_of(config, is_resumed=is_resumed)


def labels_of(place: tuple[str, str, str], data: DataConfig) -> str:
    """The name of the labels at data.test_place or data.train_place."""
    return "labels of " + " ".join(place) + (f", classes {', '.join(data.classes)}" if data.classes else "")


def digest_of_labels(index: DatasetIndex) -> str:
    """A digest of all that the evaluation and the training take from labels: fingerprint, crowd and area."""
    digest = hashlib.sha256(fingerprint(index).encode())
    for sample in index.samples:
        digest.update(sample.crowd.tobytes() + sample.area.tobytes())
    return digest.hexdigest()


def weights_of(config: Config, *, is_resumed: bool = False, known: Collection[str] = ()) -> Inputs:
    """The files of weights that a run begins with or learns from, as far as they are there and not `known`."""
    paths = [teacher.weights for teacher in config.teachers]
    if not is_resumed:
        inherited = config.student.inherit.weights if config.student.inherit is not None else None
        paths += [config.student.weights, config.student.backbone_weights, inherited]
    return weights_named(paths, known)


def weights_name(path: str) -> str:
    """The name of the weights at a path."""
    return f"weights {path}"


def weights_named(paths: Iterable[str | None], known: Collection[str] = ()) -> Inputs:
    """The files that are there, each by its path; without those whose names are `known`."""
    files = {weights_name(path): file_of_run(path) for path in paths if path is not None}
    return {name: digest_of_file(file) for name, file in files.items() if name not in known and file.is_file()}


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs_of_resumed(before: Inputs, now: Inputs, data: DataConfig, allowed: tuple[str, ...], run: str) -> Inputs:
    """Those of the whole run. UserError for one that was another when it started; allowed: keys that may change."""
    keys = {labels_of(data.train_place, data): "data.train", labels_of(data.test_place, data): "data.test"}
    for name, digest in now.items():
        key = keys.get(name, "teachers")
        if before.get(name, digest) != digest and not is_covered(allowed, key):
            raise UserError(
                f"{run}: the {name} are not those that the run started with (--allow-change {key} if that is meant)"
            )
    return before | now


class KnownInputs:
    """The inputs of several runs, which have to agree."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}  # name -> digest, and the first run with it

    def first(self, name: str) -> str | None:
        """The first run with an input of this name; None if there is none."""
        return self._first[name][1] if name in self._first else None

    def add(self, run: str | Path, inputs: Mapping[str, str]) -> None:
        """UserError for an input that was another one in an earlier run."""
        for name, digest in inputs.items():
            known, first = self._first.setdefault(name, (digest, str(run)))
            if known != digest:
                raise UserError(
                    f"{run}: the {name} are not those of {first}: changed in between, they do not belong in one table; "
                    "give another name=, or remove the runs from before the change"
                )
