"""train.py --dry-run: what a run would do, from one batch: the maps its terms compare, its losses, their gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from config import Config, TermConfig
from distill.criterion import Criterion
from distill.outputs import named_map
from distill.terms import LOSSES
from engine.runtime.processes import Processes
from engine.training.balance import balance_table, balances
from engine.training.building import (
    TrainingSetup,
    augment_batch,
    build,
    content_of_batch,
    count_parameters,
    describe_setup,
    set_learning_rates,
)
from engine.training.run_pictures import in_eval_mode
from structures import Targets


def dry_run(config: Config, teachers: dict[str, nn.Module] | None = None) -> None:
    """One batch forward and backward, and what the loop would do with it, printed; nothing is written.

    teachers: as train.run takes them.
    """
    setup = build(config, Processes(config.device), teachers, print)
    batch = next(setup.loader.epoch(0))
    images, targets = augment_batch(setup, batch, 0, 0)
    t_outputs = setup.teachers(images)
    with torch.no_grad(), in_eval_mode(setup.student):
        s_output = setup.student(images)
    setup.learner.train()
    epoch = max([0.0, *(term.warmup_epochs for term in config.terms)])  # every term at its full weight
    terms = losses_of_batch(setup, images, targets, t_outputs, epoch, content_of_batch(setup, batch, 0, 0))
    print(describe_setup(setup))
    print(f"batch: {len(batch)} pictures, {len(targets)} objects after augmentation")
    if setup.criterion.terms:
        print(map_table(setup.criterion, s_output, t_outputs))
    print(balance_table(balances(terms, setup.student, set(setup.criterion.terms))))
    print(f"{'sum':<24} {sum(terms.values()).item():.6g}")
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
) -> dict[str, Tensor]:
    """Every loss by name, weighted, as a training step on one process computes them."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=setup.bfloat16):
        s_output = setup.student(images)
    losses = setup.student.losses(s_output, targets)
    losses = {name: setup.config.detection_weight * value for name, value in losses.items()}
    return losses | setup.criterion(s_output, t_outputs, targets, epoch, content)


def map_table(criterion: Criterion, s_output: Any, t_outputs: dict[str, Any]) -> str:
    """A line for each pair that a term compares: the student's map, what is trained on top of it, the teacher's map.

    Shapes are (B, C, H, W). A teacher's map is brought to the student's grid before it is compared.
    """
    rows = [("term", "student", "trained on top", "teacher")]
    for name, term in criterion.terms.items():
        for number, (s_name, t_name) in enumerate(zip(term.student_maps, term.teacher_maps)):
            trained = sum(count_parameters(part[name][number]) for part in (criterion.adapters, criterion.losses))
            on_top = f"{what_is_trained(term)}, {trained:,} parameters" if trained else "nothing"
            t_output = t_outputs[term.teacher]
            rows.append((name, described(s_output, s_name), on_top, f"{term.teacher} {described(t_output, t_name)}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def what_is_trained(term: TermConfig) -> str:
    if LOSSES[term.loss].reads == "image":
        return "image head"
    return term.adapter if term.adapter != "none" else f"part of {term.loss}"


def described(output: Any, name: str) -> str:
    """ "p5 (8, 256, 15, 15)"; the name alone where it stands for more than one tensor ("boxes")."""
    try:
        return f"{name} {tuple(named_map(output, name).shape)}"
    except KeyError:
        return name
