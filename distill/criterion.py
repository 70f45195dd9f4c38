"""The criterion: reads the distillation terms of a config, and returns named, weighted losses.

    L_term(epoch) = weight * factor(epoch) * sum_maps loss(adapter(student map), teacher map)

A map is named: a key of `output.features` (p3, c4, ...), or an attribute of the output (class_logits). A term that
could never act is refused when the criterion is built, before any training step: see Criterion.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from config import TermConfig
from distill.adapters import build_adapter, resize_like
from distill.terms import LOSSES, Scene, TermLoss, parameters_of
from errors import UserError
from structures import Targets


def named_map(output: Any, name: str) -> Tensor:
    """The tensor called `name` in a model's output: of its `features`, else its own attribute."""
    if name in output.features:
        return output.features[name]
    value = getattr(output, name, None)
    if not isinstance(value, Tensor):
        tensors = [f.name for f in dataclasses.fields(output) if isinstance(getattr(output, f.name), Tensor)]
        raise KeyError(f"{name!r} is not among {', '.join([*output.features, *tensors])}")
    return value


def schedule_factor(term: TermConfig, epoch: float, epochs: int) -> float:
    """What the term's weight is multiplied by at a fractional epoch in [0, epochs].

    Linear warm-up 0..1 over warmup_epochs; 0 from stop_epoch on; between them the decay, with x = epoch / epochs and
    f = final_fraction: none 1, linear 1 - (1 - f) x, cosine f + (1 - f) (1 + cos(pi x)) / 2.
    """
    if term.stop_epoch is not None and epoch >= term.stop_epoch:
        return 0.0
    x, f = min(epoch / max(epochs, 1), 1.0), term.final_fraction
    decay = {"none": 1.0, "linear": 1 - (1 - f) * x, "cosine": f + (1 - f) * (1 + math.cos(math.pi * x)) / 2}[
        term.decay
    ]
    warmup = min(epoch / term.warmup_epochs, 1.0) if term.warmup_epochs > 0 else 1.0
    return warmup * decay


