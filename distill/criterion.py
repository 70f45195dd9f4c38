"""The criterion: reads the distillation terms of a config, and returns named, weighted losses.

    L_term(epoch) = weight * factor(epoch) * teacher weight * sum_maps loss(adapter(student map), teacher map)

A weight is a number, or measured as a share of the detection loss's gradient (distill/gradient_shares.py).

The name of a map is a key of `output.features` (p3, c4, ...) or an attribute of the output (class_logits). A term that
could never act is refused before any training step: see Criterion.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import STUDENT, GradientShare, TermConfig
from datasets.class_names import join_classes
from distill.adapters import like_adapted, resize_like, resize_shown
from distill.batch import BatchOutputs
from distill.checks import check_terms, term_name
from distill.gradient_shares import GradientShares
from distill.losses.crosskd import TRAINS_OTHERWISE
from distill.outputs import any_map, content_at, head_levels, named_map, only_at
from distill.probing import own_losses, probe, reads_objects, try_term
from distill.teacher_weights import confidence_weights, of_labelled, teacher_cross_entropy
from distill.term_inputs import ClassColumns, TermInputs, check_anchors
from distill.terms import LOSSES
from distill.trained_parts import build_adapters, build_losses
from errors import UserError, counted, expect, naming, shortened
from layers.precision import in_precision_of
from structures import Detector, Targets


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """Facts about a teacher that its model does not tell.

    class_names: its classes in its order; (): the dataset's.
    image_size: the side in pixels of the square images that it gets; None: that of the student's.
    aliases: the teacher's name of a class, by the student's name of it.
    """

    class_names: tuple[str, ...] = ()
    image_size: int | None = None
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)


def term_factor(term: TermConfig, epoch: float, epochs: int) -> float:
    """The factor of the term's weight at a fractional epoch in [0, epochs]: warm-up times decay, 0 from stop_epoch on.

    The warm-up is linear from 0 to 1 over warmup_epochs. The decay, with x = epoch / epochs and f = final_fraction:

        none    1
        linear  1 - (1 - f) x
        cosine  f + (1 - f) (1 + cos(pi x)) / 2
    """
    if term.stop_epoch is not None and epoch >= term.stop_epoch:
        return 0.0
    x, f = min(epoch / max(epochs, 1), 1.0), term.final_fraction
    decays = {"none": 1.0, "linear": 1 - (1 - f) * x, "cosine": f + (1 - f) * (1 + math.cos(math.pi * x)) / 2}
    warmup = min(epoch / term.warmup_epochs, 1.0) if term.warmup_epochs > 0 else 1.0
    return warmup * decays[term.decay]


class Criterion(nn.Module):
    """All distillation terms of a run, with their adapters and the trained parts of their losses.

    Its parameters and its state are those of adapters and losses alone: the models are no part of it.

    Args:
        terms: from the config. Without any, the criterion returns {}.
        student, teachers: the models, teachers by name. Each is run once on two grey images, in eval mode and without
            gradients, to find the shapes of its maps. Nothing in them changes.
        epochs: of the run.
        image_size: the side of the student's images. class_names: of the dataset. facts: of each teacher.
        teacher_weighting: fixed, teachers count by the weights of their terms; confidence, all terms of a teacher get a
            factor as well, from how well it predicts the labels of the batch (distill.teacher_weights).
        unlabelled_has_boxes: False where the run has unlabelled images without pseudo boxes.
    Raises:
        UserError for a teacher in train mode, and where a term could never act: an unknown teacher, loss, map or
        parameter; a weight of 0; a schedule that is always 0; widths that no adapter joins; logits of different shapes;
        no class in common; a name used twice, or by one of the student's own losses; models that lack what the loss
        reads; a loss that is 0 for any outputs, such as image_kl of one class; a loss that compares at the objects of
        images without any.
    """

    def __init__(
        self,
        terms: Sequence[TermConfig],
        *,
        student: nn.Module,
        teachers: dict[str, nn.Module],
        epochs: int,
        image_size: int = 64,
        class_names: tuple[str, ...] = (),
        facts: dict[str, TeacherFacts] | None = None,
        teacher_weighting: str = "fixed",
        unlabelled_has_boxes: bool = True,
    ) -> None:
        super().__init__()
        self._models = (student, dict(teachers))  # in a tuple: not modules of this one
        self.epochs = epochs
        self.teacher_weighting = teacher_weighting
        self.terms: dict[str, TermConfig] = {}
        self.classes: dict[str, ClassColumns | None] = {}  # by term: columns of the classes that both models have
        self.teacher_classes: dict[str, ClassColumns | None] = {}  # by teacher: the same, for its weight
        self.adapters = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        self.shares = GradientShares({}, {}, ())
        if not terms:
            return
        facts = {name: (facts or {}).get(name, TeacherFacts()) for name in teachers}

        @functools.cache  # it prints its line once for each teacher
        def classes_of(teacher: str) -> ClassColumns | None:
            check_names("student", student, class_names)
            check_names(f"teacher {teacher!r}", teachers[teacher], facts[teacher].class_names or class_names)
            return common_classes(teacher, class_names, facts[teacher])

        self.terms = check_terms(terms, tuple(teachers))
        s_probe = probe(student, image_size)
        taken = own_losses(student, s_probe) if any(term.name for term in terms) else []
        for index, name in enumerate(self.terms):
            if name in taken:
                expected = f"another than {', '.join(taken)}: these are the student's own losses"
                raise UserError(f"terms.{index}.name: found {name!r}, expected {expected}")
        t_probes = {STUDENT: s_probe}
        for name, teacher in teachers.items():
            is_training = any(part.training for part in teacher.modules() if isinstance(part, TRAINS_OTHERWISE))
            expect(not is_training, f"teacher {name!r}", "train mode, where BatchNorm answers by the batch", ".eval()")
            with naming(f"teacher {name!r}", ValueError):  # its facts may state an image size of its own
                t_probes[name] = probe(teacher, facts[name].image_size or image_size)
        for index, (name, term) in enumerate(self.terms.items()):
            key, t_probe = f"terms.{index}", t_probes[term.teacher]
            with naming(key):
                self.classes[name] = classes_of(term.teacher) if compares_classes(term) else None
            self._build_term(key, name, s_probe, t_probe)
            has_no_boxes = not unlabelled_has_boxes and term.on != "labelled"  # true of its unlabelled images
            if has_no_boxes and reads_objects(self, term, s_probe, t_probe):
                found = f"{term.on}, but loss {term.loss!r} reads the objects of an image, which unlabelled ones lack"
                raise UserError(f"{key}.on: found {found}, expected labelled, or data.unlabelled.pseudo")
        shares = {name: t.weight.share for name, t in self.terms.items() if isinstance(t.weight, GradientShare)}
        maps = {name: term.student_maps for name, term in self.terms.items()}
        self.shares = GradientShares(shares, maps, tuple(s_probe.features))
        if teacher_weighting != "fixed":
            with naming("key 'teacher_weighting'"):
                check_comparable(teachers)
                self.teacher_classes = {name: classes_of(name) for name in teachers}

    def _build_term(self, key: str, name: str, s_probe: Any, t_probe: Any) -> None:
        """What a term trains: its adapters and losses. UserError, with the key, where it could never act."""
        term, classes = self.terms[name], self.classes[name]
        with naming(key):
            self.adapters[name] = build_adapters(term, s_probe, t_probe, classes)
        with naming(f"{key}.parameters", (ValueError, TypeError)):
            self.losses[name] = build_losses(term, s_probe, t_probe, classes)
        with naming(key, (UserError, ValueError, TypeError)):
            if LOSSES[term.loss].compares in ("logits", "outputs"):  # location by location
                check_anchors(self.student, self.teachers[term.teacher])
            try_term(self, term, s_probe, t_probe)

    @property
    def student(self) -> nn.Module:
        return self._models[0]

    @property
    def teachers(self) -> dict[str, nn.Module]:
        return self._models[1]

    @property
    def leaves_padding_out(self) -> bool:
        """Whether `forward` reads `content`, for a term with content_only."""
        return any(term.content_only for term in self.terms.values())

    def forward(
        self,
        s_output: Any,
        t_outputs: dict[str, Any],
        targets: Targets,
        epoch: float,
        content: Tensor | None = None,
        is_labelled: Tensor | None = None,
        *,
        detection: dict[str, Tensor] | None = None,
        is_warm: bool = True,
    ) -> dict[str, Tensor]:
        """Named, weighted float32 scalars, one per term, in the order of the config; 0 where its schedule is 0.

        t_outputs: each teacher's output for the same images. targets: the objects of the batch.
        epoch: fractional, step / steps per epoch.
        content: (B, 1, H, W) bool, False in the padding of the images; None: no padding.
        is_labelled: (B,) bool, for terms that act on labelled or unlabelled images: the loss of such a term is that of
            a batch of these images alone, 0 without any; None: all are labelled.
        detection: the student's own losses with their graph, needed where a weight is a share of their gradient.
        is_warm: whether the optimizer's warm-up is over, so that such weights are measured.
        UserError for an epoch below 0, which would turn the sign of a warm-up, and for an is_labelled that is no mask.
        """
        expect(not self.terms or epoch >= 0, "argument epoch", epoch, "0 or more")
        if self.terms and is_labelled is not None:
            check_mask(is_labelled, len(any_map(s_output)))
        zero = torch.zeros((), device=targets.boxes_xyxy.device)
        whole = BatchOutputs(s_output, t_outputs, targets, content)
        factors = {name: term_factor(term, epoch, self.epochs) for name, term in self.terms.items()}
        teacher_weights = self._teacher_weights(s_output, t_outputs, of_labelled(targets, is_labelled))
        kinds = dict.fromkeys(term.on for term in self.terms.values())  # in the order of the terms
        parts = {kind: images_of(kind, whole, is_labelled) for kind in kinds}
        values: dict[str, Tensor] = {}  # of the terms that their schedules let act
        for name, term in self.terms.items():
            if factors[name] != 0:
                part = parts[term.on]
                values[name] = zero if part is None else self.term_loss(term, part)
        weights = self.shares(values, detection, s_output.features if values else {}, counts=is_warm)
        losses = dict.fromkeys(self.terms, zero)
        for name, value in values.items():
            term = self.terms[name]
            factor = weights.get(name, term.weight) * factors[name]
            losses[name] = factor * teacher_weights.get(term.teacher, 1.0) * value
        return losses

    def requested_outputs(self, teacher: str) -> frozenset[str] | None:
        """The parts of a teacher's output that its terms read, so that it need not compute the rest; None: all."""
        terms = [term for term in self.terms.values() if term.teacher == teacher]
        whole = ("boxes", "outputs", "queries")
        if self.teacher_weighting != "fixed" or any(LOSSES[term.loss].compares in whole for term in terms):
            return None
        parts = {name for term in terms for name in term.teacher_maps}
        if any(LOSSES[term.loss].reads_scores for term in terms):
            if any("region" in term.parameters for term in terms):
                return None
            strides = cast(Detector, self.teachers[teacher]).strides
            parts |= {"class_logits", "objectness_logits", *head_levels(strides)}
        return frozenset(parts)

    def term_loss(self, term: TermConfig, batch: BatchOutputs) -> Tensor:
        """The sum over the pairs of one of self.terms, unweighted. Losses are computed in float32, under autocast too.

        term: its parameters may be others.
        """
        entry, name = LOSSES[term.loss], term_name(term)
        if term.teacher == STUDENT:
            teacher, t_output = self.student, batch.s_output
        else:
            teacher, t_output = self.teachers[term.teacher], batch.t_outputs[term.teacher]
        adapters, modules = cast(nn.ModuleList, self.adapters[name]), cast(nn.ModuleList, self.losses[name])
        values = []
        for s_name, t_name, adapter, module in zip(term.student_maps, term.teacher_maps, adapters, modules):
            inputs = TermInputs(
                targets=batch.targets,
                s_output=batch.s_output,
                t_output=t_output,
                student=self.student,
                teacher=teacher,
                s_name=s_name,
                t_name=t_name,
                classes=self.classes[name],
                shared=batch.shared.setdefault(term.teacher, {}),
                **adapted_maps(term, batch, s_name, t_name, adapter),
            )
            with torch.autocast(batch.targets.boxes_xyxy.device.type, enabled=False):
                if entry.module is None:
                    values.append(entry.compute(inputs, **term.parameters))
                else:
                    values.append(entry.compute(inputs, module))
        return torch.stack(values).sum()

    def _teacher_weights(self, s_output: Any, t_outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Factors of the teachers by name; {} where they are fixed."""
        if self.teacher_weighting == "fixed":
            return {}
        found = (
            teacher_cross_entropy(self.teachers[name], t_outputs[name], targets, s_output.image_size, classes=classes)
            for name, classes in self.teacher_classes.items()
        )
        cross_entropy, num_objects = map(torch.stack, zip(*found))
        return dict(zip(self.teacher_classes, confidence_weights(cross_entropy, num_objects)))


def check_mask(is_labelled: Tensor, num_images: int) -> None:
    """UserError unless it is (B,) bool. Of integers, ~ would not select the other images."""
    found = f"{str(is_labelled.dtype).removeprefix('torch.')} {tuple(is_labelled.shape)}"
    is_met = is_labelled.dtype == torch.bool and is_labelled.shape == (num_images,)
    expect(is_met, "argument is_labelled", found, f"bool ({num_images},)")


def images_of(kind: str, batch: BatchOutputs, is_labelled: Tensor | None) -> BatchOutputs | None:
    """The images of a batch that TermConfig.on names; None where it has none."""
    if kind == "all":
        return batch
    if is_labelled is None:
        return batch if kind == "labelled" else None
    chosen = is_labelled if kind == "labelled" else ~is_labelled
    return batch.of_images(chosen) if chosen.any() else None


def adapted_maps(
    term: TermConfig, batch: BatchOutputs, s_name: str, t_name: str, adapter: nn.Module
) -> dict[str, Tensor | None]:
    """The maps and contents of TermInputs for one pair; none of them for a term that compares no maps."""
    entry = LOSSES[term.loss]
    if entry.compares not in ("map", "image"):
        return {}
    s_map = named_map(batch.s_output, s_name)
    if entry.compares == "image":
        with in_precision_of(s_map):
            return {"s_map": adapter(s_map)}
    t_map = named_map(batch.t_outputs[term.teacher], t_name).detach()
    content = t_content = None
    if term.content_only and batch.content is not None:
        t_content = content_at(batch.content, t_map)
        t_map, is_reached = resize_shown(t_map, t_content, (s_map.shape[2], s_map.shape[3]))
        content = content_at(batch.content, s_map) & is_reached
    s_map = only_at(content, s_map)
    with in_precision_of(s_map):
        s_map = only_at(content, adapter(s_map))
    t_map = only_at(content, resize_like(t_map, s_map))
    if not entry.runs_teacher_layers:
        t_map = only_at(content, like_adapted(adapter, t_map))
    return {"s_map": s_map, "t_map": t_map, "content": content, "t_content": t_content}


def compares_classes(term: TermConfig) -> bool:
    """Whether the term needs the classes that both models have."""
    entry = LOSSES[term.loss]
    return entry.reads_scores or entry.compares not in ("map", "layers")


def check_comparable(teachers: dict[str, nn.Module]) -> None:
    """UserError unless weights by confidence have at least two teachers to compare, all of which classify boxes."""
    if len(teachers) < 2:
        raise UserError(f"confidence compares teachers, found {len(teachers)}")
    for name, teacher in teachers.items():
        if not hasattr(teacher, "class_logits_at"):
            raise UserError(f"teacher {name!r} cannot classify given boxes")


def check_names(who: str, model: nn.Module, names: tuple[str, ...]) -> None:
    """UserError for names, if any, that are not one for each class of the model: columns would be left out silently."""
    count = getattr(model, "num_classes", None)
    is_met = not names or count is None or len(names) == count
    expect(is_met, who, counted(len(names), "class name"), f"{count}, one for each of its classes")


def common_classes(teacher: str, class_names: tuple[str, ...], facts: TeacherFacts) -> ClassColumns | None:
    """Columns of the classes that student and teacher share; None where the lists are equal or not given.

    Prints one line where the lists differ: the classes that the teacher names otherwise, and those that it lacks.
    """
    t_names = facts.class_names or class_names
    if t_names == tuple(class_names) and not facts.aliases:
        return None
    with naming(f"teacher {teacher!r}", ValueError):
        s_columns, t_columns = join_classes(class_names, t_names, aliases=facts.aliases)
    pairs = [(class_names[s], t_names[t]) for s, t in zip(s_columns.tolist(), t_columns.tolist())]
    renamed = [f"{s_name} is its {t_name}" for s_name, t_name in pairs if s_name != t_name]
    shared = {s_name for s_name, _ in pairs}
    missing = [name for name in class_names if name not in shared]
    if renamed or missing:
        line = f"teacher {teacher!r} has {len(pairs)} of {len(class_names)} classes"
        line += f", not {shortened(missing)}" if missing else ""
        print(line + (f"; {shortened(renamed)}" if renamed else ""))
    is_equal = len(pairs) == len(t_names) == len(class_names) and torch.equal(s_columns, t_columns)
    return None if is_equal else ClassColumns(s_columns, t_columns)
