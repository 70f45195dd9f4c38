"""train.py --dry-run: what a run would do, from one batch: the maps its terms compare, its losses, their gradients."""

from typing import Any

import torch
from torch import nn

from config import Config, TermConfig
from distill.criterion import Criterion
from distill.outputs import named_map
from distill.terms import LOSSES
from runtime.processes import Processes
from training.balance import balance_table, balances
from training.building import build, count_parameters
from training.run_pictures import in_eval_mode


def dry_run(config: Config, teachers: dict[str, nn.Module] | None = None) -> None:
    """One batch forward and backward, and what the loop would do with it, printed; nothing is written.

    teachers: as train.run takes them.
    """
    parts = build(config, Processes(config.device), teachers, print)
    batch = next(parts.loader.epoch(0))
    images, targets = parts.prepare(batch, 0, 0)
    t_outputs = parts.teachers(images)
    with torch.no_grad(), in_eval_mode(parts.student):
        s_output = parts.student(images)
    parts.objective.train()
    epoch = max([0.0, *(term.warmup_epochs for term in config.terms)])  # every term at its full weight
    terms = parts.objective(images, targets, t_outputs, epoch)
    print(parts)
    print(f"batch: {len(batch)} pictures, {len(targets)} objects after augmentation")
    if parts.criterion.terms:
        print(map_table(parts.criterion, s_output, t_outputs))
    print(balance_table(balances(terms, parts.student, set(parts.criterion.terms))))
    print(f"{'sum':<24} {sum(terms.values()).item():.6g}")
    print(f"adapters and trained parts of losses: {count_parameters(parts.criterion):,} parameters")
    for name, value in parts.criterion.named_parameters():
        print(f"  {name} {tuple(value.shape)}")
    total = parts.config.epochs * parts.steps_per_epoch
    for step in sorted({0, total // 2, total - 1}):
        parts.set_rates(step)
        rates = ", ".join(f"{g['name']} ({len(g['params'])}) {g['lr']:.3g}" for g in parts.optimizer.param_groups)
        print(f"learning rates at step {step} of {total}: {rates}")


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