class Criterion(nn.Module):
    """All distillation terms of a run, with their adapters and the trained parts of their losses.

    Args:
        terms: from the config; none gives a criterion that returns {}.
        student, teachers: the models, teachers by name. Each is run once, in eval mode and without gradients, on one
            grey probe picture of image_size, to learn the shapes of its maps; nothing in them changes.
        epochs: of the run; a schedule that is 0 throughout is refused.
        class_names, teacher_class_names: logits can only be compared where the class lists are equal.
    Raises:
        UserError where a term could never act: an unknown teacher, loss, map or parameter; a weight of 0; a schedule
        that never turns it on; widths no adapter joins; logits of different shapes or class lists; a name used twice.
    """

    def __init__(
        self,
        terms: tuple[TermConfig, ...],
        *,
        student: nn.Module,
        teachers: dict[str, nn.Module],
        epochs: int,
        image_size: int = 64,
        class_names: tuple[str, ...] = (),
        teacher_class_names: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.terms = {}
        self.epochs = epochs
        self.adapters = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        if not terms:
            return
        s_probe = probe(student, image_size)
        t_probes = {name: probe(teacher, image_size) for name, teacher in teachers.items()}
        names = {name: tuple(listed) for name, listed in (teacher_class_names or {}).items()}
        for index, term in enumerate(terms):
            key = f"terms.{index}"
            term = check_term(term, key, tuple(teachers), epochs)
            if term.name in self.terms:
                raise UserError(f"{key}: the name {term.name!r} is used twice; give one of the terms another `name`")
            listed = names.get(term.teacher, class_names)
            if "class_logits" in term.student_maps and listed != tuple(class_names):
                raise UserError(
                    f"{key}: teacher {term.teacher!r} knows the classes {', '.join(listed)}, "
                    f"the student {', '.join(class_names)}; class logits need equal class lists"
                )
            t_probe = t_probes[term.teacher]
            self.adapters[term.name] = build_adapters(term, key, s_probe, t_probe)
            self.losses[term.name] = build_losses(term, key, t_probe)
            self.terms[term.name] = term
            self._try_term(term, key, s_probe, t_probe)

    def forward(self, s_output: Any, t_outputs: dict[str, Any], targets: Targets, epoch: float) -> dict[str, Tensor]:
        """Named, weighted float32 scalars, one per term, in the order of the config; 0 where its schedule is off.

        t_outputs: each teacher's output for the same images. targets: of the batch, for losses that mask with them.
        epoch: fractional, step / steps per epoch.
        """
        losses = {}
        for name, term in self.terms.items():
            factor = schedule_factor(term, epoch, self.epochs)
            if factor == 0:
                losses[name] = torch.zeros((), device=targets.boxes_xyxy.device)
                continue
            losses[name] = term.weight * factor * self._term_loss(term, s_output, t_outputs[term.teacher], targets)
        return losses

    def _term_loss(self, term: TermConfig, s_output: Any, t_output: Any, targets: Targets) -> Tensor:
        number = 1000 * list(self.terms).index(term.name)
        values = []
        pairs = zip(term.student_maps, term.teacher_maps, self.adapters[term.name], self.losses[term.name])
        for index, (s_name, t_name, adapter, loss) in enumerate(pairs):
            seed = (torch.initial_seed() + number + index) % 2**63  # the training loop seeds torch for every step
            scene = Scene(targets, s_output.image_size, t_output, seed)
            s, t = named_map(s_output, s_name), named_map(t_output, t_name).detach()
            is_half = s.dtype in (torch.bfloat16, torch.float16)
            with torch.autocast(s.device.type, dtype=s.dtype if is_half else None, enabled=is_half):
                s = adapter(s)  # in the precision the student's map came in
            if loss.argument == "map":
                t = resize_like(t, s)
            with torch.autocast(s.device.type, enabled=False):  # losses compute in float32
                values.append(loss(s, t, scene))
        return torch.stack(values).sum()

    @torch.no_grad()
    def _try_term(self, term: TermConfig, key: str, s_probe: Any, t_probe: Any) -> None:
        """Compute a term once, for one object in the probe picture: what cannot be computed is refused here."""
        height, width = s_probe.image_size
        device = named_map(s_probe, term.student_maps[0]).device
        box = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]], device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        self.to(device).eval()
        try:
            self._term_loss(term, s_probe, t_probe, Targets(box, zero, zero, zero.bool()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}: {error}") from None
        finally:
            self.train()


@torch.no_grad()
def probe(model: nn.Module, image_size: int) -> Any:
    """The model's output for one grey picture, in eval mode; its train/eval mode is as before afterwards."""
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        return model(torch.full((1, 3, image_size, image_size), 0.5, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(was_training)


def check_term(term: TermConfig, key: str, teachers: tuple[str, ...], epochs: int) -> TermConfig:
    """The term with its defaults filled in, or a UserError that names the key and what was expected."""
    if term.teacher not in teachers:
        raise UserError(f"{key}.teacher: found {term.teacher!r}, expected one of {', '.join(teachers) or 'no teacher'}")
    if term.loss not in LOSSES:
        raise UserError(f"{key}.loss: found {term.loss!r}, expected one of {', '.join(LOSSES)}")
    if not term.weight > 0 or not math.isfinite(term.weight):
        raise UserError(f"{key}.weight: found {term.weight}, expected a number above 0: the term could never act")
    if term.stop_epoch is not None and term.stop_epoch <= 0:
        raise UserError(f"{key}.stop_epoch: found {term.stop_epoch}, expected more than 0: the term could never act")
    if not term.student_maps:
        raise UserError(f"{key}.student_maps: found none, expected at least one name")
    teacher_maps = term.teacher_maps or term.student_maps
    if len(teacher_maps) != len(term.student_maps):
        raise UserError(
            f"{key}.teacher_maps: found {len(teacher_maps)}, expected {len(term.student_maps)}, one per student map"
        )
    known = parameters_of(LOSSES[term.loss])
    for name in term.parameters:
        if name not in known:
            expected = ", ".join(sorted(known)) or "none"
            raise UserError(f"{key}.parameters: found {name!r}, expected of loss {term.loss!r}: {expected}")
    name = term.name or f"{term.loss}_{term.teacher}"
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"{key}.name: found {name!r}, expected letters, digits, _ and - (it names a column of the log)")
    return dataclasses.replace(term, name=name, teacher_maps=tuple(teacher_maps))


def build_adapters(term: TermConfig, key: str, s_probe: Any, t_probe: Any) -> nn.ModuleList:
    """One adapter per pair of maps; UserError where the pair cannot be joined."""
    adapters = nn.ModuleList()
    for s_name, t_name in zip(term.student_maps, term.teacher_maps):
        try:
            s, t = named_map(s_probe, s_name), named_map(t_probe, t_name)
        except KeyError as error:
            raise UserError(f"{key}: map {error.args[0]}") from None
        if LOSSES[term.loss].argument == "logits":
            if s.shape != t.shape or term.adapter != "none":
                raise UserError(
                    f"{key}: logits {s_name} {tuple(s.shape)} of the student and {t_name} {tuple(t.shape)} of the "
                    f"teacher must have equal shapes and adapter none"
                )
            adapters.append(nn.Identity())
            continue
        if s.dim() != 4 or t.dim() != 4:
            raise UserError(f"{key}: {s_name} {tuple(s.shape)} and {t_name} {tuple(t.shape)} are not maps (B, C, H, W)")
        if term.adapter == "none" and not LOSSES[term.loss].same_width:
            adapters.append(nn.Identity())
            continue
        try:
            adapters.append(build_adapter(term.adapter, s.shape[1], t.shape[1]))
        except ValueError as error:
            raise UserError(f"{key}: {s_name} and {t_name}: {error}") from None
    return adapters


def build_losses(term: TermConfig, key: str, t_probe: Any) -> nn.ModuleList:
    """One loss per pair of maps, as wide as the teacher's map; UserError for parameters it does not take."""
    try:
        widths = [named_map(t_probe, name).shape[1] for name in term.teacher_maps]
        return nn.ModuleList(TermLoss(LOSSES[term.loss], width, term.parameters) for width in widths)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}.parameters: {error}") from None
