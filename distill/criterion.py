"""The criterion: reads the distillation terms of a config, and returns named, weighted losses.

    L_term(epoch) = weight * factor(epoch) * teacher weight * sum_maps loss(adapter(student map), teacher map)

A weight is a number, or measured as a share of the detection loss's gradient (distill/gradient_shares.py).

The name of a map is a key of `output.features` (p3, c4, ...) or an attribute of the output (class_logits). A term that
could never act is refused before any training step: see Criterion.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import STUDENT, GradientShare, TermConfig
from datasets.class_names import join_classes
from distill.adapters import build_adapter, like_adapted, normalises, resize_like
from distill.batch import BatchOutputs
from distill.checks import FIXED_MAPS, check_terms, term_name
from distill.gradient_shares import GradientShares
from distill.outputs import content_at, head_levels, named_map, only_at
from distill.probing import NO_LOSS, probe, probe_targets, random_output, random_positives
from distill.teacher_weights import confidence_weights, of_labelled, teacher_cross_entropy
from distill.term_inputs import TermInputs
from distill.terms import LOSSES
from errors import UserError
from layers.precision import in_precision_of
from structures import Detector, Targets

ClassColumns = tuple[Tensor, Tensor]  # of the student and of the teacher, see join_classes


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


def schedule_factor(term: TermConfig, epoch: float, epochs: int) -> float:
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
        UserError where a term could never act: an unknown teacher, loss, map or parameter; a weight of 0; a schedule
        that is always 0; widths that no adapter joins; logits of different shapes; no class in common; a name used
        twice; models that lack what the loss reads; a loss that is 0 for any outputs, such as image_kl of one class; a
        loss that compares at the objects of images without any.
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
        unlabelled_has_boxes: bool = True,
    ) -> None:
        super().__init__()
        self.terms: dict[str, TermConfig] = {}
        self.epochs = epochs
        self._models = (student, dict(teachers))  # in a tuple: not modules of this one
        self.teacher_weighting = teacher_weighting
        self.classes: dict[str, ClassColumns | None] = {}  # by term: columns of the classes that both models have
        self.teacher_classes: dict[str, ClassColumns | None] = {}  # by teacher: the same, for its weight
        self.adapters = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        self.shares = GradientShares({}, {}, ())
        if not terms:
            return
        facts = {name: (facts or {}).get(name, TeacherFacts()) for name in teachers}
        joined: dict[str, ClassColumns | None] = {}  # by teacher, so that each prints its line once
        s_probe = probe(student, image_size)
        t_probes = {name: probe(teacher, facts[name].image_size or image_size) for name, teacher in teachers.items()}
        t_probes[STUDENT] = s_probe
        for index, (name, term) in enumerate(check_terms(terms, tuple(teachers)).items()):
            key = f"terms.{index}"
            t_probe, classes = t_probes[term.teacher], None
            if compares_classes(term):
                if term.teacher not in joined:
                    joined[term.teacher] = common_classes(key, term.teacher, class_names, facts[term.teacher])
                classes = joined[term.teacher]
            self.adapters[name] = build_adapters(term, key, s_probe, t_probe, classes)
            self.losses[name] = build_losses(term, key, s_probe, t_probe, classes)
            self.terms[name], self.classes[name] = term, classes
            self._try_term(term, key, s_probe, t_probe)
            if not unlabelled_has_boxes and term.on != "labelled" and self._reads_objects(term, s_probe, t_probe):
                raise UserError(
                    f"{key}.on: found {term.on}, but loss {term.loss!r} reads the objects of an image, and unlabelled "
                    "ones have none: expected on: labelled, or data.unlabelled.pseudo"
                )
        shares = {n: t.weight.share for n, t in self.terms.items() if isinstance(t.weight, GradientShare)}
        maps = {name: term.student_maps for name, term in self.terms.items()}
        self.shares = GradientShares(shares, maps, tuple(s_probe.features))
        self._check_weighting(class_names, facts, joined)

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
        """
        zero = torch.zeros((), device=targets.boxes_xyxy.device)
        whole = BatchOutputs(s_output, t_outputs, targets, content)
        factors = {name: schedule_factor(term, epoch, self.epochs) for name, term in self.terms.items()}
        teacher_weights = self._teacher_weights(s_output, t_outputs, of_labelled(targets, is_labelled))
        parts: dict[str, BatchOutputs | None] = {}  # by TermConfig.on, in the order of the terms: gradients round by it
        values: dict[str, Tensor] = {}  # of the terms that their schedules let act
        for name, term in self.terms.items():
            if term.on not in parts:
                parts[term.on] = images_of(term.on, whole, is_labelled)
            part = parts[term.on]
            if factors[name] != 0:
                values[name] = zero if part is None else self._term_loss(term, part)
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
        if self.teacher_weighting != "fixed" or any(LOSSES[term.loss].reads in whole for term in terms):
            return None
        parts = {name for term in terms for name in term.teacher_maps}
        if any(LOSSES[term.loss].reads_scores for term in terms):
            if any("region" in term.parameters for term in terms):
                return None
            strides = cast(Detector, self.teachers[teacher]).strides
            parts |= {"class_logits", "objectness_logits", *head_levels(strides)}
        return frozenset(parts)

    def _term_loss(self, term: TermConfig, batch: BatchOutputs) -> Tensor:
        """The sum over the term's pairs, unweighted. Losses are computed in float32, under autocast too."""
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
        cross_entropies = [
            teacher_cross_entropy(self.teachers[name], t_outputs[name], targets, s_output.image_size, classes=classes)
            for name, classes in self.teacher_classes.items()
        ]
        return dict(zip(self.teacher_classes, confidence_weights(torch.stack(cross_entropies))))

    def _check_weighting(
        self, class_names: tuple[str, ...], facts: dict[str, TeacherFacts], joined: dict[str, ClassColumns | None]
    ) -> None:
        """UserError unless weights by confidence have at least two teachers to compare, all of which classify boxes."""
        if self.teacher_weighting == "fixed":
            return
        if len(self.teachers) < 2:
            raise UserError(f"key 'teacher_weighting': confidence compares teachers, found {len(self.teachers)}")
        for name, teacher in self.teachers.items():
            if not hasattr(teacher, "class_logits_at"):
                raise UserError(f"key 'teacher_weighting': teacher {name!r} cannot classify given boxes")
            if name not in joined:
                joined[name] = common_classes("key 'teacher_weighting'", name, class_names, facts[name])
            self.teacher_classes[name] = joined[name]

    @torch.no_grad()
    def _try_term(self, term: TermConfig, key: str, s_probe: Any, t_probe: Any) -> None:
        """Compute a term for the probe images and for random outputs: UserError where it fails, or is always 0.

        With random outputs, a term about boxes compares the classes of the objects, since noise has few detections, and
        half the locations learn an object: a loss that is 0 then is 0 for any outputs.
        """
        targets = self._probe_targets(term, s_probe)
        generator = torch.Generator().manual_seed(0)
        anywhere = {"boxes": "targets"} if "boxes" in LOSSES[term.loss].parameters() else {}
        at_targets = dataclasses.replace(term, parameters={**term.parameters, **anywhere})
        values = []
        try:
            with self._trying():
                self._term_loss(term, BatchOutputs(s_probe, {term.teacher: t_probe}, targets))
                for _ in range(2):
                    s, t = random_output(s_probe, generator), random_output(t_probe, generator)
                    batch = BatchOutputs(s, {term.teacher: t}, targets)
                    if hasattr(self.student, "positives"):
                        batch.shared[term.teacher] = {"positives": random_positives(s, targets, generator)}
                    values.append(self._term_loss(at_targets, batch).item())
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}: {error}") from None
        if max(values) <= NO_LOSS:
            raise UserError(
                f"{key}: loss {term.loss!r} is 0 whatever student and teacher predict, it could never act: expected "
                "more than one class or pixel to compare, and a weight above 0 for some part of the loss"
            )

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Student and criterion in eval mode. The weights of later terms do not depend on draws in here."""
        was_training = self.student.training
        self.to(self._device).eval()
        self.student.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            self.train()
            self.student.train(was_training)

    @torch.no_grad()
    def _reads_objects(self, term: TermConfig, s_probe: Any, t_probe: Any) -> bool:
        """Whether the loss of random outputs depends on the objects of the images."""
        generator = torch.Generator().manual_seed(0)
        s, t = random_output(s_probe, generator), random_output(t_probe, generator)
        values = []
        with self._trying():
            for targets in (self._probe_targets(term, s_probe), Targets.empty(self._device)):
                torch.manual_seed(0)  # a loss that draws draws the same
                values.append(self._term_loss(term, BatchOutputs(s, {term.teacher: t}, targets)).item())
        return values[0] != values[1]

    def _probe_targets(self, term: TermConfig, s_probe: Any) -> Targets:
        """Objects of a class that both models have."""
        classes = self.classes[term_name(term)]
        return probe_targets(s_probe.image_size, self._device, label=0 if classes is None else int(classes[0][0]))

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device


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
    """s_map, t_map and content of TermInputs for one pair; none of them for a term that compares no maps."""
    entry = LOSSES[term.loss]
    if entry.reads not in ("map", "image"):
        return {}
    s_map = named_map(batch.s_output, s_name)
    content = batch.content if term.content_only else None
    if content is not None:
        content = content_at(content, s_map)
    s_map = only_at(content, s_map)
    with in_precision_of(s_map):
        s_map = only_at(content, adapter(s_map))
    if entry.reads == "image":
        return {"s_map": s_map, "content": content}
    t_map = named_map(batch.t_outputs[term.teacher], t_name).detach()
    t_map = only_at(content, resize_like(t_map, s_map))
    if not entry.finishes_maps:
        t_map = only_at(content, like_adapted(adapter, t_map))
    return {"s_map": s_map, "t_map": t_map, "content": content}


def compares_classes(term: TermConfig) -> bool:
    """Whether the term needs the classes that both models have."""
    entry = LOSSES[term.loss]
    return entry.reads_scores or entry.reads not in ("map", "layers")


def common_classes(key: str, teacher: str, class_names: tuple[str, ...], facts: TeacherFacts) -> ClassColumns | None:
    """Columns of the classes that student and teacher share; None where the lists are equal or not given.

    Prints one line where the lists differ: the classes that the teacher names otherwise, and those that it lacks.
    """
    t_names = facts.class_names or class_names
    if t_names == tuple(class_names) and not facts.aliases:
        return None
    try:
        s_columns, t_columns = join_classes(class_names, t_names, aliases=facts.aliases)
    except ValueError as error:
        raise UserError(f"{key}: teacher {teacher!r}: {error}") from None
    pairs = [(class_names[s], t_names[t]) for s, t in zip(s_columns.tolist(), t_columns.tolist())]
    renamed = [f"{s_name} is its {t_name}" for s_name, t_name in pairs if s_name != t_name]
    shared = {s_name for s_name, _ in pairs}
    missing = [name for name in class_names if name not in shared]
    if renamed or missing:
        line = f"teacher {teacher!r} has {len(pairs)} of {len(class_names)} classes"
        line += f", not {', '.join(missing)}" if missing else ""
        print(line + (f"; {', '.join(renamed)}" if renamed else ""))
    is_equal = len(pairs) == len(t_names) == len(class_names) and torch.equal(s_columns, t_columns)
    return None if is_equal else (s_columns, t_columns)


def build_adapters(
    term: TermConfig, key: str, s_probe: Any, t_probe: Any, classes: ClassColumns | None
) -> nn.ModuleList:
    """One adapter per pair of maps; UserError where the pair cannot be joined."""
    entry = LOSSES[term.loss]
    if entry.reads != "map" and term.adapter != "none":
        raise UserError(f"{key}: loss {term.loss!r} compares {entry.reads}, not maps: expected adapter none")
    pairs = zip(term.student_maps, term.teacher_maps)
    if entry.reads in FIXED_MAPS:
        return nn.ModuleList(nn.Identity() for _ in pairs)
    return nn.ModuleList(adapter_of_pair(term, key, s_probe, t_probe, *pair, classes) for pair in pairs)


def adapter_of_pair(
    term: TermConfig, key: str, s_probe: Any, t_probe: Any, s_name: str, t_name: str, classes: ClassColumns | None
) -> nn.Module:
    """The adapter between two maps; Identity between logits, image logits, and maps that need none."""
    entry = LOSSES[term.loss]
    try:
        s, t = named_map(s_probe, s_name), named_map(t_probe, t_name)
    except KeyError as error:
        raise UserError(f"{key}: map {error.args[0]}") from None
    shapes = f"{s_name} {tuple(s.shape)} of the student and {t_name} {tuple(t.shape)} of the teacher"
    if entry.reads == "logits":
        has_common_columns = classes is not None and s_name == t_name == "class_logits" and s.shape[:2] == t.shape[:2]
        if s.shape != t.shape and not has_common_columns:
            raise UserError(f"{key}: logits {shapes} must have equal shapes")
        return nn.Identity()
    if s.dim() != 4 or t.dim() != (2 if entry.reads == "image" else 4):
        raise UserError(f"{key}: {shapes} are not maps (B, C, H, W)")
    if entry.reads == "image" or (term.adapter == "none" and not entry.same_width):
        return nn.Identity()
    try:
        adapter = build_adapter(term.adapter, s.shape[1], t.shape[1])
    except ValueError as error:
        raise UserError(f"{key}: {s_name} and {t_name}: {error}") from None
    if normalises(adapter) and entry.finishes_maps and not term.parameters.get("rescale", True):
        raise UserError(f"{key}: the teacher's layers cannot take a normalised map: expected rescale: true")
    return adapter


def build_losses(term: TermConfig, key: str, s_probe: Any, t_probe: Any, classes: ClassColumns | None) -> nn.ModuleList:
    """The module of each pair, built with the widths of its maps, or Identity for a loss that trains nothing."""
    entry = LOSSES[term.loss]
    losses = nn.ModuleList()
    for s_name, t_name in zip(term.student_maps, term.teacher_maps):
        widths: tuple[int, ...] = ()
        if entry.reads == "map":
            widths = (named_map(t_probe, t_name).shape[1],)
        elif entry.reads == "image":
            num_classes = named_map(t_probe, t_name).shape[1] if classes is None else len(classes[0])
            widths = (named_map(s_probe, s_name).shape[1], num_classes)
        try:
            losses.append(entry.module(*widths, **term.parameters) if entry.module else nn.Identity())
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}.parameters: {error}") from None
    return losses
