"""train.py --dry-run: the maps that the terms compare, the losses and their gradients, for one batch."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from config import Config, TermConfig
from datasets.text_table import aligned
from distill.criterion import Criterion
from distill.outputs import named_map
from distill.terms import LOSSES
from engine.runtime.processes import Processes
from engine.training.balance import balance_table, balances
from engine.training.building import TrainingSetup, build, count_parameters, describe_setup
from engine.training.idle_terms import without_idle_terms
from engine.training.step import augment_batch, detection_losses, set_learning_rates
from errors import counted
from layers.eval_mode import in_eval_mode
from structures import Targets


def dry_run(config: Config, teachers: dict[str, nn.Module] | None = None) -> None:
    """Run one batch forward and backward, and print what the training loop would do with it. Writes nothing.

    teachers: as in train.run.
    """
    config, idle = without_idle_terms(config)
    if idle:
        print(idle)
    if config.plumbing:
        print(config.plumbing)
    setup = build(config, Processes(config.device), teachers, print, keep=False)
    batch = next(setup.loader.epoch(0))
    images, targets, content = augment_batch(setup, batch, 0, 0)
    t_outputs = setup.teachers(images)
    with torch.no_grad(), in_eval_mode(setup.student):
        s_output = setup.student(images)
    setup.learner.train()
    epoch = max([0.0, *(term.warmup_epochs for term in config.terms)])  # where the last warm-up ends
    terms = losses_of_batch(setup, images, targets, t_outputs, epoch, content, batch.is_labelled)
    print(describe_setup(setup))
    kinds = "" if batch.is_labelled.all() else f", {int(batch.is_labelled.sum())} of them labelled"
    when = f"; terms weighted as at epoch {epoch:g}" if epoch else ""
    shown = f"{counted(len(batch), 'picture')}{kinds}, {counted(len(targets), 'object')}"
    print(f"batch: {shown} after augmentation{when}")
    if setup.criterion.terms:
        print(map_table(setup.criterion, s_output, t_outputs))
    print(balance_table(balances(terms, setup.student, set(setup.criterion.terms))))
    for name, (_, weight) in setup.criterion.shares.measured_weights().items():
        print(f"{setup.criterion.shares.describe(name, weight)}, on this batch")
    print(f"{'sum':<24} {sum(terms.values(), torch.zeros(())).item():.6g}")
    print(f"adapters and trained parts of losses: {count_parameters(setup.criterion):,} parameters")
    for name, value in setup.criterion.named_parameters():
        print(f"  {name} {tuple(value.shape)}")
    total = setup.config.epochs * setup.steps_per_epoch
    for step in sorted({0, total // 2, total - 1}):
        set_learning_rates(setup, step)
        rates = ", ".join(f"{g['name']} ({len(g['params'])}) {g['lr']:.3g}" for g in setup.optimizer.param_groups)
        print(f"learning rates at step {step} of {total}: {rates}")


def losses_of_batch(
    setup: TrainingSetup,
    images: Tensor,
    targets: Targets,
    t_outputs: dict[str, Any],
    epoch: float,
    content: Tensor | None = None,
    is_labelled: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every loss by name, weighted, as in a training step on one process. is_labelled: Batch's; None: all are."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=setup.bfloat16):
        s_output = setup.student(images)
    is_labelled = torch.ones(len(images), dtype=torch.bool) if is_labelled is None else is_labelled
    losses = detection_losses(setup, s_output, targets, is_labelled)
    return losses | setup.criterion(s_output, t_outputs, targets, epoch, content, is_labelled, detection=losses)


def map_table(criterion: Criterion, s_output: Any, t_outputs: dict[str, Any]) -> str:
    """A line for each pair that a term compares: the student's map, the layers trained on top of it, the teacher's map.

    Shapes are (B, C, H, W), those of the teacher's maps before they are resized to the student's grid.
    """
    rows = [("term", "student", "trained on top", "teacher")]
    for name, term in criterion.terms.items():
        for number, (s_name, t_name) in enumerate(zip(term.student_maps, term.teacher_maps)):
            parts = [cast(nn.ModuleList, of_terms[name])[number] for of_terms in (criterion.adapters, criterion.losses)]
            trained = sum(map(count_parameters, parts))
            on_top = f"{name_trained_part(term)}, {trained:,} parameters" if trained else "nothing"
            t_text = f"{term.teacher} {name_and_shape(t_outputs.get(term.teacher, s_output), t_name)}"
            rows.append((name, name_and_shape(s_output, s_name), on_top, t_text))
    return "\n".join(aligned(rows, right=()))


def name_trained_part(term: TermConfig) -> str:
    if LOSSES[term.loss].compares == "image":
        return "image head"
    return term.adapter if term.adapter != "none" else f"part of {term.loss}"


def name_and_shape(output: Any, name: str) -> str:
    """Such as "p5 (8, 256, 15, 15)"; the name alone where it stands for more than one tensor ("boxes")."""
    try:
        return f"{name} {tuple(named_map(output, name).shape)}"
    except KeyError:
        return name
