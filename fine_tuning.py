"""Fine-tuning: a detector that starts from the weights of a file with other classes."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import checkpoint
import models
import weights
from datasets.class_names import released_columns
from errors import UserError, counted
from layers.int8 import remove_int8

FRESH_PRIOR = 1e-6  # odds of a class that starts fresh in a softmax; a YOLO's prior at stride 8 is 1e-5


def check_trained(info: checkpoint.CheckpointInfo, path: Path) -> None:
    """UserError for weights with which the numbers of a later run would be wrong, as its start or as its teacher.

    They are refused if the teachers of their run were random. So is a last.pt of another step than the report of its
    run: that training was interrupted or still goes on, and the report's scores are not those of the file.
    """
    if info.plumbing:
        raise UserError(f"{path}: {info.plumbing}; expected weights of a run whose teachers were trained")
    file = weights.file_of_run(path)
    report = run_report(file) if file.name == "last.pt" else {}
    if info.step is not None and report.get("steps", info.step) != info.step:
        raise UserError(
            f"{file}: of step {info.step}, but the report of its run is of step {report['steps']}; expected the "
            "weights that were measured"
        )


def run_report(last: Path) -> dict[str, Any]:
    """The report.json of the run whose weights/last.pt this is; empty if there is none, or none that can be read."""
    try:
        report = json.loads((last.parent.parent / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def start_model(
    arch: str,
    names: Sequence[str],
    path: str | Path,
    *,
    new_head: bool = False,
    aliases: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: print(line),
) -> nn.Module:
    """A detector for the classes `names`, in train mode, started from a file (ours or public) with other classes.

    Classes are joined by name, never by position (class_names.released_columns ignores case and spaces, and takes
    synonyms). A class that is in the file keeps its rows of the class head. Other classes get fresh rows from torch's
    global generator, as in models.build. All other weights are the file's, and so is the width of the class branch.
    Before any training, the classes that were in the file therefore get the same scores as from the file's model. For
    this a Faster R-CNN's softmax head keeps the file's other classes as background and starts fresh rows at odds of
    FRESH_PRIOR; for an RT-DETR it holds where both models choose the same queries. `say` is called with one line:
    which rows were kept and which start fresh.

    A pruned model stays as narrow as it is. One that was fine-tuned for int8 starts from its weights alone.

    new_head: start the whole class head fresh, even if it would fit. aliases: class -> the file's name of it.
    UserError for a file that does not fit, that has no class names to join by, or that check_trained refuses.
    """
    path = Path(path)
    with torch.random.fork_rng(devices=[]):  # the fresh rows do not depend on how the file is read
        released, info = checkpoint.read_model(path, arch)
    check_trained(info, path)
    remove_int8(released)
    theirs = released.state_dict()
    widths = models.widths_of(arch, len(info.names), theirs) if info.arch == arch else None
    if new_head:
        model = models.build(arch, len(names), widths=widths)
        own, class_head = model.state_dict(), checkpoint.class_head(model)
        fresh = {name: own[name] for name in own if name.startswith(class_head)}
        kept = {name: value for name, value in theirs.items() if not name.startswith(class_head)}
        say(f"{path}: the class head starts fresh as a whole (new_head): {len(fresh)} entries")
        checkpoint.load_state(model, kept | fresh, path)
        return model
    if info.names_from == "nothing":
        raise UserError(
            f"{path}: it does not name its {len(info.names)} classes, expected a file with class names; "
            "new_head=true starts the class head fresh"
        )
    if info.names_from == "the release":
        say(f"{path}: it does not name its classes; taken for COCO's {len(info.names)}, as {arch} was released")
    columns = released_columns(names, info.names, str(path), aliases)
    head = models.head_of(arch, len(info.names), theirs)
    if arch.startswith("fasterrcnn_"):
        num_left = len(info.names) - len({column for column in columns if column is not None})
        head = {"other_classes": num_left + head.get("other_classes", 0)}
    model = models.build(arch, len(names), widths=widths, **head)
    checkpoint.load_state(model, join_heads(model, released, columns), path)
    say(f"{path}: {describe_join(names, info.names, columns)}")
    return model


def join_heads(model: nn.Module, released: nn.Module, columns: Sequence[int | None]) -> dict[str, Tensor]:
    """The state dict of `released`, with class rows for the classes of `model`, from both: see weights.take_rows."""
    own, state = model.state_dict(), dict(released.state_dict())
    for fresh_rows, released_rows in zip(_class_rows(model), _class_rows(released)):
        pattern = weights.row_pattern(fresh_rows.layer)
        for name in [name for name in own if name in state and pattern.match(name)]:
            fresh = own[name]
            if fresh_rows.is_softmax:  # a class that is not found yet takes nothing of the others' probabilities
                fresh = fresh + state[name].mean(0) + (math.log(FRESH_PRIOR) if fresh.dim() == 1 else 0)
            state[name] = weights.take_rows(
                fresh, state[name], columns, fresh_rows=fresh_rows, released_rows=released_rows
            )
    return state


def _class_rows(model: nn.Module) -> tuple[weights.ClassRows, ...]:
    return cast(tuple[weights.ClassRows, ...], model.class_rows)  # structures.Detector describes it


def describe_join(names: Sequence[str], released_names: Sequence[str], columns: Sequence[int | None]) -> str:
    """One line: the classes whose rows were kept, those that start fresh, and how many of the file's are unused."""
    taken = [(name, released_names[column]) for name, column in zip(names, columns) if column is not None]
    pairs = [name if name == theirs else f"{name} from {theirs}" for name, theirs in taken]
    fresh = [name for name, column in zip(names, columns) if column is None]
    num_left = len(set(range(len(released_names))) - set(columns))
    return (
        f"class rows taken over by name: {', '.join(pairs) or 'none'}; start fresh: {', '.join(fresh) or 'none'}; "
        f"left in the file: {num_left} of {counted(len(released_names), 'class')}"
    )
