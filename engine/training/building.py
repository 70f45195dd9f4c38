"""Builds the parts of a run from its config: data splits, student, teachers, criterion, optimizer, EMA."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import models
from config import Config
from datasets.index import DatasetIndex
from datasets.loader import Loader
from distill.criterion import Criterion
from engine.runtime.claims import Claim
from engine.runtime.processes import Processes, use_bfloat16
from engine.training.batch_norms import check_batches
from engine.training.checks import check_config
from engine.training.inputs import Inputs, inputs_of
from engine.training.int8 import start_ranges, student_bfloat16
from engine.training.optimization import Ema, build_optimizer
from engine.training.optimizers import Optimizer
from engine.training.pseudo_boxes import open_pseudo_teacher
from engine.training.splits import (
    Splits,
    count_pictures,
    keep_indexes,
    kept_sets,
    open_indexes,
    scan_splits,
    with_unlabelled,
)
from engine.training.state import fingerprint
from engine.training.student import build_student
from engine.training.teaching import Teachers, build_teachers
from errors import counted
from structures import DenseDetector


class Learner(nn.Module):
    """Everything that learns, as one module, so that DistributedDataParallel averages all its gradients.

    forward(compute) is compute(): the training step writes down what it computes with the parts.
    """

    def __init__(self, student: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.student, self.criterion = student, criterion

    def forward(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return compute()


@dataclass
class TrainingSetup:
    """Everything that the training loop works with."""

    config: Config
    processes: Processes
    splits: Splits
    loader: Loader
    batches_per_epoch: int
    steps_per_epoch: int
    student: nn.Module
    teachers: Teachers
    criterion: Criterion
    learner: nn.Module  # Learner, under DistributedDataParallel where there are several processes
    optimizer: Optimizer
    ema: Ema
    bfloat16: bool
    data: str  # engine.training.state.fingerprint of the training pictures
    inputs: Inputs  # what it reads by name
    evaluation_loaders: dict[int, Loader] = field(default_factory=dict)
    claim: Claim | None = None  # on the run's folder, in the first process of a run that writes one

    @property
    def warmup_steps(self) -> int:
        return round(self.config.optimizer.warmup_epochs * self.steps_per_epoch)

    def check_claim(self) -> None:
        """UserError if another process has taken the run over; call it before writing to its folder."""
        if self.claim is not None:
            self.claim.check()


def evaluation_loader(setup: TrainingSetup, index: DatasetIndex) -> Loader:
    """A loader of a split in its order; built once, so that its cached pictures stay."""
    if id(index) not in setup.evaluation_loaders:
        setup.evaluation_loaders[id(index)] = Loader(
            index,
            image_size=setup.config.image_size,
            batch_size=setup.config.evaluation.batch_size,
            seed=0,
            workers=setup.config.data.workers,
            shuffle=False,
            cache=setup.config.data.cache and setup.config.evaluation.every_epochs > 0,
            rank=setup.processes.rank,
            world_size=setup.processes.count,
        )
    return setup.evaluation_loaders[id(index)]


def machine_facts(setup: TrainingSetup) -> dict[str, Any]:
    """The facts, besides the config, that the bytes of a run depend on."""
    device = setup.processes.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": "bfloat16" if setup.bfloat16 else "float32",
        "processes": setup.processes.count,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def describe_setup(setup: TrainingSetup) -> str:
    """One line: the models, the pictures, the steps and the machine."""
    facts = machine_facts(setup)
    teachers = "".join(f", teacher {name} ({count_parameters(t):,})" for name, t in setup.teachers.models.items())
    epochs = f"{counted(setup.config.epochs, 'epoch')} of {counted(setup.steps_per_epoch, 'step')}"
    return (
        f"{setup.config.student.arch} ({count_parameters(setup.student):,} parameters){teachers}, "
        f"{setup.splits.describe()}, {epochs}, "
        f"{facts['device']}, {facts['precision']}, {facts['processes']} x {counted(facts['threads'], 'thread')}"
    )


def with_published_settings(config: Config) -> Config:
    """The config with its missing thresholds of evaluation filled in: the published ones of the student's family."""
    evaluation = config.evaluation.completed(models.published_detection(config.student.arch))
    return dataclasses.replace(config, evaluation=evaluation)


