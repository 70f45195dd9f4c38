"""Tries a term before training: outputs of grey images and random ones, to find shapes and losses that are always 0."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from config import TermConfig
from distill.batch import BatchOutputs
from distill.checks import term_name
from distill.losses.box_classes import teacher_scale
from distill.terms import LOSSES
from errors import UserError
from layers.eval_mode import in_eval_mode
from structures import Detector, Targets

if TYPE_CHECKING:
    from distill.criterion import Criterion

NO_LOSS = 1e-12  # rounding can leave this much of a loss that is 0 by its formula


@torch.no_grad()
def probe(model: nn.Module, image_size: int) -> Any:
    """The model's output for two grey images, in eval mode. Afterwards the model is in the mode it was in before."""
    parameter = next(model.parameters())
    with in_eval_mode(model):
        return model(torch.full((2, 3, image_size, image_size), 0.5, device=parameter.device, dtype=parameter.dtype))


@torch.no_grad()
def own_losses(student: nn.Module, s_probe: Any) -> list[str]:
    """The names of the student's own losses; [] for a module without `losses`. Keeps the state of the random stream."""
    if not hasattr(student, "losses"):
        return []
    with torch.random.fork_rng(devices=[]):
        return list(cast(Detector, student).losses(s_probe, Targets.empty(next(student.parameters()).device)))


@torch.no_grad()
def try_term(criterion: "Criterion", term: TermConfig, s_probe: Any, t_probe: Any) -> None:
    """Compute a term for the probe images and for random outputs: ValueError or UserError where that fails or is 0.

    With random outputs, a term about boxes compares the classes of the objects, since noise has few detections, and
    half the locations learn an object: a loss that is 0 then is 0 for any outputs.
    """
    targets = objects_of_probe(criterion, term, s_probe)
    generator = torch.Generator().manual_seed(0)
    anywhere = {"boxes": "targets"} if "boxes" in LOSSES[term.loss].parameters() else {}
    at_targets = dataclasses.replace(term, parameters={**term.parameters, **anywhere})
    values = []
    with trial_of(criterion):
        criterion.term_loss(term, BatchOutputs(s_probe, {term.teacher: t_probe}, targets))
        for _ in range(2):
            s, t = random_output(s_probe, generator), random_output(t_probe, generator)
            batch = BatchOutputs(s, {term.teacher: t}, targets)
            if hasattr(criterion.student, "positives"):
                batch.shared[term.teacher] = {"positives": random_positives(s, targets, generator)}
            values.append(criterion.term_loss(at_targets, batch).item())
    if max(values) <= NO_LOSS:
        raise UserError(
            f"loss {term.loss!r} is 0 whatever student and teacher predict, it could never act: expected more than one "
            "class or pixel to compare, and a weight above 0 for some part of the loss"
        )


@torch.no_grad()
def reads_objects(criterion: "Criterion", term: TermConfig, s_probe: Any, t_probe: Any) -> bool:
    """Whether the loss of random outputs depends on the objects of the images.

    A loss that labels the teacher's proposals by the objects sees them only where they meet: they lie at proposals.
    """
    generator = torch.Generator().manual_seed(0)
    s, t = random_output(s_probe, generator), random_output(t_probe, generator)
    objects = objects_of_probe(criterion, term, s_probe)
    if term.parameters.get("boxes") == "proposals":
        best = torch.stack([proposals[0] for proposals in t.proposals])  # (2, 4)
        best = best / teacher_scale(s.image_size, t.image_size, like=best)
        objects = dataclasses.replace(objects[torch.tensor([0, len(objects) // 2])], boxes_xyxy=best)  # one each
    values = []
    with trial_of(criterion):
        for targets in (objects, Targets.empty(objects.labels.device)):
            torch.manual_seed(0)  # a loss that draws draws the same
            values.append(criterion.term_loss(term, BatchOutputs(s, {term.teacher: t}, targets)).item())
    return values[0] != values[1]


@contextlib.contextmanager
def trial_of(criterion: "Criterion") -> Iterator[None]:
    """Student and criterion in eval mode. The weights of later terms do not depend on draws in here."""
    criterion.to(next(criterion.student.parameters()).device)
    with in_eval_mode(criterion.student), in_eval_mode(criterion), torch.random.fork_rng(devices=[]):
        yield


def objects_of_probe(criterion: "Criterion", term: TermConfig, s_probe: Any) -> Targets:
    """probe_targets of a class that both models have."""
    classes = criterion.classes[term_name(term)]
    device = next(criterion.student.parameters()).device
    return probe_targets(s_probe.image_size, device, label=0 if classes is None else int(classes.student[0]))


def random_output(output: Any, generator: torch.Generator) -> Any:
    """The output with all maps, all `..._logits` and a decoder's `memory` from N(0, 1). Boxes and anchors are kept."""
    draw = lambda value: torch.randn(value.shape, generator=generator).to(value)
    features = {name: draw(value) for name, value in output.features.items()}
    named = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    drawn = {name: v for name, v in named.items() if name.endswith("_logits") or name == "memory"}
    drawn = {name: draw(v) for name, v in drawn.items() if isinstance(v, Tensor)}
    return dataclasses.replace(output, features=features, **drawn)


def probe_targets(image_size: tuple[int, int], device: torch.device, label: int = 0) -> Targets:
    """Three objects of one class in each of two images, so that relations between objects have something to compare."""
    height, width = image_size
    sides = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.05, 0.1, 0.4, 0.6], [0.5, 0.45, 0.95, 0.9]], device=device)
    boxes_xyxy = (sides * sides.new_tensor([width, height, width, height])).repeat(2, 1)  # (6, 4)
    labels = torch.full((6,), label, device=device)
    is_ignored = torch.zeros(6, dtype=torch.bool, device=device)
    return Targets(boxes_xyxy, labels, torch.arange(2, device=device).repeat_interleave(3), is_ignored)


def random_positives(output: Any, targets: Targets, generator: torch.Generator) -> Tensor:
    """(B, A) int64, like `positives` of a dense student: at half the locations a random object, else -1."""
    b, a = output.class_logits.shape[:2]
    per_image = len(targets) // b
    rows = torch.randint(per_image, (b, a), generator=generator) + per_image * torch.arange(b)[:, None]
    return torch.where(torch.rand(b, a, generator=generator) < 0.5, rows, -1).to(targets.image.device)
