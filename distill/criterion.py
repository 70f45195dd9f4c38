"""The criterion: reads the distillation terms of a config, and returns named, weighted losses.

    L_term(epoch) = weight * factor(epoch) * teacher weight * sum_maps loss(adapter(student map), teacher map)

A map is named: a key of `output.features` (p3, c4, ...), or an attribute of the output (class_logits). A term that
could never act is refused when the criterion is built, before any training step: see Criterion.
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from config import TermConfig
from datasets.class_names import join_classes
from distill.adapters import build_adapter, like_adapted, normalises, resize_like
from distill.outputs import content_at, in_precision_of, named_map, only_at
from distill.probing import NO_LOSS, probe, probe_targets, random_output, random_positives
from distill.teacher_weights import confidence_weights, teacher_cross_entropy
from distill.term_inputs import TermInputs
from distill.terms import LOSSES, misfit
from errors import UserError
from structures import Targets


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """What the criterion must know of a teacher besides the model.

    class_names: those it knows, in its order; () compares by position alone. image_size: of the square pictures it is
    given, in pixels; None: the student's. aliases: the teacher's name of a class, by the student's name of it.
    """

    class_names: tuple[str, ...] = ()
    image_size: int | None = None
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)


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
            pair of grey images, to learn the shapes of its maps; nothing in them changes, and none of them becomes a
            part of the criterion: its parameters and its state are those of adapters and losses.
        epochs: of the run; a schedule that is 0 throughout is refused.
        image_size: of the student's pictures. class_names: of the dataset. facts: of each teacher.
        teacher_weighting: fixed, each teacher counts as its terms say; or confidence, a factor for all terms of a
            teacher, from how well it knows the labels of the batch (distill.teacher_weights).
    Raises:
        UserError where a term could never act: an unknown teacher, loss, map or parameter; a weight of 0; a schedule
        that never turns it on; widths no adapter joins; logits of different shapes; no class in common; a name used
        twice; models that lack what the loss reads; a loss that is 0 for any outputs, such as image_kl of one class.
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
        facts: dict[str, TeacherFacts] | None = None,
        teacher_weighting: str = "fixed",
    ) -> None:
        super().__init__()
        self.terms: dict[str, TermConfig] = {}
        self.epochs = epochs
        self.models = (student, dict(teachers))  # in a tuple: not modules of this one
        self.teacher_weighting = teacher_weighting
        self.classes: dict[str, tuple[Tensor, Tensor] | None] = {}  # of each term, those that both models know
        self.trusted_in: dict[str, tuple[Tensor, Tensor] | None] = {}  # the same of each teacher, for its weight
        self.adapters = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        if not terms:
            return
        facts = {name: (facts or {}).get(name, TeacherFacts()) for name in teachers}
        joined: dict[str, tuple[Tensor, Tensor] | None] = {}  # of each teacher, once
        s_probe = probe(student, image_size)
        t_probes = {name: probe(teacher, facts[name].image_size or image_size) for name, teacher in teachers.items()}
        for index, term in enumerate(terms):
            key = f"terms.{index}"
            term = check_term(term, key, tuple(teachers), epochs)
            if term.name in self.terms:
                raise UserError(f"{key}: the name {term.name!r} is used twice; give one of the terms another `name`")
            t_probe, classes = t_probes[term.teacher], None
            if compares_classes(term):
                if term.teacher not in joined:
                    joined[term.teacher] = common_classes(key, term.teacher, class_names, facts[term.teacher])
                classes = joined[term.teacher]
            self.adapters[term.name] = build_adapters(term, key, s_probe, t_probe, classes)
            self.losses[term.name] = build_losses(term, key, s_probe, t_probe, classes)
            self.terms[term.name], self.classes[term.name] = term, classes
            self._try_term(term, key, s_probe, t_probe)
        self._check_weighting(class_names, facts, joined)

    @property
    def leaves_padding_out(self) -> bool:
        """Whether `forward` reads content, for a term with content_only."""
        return any(term.content_only for term in self.terms.values())

    def forward(
        self,
        s_output: Any,
        t_outputs: dict[str, Any],
        targets: Targets,
        epoch: float,
        content: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Named, weighted float32 scalars, one per term, in the order of the config; 0 where its schedule is off.

        t_outputs: each teacher's output for the same images. targets: of the batch, for losses that mask with them.
        epoch: fractional, step / steps per epoch.
        content: (B, 1, H, W) bool, where the images show a picture and no padding; None: everywhere.
        """
        losses, shared = {}, {name: {} for name in t_outputs}
        trust = self._teacher_weights(s_output, t_outputs, targets)
        for name, term in self.terms.items():
            factor = term.weight * schedule_factor(term, epoch, self.epochs)
            if factor == 0:
                losses[name] = torch.zeros((), device=targets.boxes_xyxy.device)
                continue
            teacher = term.teacher
            value = self._term_loss(term, s_output, t_outputs[teacher], targets, shared[teacher], content)
            losses[name] = factor * trust[term.teacher] * value if term.teacher in trust else factor * value
        return losses

    def requested_outputs(self, teacher: str) -> frozenset[str] | None:
        """The parts of a teacher's output that its terms read, so that it can leave out the rest; None: all of it."""
        terms = [term for term in self.terms.values() if term.teacher == teacher]
        whole = ("boxes", "outputs")
        if self.teacher_weighting != "fixed" or any(LOSSES[term.loss].reads in whole for term in terms):
            return None
        parts = {name for term in terms for name in term.teacher_maps}
        if any(LOSSES[term.loss].reads_scores for term in terms):
            if any("region" in term.parameters for term in terms):
                return None
            _, teachers = self.models
            levels = [name for name in teachers[teacher].strides if name[0] == "p" and name[1:].isdigit()]
            parts |= {"class_logits", "objectness_logits", *levels}
        return frozenset(parts)

    def _term_loss(
        self,
        term: TermConfig,
        s_output: Any,
        t_output: Any,
        targets: Targets,
        shared: dict[Hashable, Any],
        content: Tensor | None = None,
    ) -> Tensor:
        """The sum over the term's pairs, unweighted. Losses are computed in float32, under autocast too."""
        entry = LOSSES[term.loss]
        student, teachers = self.models
        values = []
        pairs = zip(term.student_maps, term.teacher_maps, self.adapters[term.name], self.losses[term.name])
        for s_name, t_name, adapter, module in pairs:
            s_map = t_map = shown = None
            if entry.reads in ("map", "image"):
                s_map = named_map(s_output, s_name)
                shown = content_at(content, s_map) if term.content_only and content is not None else None
                s_map = only_at(shown, s_map)
                with in_precision_of(s_map):
                    s_map = only_at(shown, adapter(s_map))
            if entry.reads == "map":
                t_map = only_at(shown, resize_like(named_map(t_output, t_name).detach(), s_map))
                t_map = t_map if entry.finishes_maps else only_at(shown, like_adapted(adapter, t_map))
            inputs = TermInputs(
                targets=targets,
                s_output=s_output,
                t_output=t_output,
                student=student,
                teacher=teachers[term.teacher],
                s_name=s_name,
                t_name=t_name,
                s_map=s_map,
                t_map=t_map,
                classes=self.classes[term.name],
                content=shown,
                shared=shared,
            )
            with torch.autocast(targets.boxes_xyxy.device.type, enabled=False):
                if entry.module is None:
                    values.append(entry.compute(inputs, **term.parameters))
                else:
                    values.append(entry.compute(inputs, module))
        return torch.stack(values).sum()

    def _teacher_weights(self, s_output: Any, t_outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Factors of the teachers by name; {} where they are fixed."""
        if self.teacher_weighting == "fixed":
            return {}
        _, teachers = self.models
        doubts = [
            teacher_cross_entropy(teachers[name], t_outputs[name], targets, s_output.image_size, classes=classes)
            for name, classes in self.trusted_in.items()
        ]
        return dict(zip(self.trusted_in, confidence_weights(torch.stack(doubts))))

    def _check_weighting(
        self, class_names: tuple[str, ...], facts: dict[str, TeacherFacts], joined: dict[str, Any]
    ) -> None:
        """Weights by confidence compare at least two teachers, each of which can be asked about boxes."""
        if self.teacher_weighting == "fixed":
            return
        _, teachers = self.models
        if len(teachers) < 2:
            raise UserError(f"key 'teacher_weighting': confidence compares teachers, found {len(teachers)}")
        for name, teacher in teachers.items():
            if not hasattr(teacher, "class_logits_at"):
                raise UserError(f"key 'teacher_weighting': teacher {name!r} cannot be asked about boxes")
            if name not in joined:
                joined[name] = common_classes("key 'teacher_weighting'", name, class_names, facts[name])
            self.trusted_in[name] = joined[name]

    @torch.no_grad()
    def _try_term(self, term: TermConfig, key: str, s_probe: Any, t_probe: Any) -> None:
        """Compute a term for the probe images and for random outputs: UserError where it fails, or is always 0.

        Of random outputs, a term about boxes compares the classes of the objects, since noise has few detections, and
        every other location learns an object: a loss is 0 there only if no outputs could make it anything else.
        """
        student, _ = self.models
        device = next(student.parameters()).device
        targets = probe_targets(s_probe.image_size, device)
        generator = torch.Generator().manual_seed(0)
        anywhere = {"boxes": "targets"} if "boxes" in LOSSES[term.loss].parameters() else {}
        at_targets = dataclasses.replace(term, parameters={**term.parameters, **anywhere})
        was_training = student.training
        self.to(device).eval()
        student.eval()
        values = []
        try:
            with torch.random.fork_rng(devices=[]):  # the weights of later terms do not depend on these draws
                self._term_loss(term, s_probe, t_probe, targets, {})
                for _ in range(2):
                    s, t = random_output(s_probe, generator), random_output(t_probe, generator)
                    is_dense = hasattr(student, "positives")
                    shared = {"positives": random_positives(s, targets, generator)} if is_dense else {}
                    values.append(self._term_loss(at_targets, s, t, targets, shared).item())
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}: {error}") from None
        finally:
            self.train()
            student.train(was_training)
        if max(values) <= NO_LOSS:
            raise UserError(
                f"{key}: loss {term.loss!r} is 0 whatever student and teacher predict, it could never act: expected "
                "more than one class or pixel to compare, and a weight above 0 for some part of the loss"
            )


RENAMED = {"box_beliefs": "box_classes"}
LOGITS = {"soft_class": "class_logits", "quality_focal": "class_logits", "localization": "box_logits"}
OTHER_BRANCH = {
    "crosskd_classes": "box",
    "crosskd_edges": "cls",
}  # what the names of the other branch's maps begin with
FIXED_MAPS = {"boxes": ("boxes",), "outputs": ("outputs",)}  # readings whose tensors have no other name


def check_term(term: TermConfig, key: str, teachers: tuple[str, ...], epochs: int) -> TermConfig:
    """The term with its defaults filled in, or a UserError that names the key and what was expected."""
    if term.teacher not in teachers:
        raise UserError(f"{key}.teacher: found {term.teacher!r}, expected one of {', '.join(teachers) or 'no teacher'}")
    if term.loss in RENAMED:
        raise UserError(f"{key}.loss: found {term.loss!r}, which is called {RENAMED[term.loss]!r} now")
    if term.loss not in LOSSES:
        raise UserError(f"{key}.loss: found {term.loss!r}, expected one of {', '.join(LOSSES)}")
    if not term.weight > 0 or not math.isfinite(term.weight):
        raise UserError(f"{key}.weight: found {term.weight}, expected a number above 0: the term could never act")
    if term.stop_epoch is not None and term.stop_epoch <= 0:
        raise UserError(f"{key}.stop_epoch: found {term.stop_epoch}, expected more than 0: the term could never act")
    if term.content_only and (LOSSES[term.loss].reads != "map" or LOSSES[term.loss].finishes_maps):
        raise UserError(f"{key}.content_only: loss {term.loss!r} compares more than maps, expected false")
    student_maps, teacher_maps = check_maps(term, key)
    known = LOSSES[term.loss].parameters()
    for name in term.parameters:
        if name not in known:
            expected = ", ".join(sorted(known)) or "none"
            raise UserError(f"{key}.parameters: found {name!r}, expected of loss {term.loss!r}: {expected}")
        value = term.parameters[name]
        if expected := misfit(name, value, known[name].default):
            raise UserError(f"{key}.parameters.{name}: found {value!r}, expected {expected}")
    name = term.name or f"{term.loss}_{term.teacher}"
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"{key}.name: found {name!r}, expected letters, digits, _ and - (it names a column of the log)")
    return dataclasses.replace(term, name=name, student_maps=student_maps, teacher_maps=teacher_maps)


def check_maps(term: TermConfig, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the student's and of the teacher's maps, pair by pair."""
    reads = LOSSES[term.loss].reads
    if reads in FIXED_MAPS:
        for side in ("student_maps", "teacher_maps"):
            if getattr(term, side) not in ((), FIXED_MAPS[reads]):
                raise UserError(f"{key}.{side}: loss {term.loss!r} compares {reads}, expected no names of maps")
        return FIXED_MAPS[reads], FIXED_MAPS[reads]
    if not term.student_maps:
        raise UserError(f"{key}.student_maps: found none, expected at least one name")
    default = ("image_logits",) * len(term.student_maps) if reads == "image" else term.student_maps
    teacher_maps = term.teacher_maps or default
    if len(teacher_maps) != len(term.student_maps):
        raise UserError(
            f"{key}.teacher_maps: found {len(teacher_maps)}, expected {len(term.student_maps)}, one per student map"
        )
    for side, names in (("student_maps", term.student_maps), ("teacher_maps", teacher_maps)):
        logits = LOGITS.get(term.loss)
        if logits and set(names) != {logits}:
            raise UserError(f"{key}.{side}: found {', '.join(names)}, loss {term.loss!r} compares {logits}")
    for name in teacher_maps:
        if name.startswith(OTHER_BRANCH.get(term.loss, "-")):
            raise UserError(
                f"{key}.teacher_maps: found {name!r}, a map of the branch that loss {term.loss!r} is not for"
            )
    return tuple(term.student_maps), tuple(teacher_maps)


def compares_classes(term: TermConfig) -> bool:
    """Whether the term looks at classes of both models."""
    entry = LOSSES[term.loss]
    return entry.reads_scores or entry.reads != "map"


def common_classes(
    key: str, teacher: str, class_names: tuple[str, ...], facts: TeacherFacts
) -> tuple[Tensor, Tensor] | None:
    """Columns of the classes that student and teacher share; None where the lists are equal or not known.

    One line is printed where the lists differ: what the teacher calls otherwise, and the classes that it does not have.
    """
    theirs = facts.class_names or class_names
    if theirs == tuple(class_names) and not facts.aliases:
        return None
    try:
        s_columns, t_columns = join_classes(class_names, theirs, aliases=facts.aliases)
    except ValueError as error:
        raise UserError(f"{key}: teacher {teacher!r}: {error}") from None
    pairs = [(class_names[s], theirs[t]) for s, t in zip(s_columns.tolist(), t_columns.tolist())]
    renamed = [f"{own} is its {other}" for own, other in pairs if own != other]
    shared = {own for own, _ in pairs}
    left = [name for name in class_names if name not in shared]
    if renamed or left:
        line = f"teacher {teacher!r} has {len(pairs)} of {len(class_names)} classes"
        line += f", not {', '.join(left)}" if left else ""
        print(line + (f"; {', '.join(renamed)}" if renamed else ""))
    is_equal = len(pairs) == len(theirs) == len(class_names) and torch.equal(s_columns, t_columns)
    return None if is_equal else (s_columns, t_columns)


def build_adapters(
    term: TermConfig, key: str, s_probe: Any, t_probe: Any, classes: tuple[Tensor, Tensor] | None
) -> nn.ModuleList:
    """One adapter per pair of maps; UserError where the pair cannot be joined."""
    adapters = nn.ModuleList()
    entry = LOSSES[term.loss]
    if entry.reads != "map" and term.adapter != "none":
        raise UserError(f"{key}: loss {term.loss!r} compares {entry.reads}, not maps: expected adapter none")
    for s_name, t_name in zip(term.student_maps, term.teacher_maps):
        if entry.reads in FIXED_MAPS:
            adapters.append(nn.Identity())
            continue
        try:
            s, t = named_map(s_probe, s_name), named_map(t_probe, t_name)
        except KeyError as error:
            raise UserError(f"{key}: map {error.args[0]}") from None
        shapes = f"{s_name} {tuple(s.shape)} of the student and {t_name} {tuple(t.shape)} of the teacher"
        if entry.reads == "logits":
            joins = classes is not None and s_name == t_name == "class_logits" and s.shape[:2] == t.shape[:2]
            if s.shape != t.shape and not joins:
                raise UserError(f"{key}: logits {shapes} must have equal shapes")
            adapters.append(nn.Identity())
            continue
        if s.dim() != 4 or t.dim() != (2 if entry.reads == "image" else 4):
            raise UserError(f"{key}: {shapes} are not maps (B, C, H, W)")
        if entry.reads == "image" or (term.adapter == "none" and not entry.same_width):
            adapters.append(nn.Identity())
            continue
        try:
            adapters.append(build_adapter(term.adapter, s.shape[1], t.shape[1]))
        except ValueError as error:
            raise UserError(f"{key}: {s_name} and {t_name}: {error}") from None
        if normalises(adapters[-1]) and entry.finishes_maps and not term.parameters.get("rescale", True):
            raise UserError(f"{key}: the teacher's layers cannot read a normalised map: expected rescale: true")
    return adapters


def build_losses(
    term: TermConfig, key: str, s_probe: Any, t_probe: Any, classes: tuple[Tensor, Tensor] | None
) -> nn.ModuleList:
    """The module of each pair, of the widths it needs, or Identity for a loss that trains nothing."""
    entry = LOSSES[term.loss]
    losses = nn.ModuleList()
    for s_name, t_name in zip(term.student_maps, term.teacher_maps):
        widths: tuple[int, ...] = ()
        if entry.reads == "map":
            widths = (named_map(t_probe, t_name).shape[1],)
        elif entry.reads == "image":
            known = named_map(t_probe, t_name).shape[1] if classes is None else len(classes[0])
            widths = (named_map(s_probe, s_name).shape[1], known)
        try:
            losses.append(entry.module(*widths, **term.parameters) if entry.module else nn.Identity())
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}.parameters: {error}") from None
    return losses