def build(
    config: Config,
    processes: Processes,
    given: dict[str, nn.Module] | None,
    say: Callable[[str], None],
    saved: dict[str, Tensor] | None = None,
    *,
    keep: bool = True,
) -> TrainingSetup:
    """The parts of a run. Finds every reason not to start it, before anything is written.

    given: teachers by name, instead of their weights. say: prints a line.
    saved: the student's state in the checkpoint of a resumed run.
    keep: whether pseudo boxes that are made here, opened sets and outputs of teachers are kept for other runs.
    """
    config, given = with_published_settings(config), given or {}
    device, settings = processes.device, config.optimizer
    check_config(config, given, processes.count, is_resumed=saved is not None)
    kept = kept_sets(config)
    indexes = open_indexes(config, kept)
    class_names = indexes["train"].names

    student = place(build_student(config, class_names, saved, say, given), config, device)
    check_batches(config, count_pictures(indexes, config.data), student, processes.count)
    ema = Ema(student, decay=settings.ema_decay, ramp_steps=settings.ema_ramp_steps)
    teachers = build_teachers(config, class_names, given, ema.model)
    pseudo_teacher = open_pseudo_teacher(config, class_names, given, say)
    for teacher in teachers.models.values():
        place(teacher, config, device)
    torch.manual_seed(config.seed)  # again, so that the adapters do not depend on earlier draws
    criterion = build_criterion(config, class_names, student, teachers).to(device)
    for name, teacher in teachers.unchanging.items():  # evaluation needs all outputs of the student's average
        cast(DenseDetector, teacher).requested_outputs = criterion.requested_outputs(name)

    splits = scan_splits(config, indexes, say)  # decodes pictures, so it comes after all cheaper checks
    if keep and processes.is_first:
        keep_indexes(kept)
    splits = with_unlabelled(config, splits, pseudo_teacher, processes, say, keep=keep)
    check_batches(config, len(splits.train), student, processes.count)  # again, without those that did not decode
    data = fingerprint(splits.train)
    processes.check_same("set of training pictures", data)
    loader = training_loader(config, splits.train, processes)

    optimizer = build_optimizer((student, criterion), settings)
    if config.compile:
        for module in (student, *teachers.unchanging.values()):
            module.compile()
    teachers.bfloat16 = use_bfloat16(config.precision, device)
    if config.student.int8 is not None and saved is None:
        start_ranges(student, ema.model, splits.train, config, device)
    if config.teacher_cache_gigabytes:
        room = config.teacher_cache_gigabytes if keep else 1e-9  # a byte: outputs are read, none is written
        teachers.keep_outputs(Path(config.runs) / "teacher_outputs", room)
    learner = processes.wrap(Learner(student, criterion), find_unused=may_have_unused_parameters(config))
    return TrainingSetup(
        config=config,
        processes=processes,
        splits=splits,
        loader=loader,
        batches_per_epoch=len(loader),
        steps_per_epoch=math.ceil(len(loader) / settings.accumulate),
        student=student,
        teachers=teachers,
        criterion=criterion,
        learner=learner,
        optimizer=optimizer,
        ema=ema,
        bfloat16=student_bfloat16(config, device),
        data=data,
        inputs=inputs_of(config, indexes, is_resumed=saved is not None),
    )


def may_have_unused_parameters(config: Config) -> bool:
    """Whether a step may give some parameters no gradient: the adapter of a term that is off, or the student's head."""
    is_off_at_times = any(term.warmup_epochs > 0 or term.stop_epoch is not None for term in config.terms)
    return is_off_at_times or config.detection_weight == 0


def training_loader(config: Config, index: DatasetIndex, processes: Processes) -> Loader:
    """The batches of this process."""
    return Loader(
        index,
        image_size=config.image_size,
        batch_size=config.batch_size // processes.count,
        seed=config.seed_of_views,
        workers=config.data.workers,
        cache=config.data.cache,
        rank=processes.rank,
        world_size=processes.count,
        pictures_per_epoch=config.data.pictures_per_epoch,
        labelled_share=None if config.data.unlabelled is None else config.data.unlabelled.labelled_share,
    )


def place(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The module on the device, in the memory format of the config."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return module.to(device, memory_format=memory_format)  # type: ignore[call-overload]  # absent from PyTorch's stubs


def build_criterion(config: Config, class_names: tuple[str, ...], student: nn.Module, teachers: Teachers) -> Criterion:
    """The criterion of a config's terms between these models. class_names: the dataset's classes."""
    return Criterion(
        config.terms,
        student=student,
        teachers=teachers.models,
        epochs=config.epochs,
        image_size=config.image_size,
        class_names=class_names,
        facts=teachers.facts,
        teacher_weighting=config.teacher_weighting,
        unlabelled_has_boxes=config.data.unlabelled is None or config.pseudo_boxes is not None,
    )


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
