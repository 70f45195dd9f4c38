"""Measures a loaded model on a dataset, as eval.py does."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from config import EvaluationConfig
from datasets.class_names import read_class_map
from datasets.open import open_dataset
from datasets.subset import keep_classes
from engine.evaluation.cross_dataset import evaluate_on_common_classes
from engine.evaluation.measuring import EvaluationResult
from engine.from_python.model import Model
from errors import UserError


def evaluate(
    model: Model,
    data: tuple[str, str, str],
    *,
    classes: Sequence[str] = (),
    class_map: Sequence[str] = (),
    image_size: int | None = None,
    workers: int = 0,
    **settings: Any,
) -> EvaluationResult:
    """See retort.evaluate. data: format, root, split. settings: those of EvaluationConfig about how, not when."""
    known = [f.name for f in fields(EvaluationConfig) if f.name not in ("every_epochs", "of_start")]
    if unknown := [name for name in settings if name not in known]:
        raise UserError(f"argument {unknown[0]}: expected one of classes, class_map, image_size, {', '.join(known)}")
    evaluation, title = replace(model.info.evaluation, **settings), " ".join(data)
    index = open_dataset(*data)
    own = model.info.classes if set(model.info.classes) <= set(index.names) else ()  # the run's, where it was limited
    if classes or own:
        index = keep_classes(index, tuple(classes or own), title)
    result, _ = evaluate_on_common_classes(
        model.module,
        index,
        model.names,
        read_class_map(list(class_map)),
        title=title,
        root=data[1],
        with_difficult=evaluation.counts_difficult,
        image_size=image_size or model.image_size,
        device=model.device,
        workers=workers,
        **evaluation.arguments(),
    )
    return result
