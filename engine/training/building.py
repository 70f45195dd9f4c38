"""Builds the parts of a run from its config: data splits, student, teachers, criterion, optimizer, EMA."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import models
from config import AugmentConfig, Config, DataConfig
from datasets.augment import augment, augment_content
from datasets.index import DatasetIndex
from datasets.loader import Batch, Loader
from datasets.open import open_dataset, require_objects
from datasets.overlap import Overlap, find_overlap
from datasets.scan import ScanReport, check, scan
from distill.criterion import Criterion
from engine.runtime.processes import Processes, use_bfloat16
from engine.training.batch_norms import check_batches
from engine.training.checks import check_config, check_data
from engine.training.optimization import Ema, apply_schedule, build_optimizer
from engine.training.state import fingerprint
from engine.training.student import build_student
from engine.training.teaching import Teachers, build_teachers
from errors import UserError
from random_streams import Stream, seeded_generator
from structures import DenseDetector, Targets

DECODE_AT_MOST = 20_000  # a split of more pictures is not decoded before training: only the headers are read


class Learner(nn.Module):
    """Everything that learns, as one module, so that DistributedDataParallel averages all its gradients.

    forward(compute) is compute(): the training step writes down what it computes with the parts.
    """

    def __init__(self, student: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.student, self.criterion = student, criterion

    def forward(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return compute()


@dataclass(frozen=True)
class Splits:
    """The pictures of a run. `holdout`: a part of the training pictures that is never trained on, or None."""

    names: tuple[str, ...]
    train: DatasetIndex
    holdout: DatasetIndex | None
    test: DatasetIndex
    reports: dict[str, ScanReport]
    overlaps: tuple[Overlap, ...] = ()  # pictures that the test split and the held-out part share with those trained on


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
    optimizer: torch.optim.Optimizer
    ema: Ema
    bfloat16: bool
    data: str  # engine.training.state.fingerprint of the training pictures
    evaluation_loaders: dict[int, Loader] = field(default_factory=dict)


def augment_batch(setup: TrainingSetup, batch: Batch, epoch: int, number: int) -> tuple[Tensor, Targets]:
    """Batch `number` of an epoch on the device, augmented: a pure function of (seed, epoch, number, rank)."""
    generator = seeded_generator(Stream.AUGMENTATION, setup.config.seed, epoch, number, setup.processes.rank)
    settings = augmentation_at(setup.config, epoch)
    # Augmentation drops objects, so the targets stay on the host until their number is known.
    images = batch.images.to(setup.processes.device, non_blocking=True)
    images, targets = augment(
        images, batch.targets, generator=generator, settings=settings, content_xyxy=batch.content_xyxy
    )
    if setup.config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, targets.to(setup.processes.device)


def content_of_batch(setup: TrainingSetup, batch: Batch, epoch: int, number: int) -> Tensor | None:
    """(B, 1, H, W) bool, False in the padding of augment_batch's images; None where no term leaves padding out."""
    if not setup.criterion.leaves_padding_out:
        return None
    return augment_content(
        batch.content_xyxy.to(setup.processes.device),
        image_size=setup.config.image_size,
        generator=seeded_generator(Stream.AUGMENTATION, setup.config.seed, epoch, number, setup.processes.rank),
        settings=augmentation_at(setup.config, epoch),
    )


def set_learning_rates(setup: TrainingSetup, step: int) -> float:
    """Set the optimizer's rates for a step of the run; returns the scheduled learning rate."""
    settings = setup.config.optimizer
    return apply_schedule(
        setup.optimizer,
        step,
        total_steps=setup.config.epochs * setup.steps_per_epoch,
        warmup_steps=round(settings.warmup_epochs * setup.steps_per_epoch),
        learning_rate=settings.learning_rate,
        final_fraction=settings.final_fraction,
        schedule=settings.schedule,
        momentum=settings.momentum,
        warmup_momentum=settings.warmup_momentum,
        warmup_bias_learning_rate=settings.warmup_bias_learning_rate,
    )


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
    return (
        f"{setup.config.student.arch} ({count_parameters(setup.student):,} parameters){teachers}, "
        f"{len(setup.splits.train)} pictures, {setup.config.epochs} epochs of {setup.steps_per_epoch} steps, "
        f"{facts['device']}, {facts['precision']}, {facts['processes']} x {facts['threads']} threads"
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
) -> TrainingSetup:
    """The parts of a run. Finds every reason not to start it, before anything is written.

    given: teachers by name, instead of their weights. say: prints a line.
    saved: the student's state in the checkpoint of a resumed run.
    """
    config = with_published_settings(config)
    check_config(config, given or {}, processes.count, is_resumed=saved is not None)
    indexes = open_indexes(config)
    names = indexes["train"].names
    student = place(build_student(config, names, saved, say, given), config, processes.device)
    total = len(indexes["train"])
    check_batches(config, total - round(config.data.holdout_fraction * total), student, processes.count)
    settings = config.optimizer
    ema = Ema(student, decay=settings.ema_decay, ramp_steps=settings.ema_ramp_steps)
    teachers = build_teachers(config, names, given, ema.model)
    for teacher in teachers.models.values():
        place(teacher, config, processes.device)
    torch.manual_seed(config.seed)  # again, so that the adapters do not depend on earlier draws
    criterion = build_criterion(config, names, student, teachers).to(processes.device)
    for name, teacher in teachers.models.items():
        if teacher is not ema.model:  # evaluation needs all outputs of that one
            cast(DenseDetector, teacher).requested_outputs = criterion.requested_outputs(name)
    splits = scan_splits(config, indexes, say)  # decodes pictures, so it comes after all cheaper checks
    check_batches(config, len(splits.train), student, processes.count)  # again, without those that did not decode
    data = fingerprint(splits.train)
    processes.check_same("set of training pictures", data)
    loader = Loader(
        splits.train,
        image_size=config.image_size,
        batch_size=config.batch_size // processes.count,
        seed=config.seed,
        workers=config.data.workers,
        cache=config.data.cache,
        rank=processes.rank,
        world_size=processes.count,
        pictures_per_epoch=config.data.pictures_per_epoch,
    )
    optimizer = build_optimizer(
        (student, criterion),
        name=settings.name,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    if config.compile:
        for module in (student, *(model for model in teachers.models.values() if model is not ema.model)):
            module.compile()
    bfloat16 = teachers.bfloat16 = use_bfloat16(config.precision, processes.device)
    if config.teacher_cache_gigabytes:
        teachers.keep_outputs(Path(config.runs) / "teacher_outputs", config.teacher_cache_gigabytes)
    # While a term is off, its adapter gets no gradients.
    find_unused = any(term.warmup_epochs > 0 or term.stop_epoch is not None for term in config.terms)
    learner = processes.wrap(Learner(student, criterion), find_unused=find_unused)
    return TrainingSetup(
        config,
        processes,
        splits,
        loader,
        len(loader),
        math.ceil(len(loader) / settings.accumulate),
        student,
        teachers,
        criterion,
        learner,
        optimizer,
        ema,
        bfloat16,
        data,
    )


def place(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The module on the device, in the memory format of the config."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return module.to(device, memory_format=memory_format)  # type: ignore[call-overload]  # absent from PyTorch's stubs


def open_splits(config: Config, say: Callable[[str], None] = print) -> Splits:
    """Read and check the dataset: open_indexes, then scan_splits."""
    return scan_splits(config, open_indexes(config), say)


def open_indexes(config: Config) -> dict[str, DatasetIndex]:
    """The splits as their labels list them: "whole", "train" (at most data.max_samples of the whole), and "test".

    The choice depends on the dataset and its keys alone, not on the seed: runs of several seeds train on the same
    pictures. No picture is decoded.
    """
    data = config.data
    check_data(data)
    whole = open_dataset(*training_set(data), classes=data.classes)
    train = take(whole, data.max_samples) if 0 < data.max_samples < len(whole) else whole
    test = open_dataset(data.format, data.root, data.test, classes=data.classes)
    if train.names != test.names:
        root = data.train_root or data.root
        found = f"{root}: the classes of {data.train!r} are {', '.join(train.names)}"
        raise UserError(f"{found}; expected those of {data.test!r} in {data.root}: {', '.join(test.names)}")
    return {"whole": whole, "train": train, "test": test}


def scan_splits(config: Config, indexes: dict[str, DatasetIndex], say: Callable[[str], None] = print) -> Splits:
    """Check the pictures, report those that two splits share, and hold out a part, the same for every seed."""
    data = config.data
    overlap = find_overlap(indexes["test"], indexes["whole"], ("test", "train"))
    refuse_overlap(overlap, data)
    reports: dict[str, ScanReport] = {}
    overlaps: list[Overlap] = []
    for role, place in (("train", training_set(data)), ("test", (data.format, data.root, data.test))):
        index = indexes[role]
        report = scan(index, decode=len(index) <= DECODE_AT_MOST, title=" ".join(place))
        if role == "test":
            overlaps.append(overlap.within(reports["train"].index))
            report = dataclasses.replace(report, notes=(str(overlaps[0]),))
        reports[role] = report
        say(report.table() + "\n")
        check(report, data.max_bad_fraction)
        with_difficult = role == "test" and config.evaluation.counts_difficult
        require_objects(report.index, report.title, place[1], with_difficult=with_difficult)
    train, test = reports["train"].index, reports["test"].index
    fraction = data.holdout_fraction
    if fraction == 0:
        return Splits(train.names, train, None, test, reports, tuple(overlaps))
    held = round(fraction * len(train))
    if not 0 < held < len(train):
        raise UserError(f"key 'data.holdout_fraction': {fraction} of {len(train)} pictures is {held}, expected some")
    order = np.random.default_rng(0).permutation(len(train))
    kept, held_out = np.sort(order[held:]).tolist(), np.sort(order[:held]).tolist()
    train, holdout = train.subset(kept), train.subset(held_out)
    overlaps.append(find_overlap(holdout, train, ("the held-out part", "train")))
    if overlaps[-1].shared:
        say(f"{overlaps[-1]}\n")
    return Splits(train.names, train, holdout, test, reports, tuple(overlaps))


def refuse_overlap(overlap: Overlap, data: DataConfig) -> None:
    """UserError where every test picture is one of the training split, unless the config allows it."""
    if overlap.is_whole and not data.allow_overlap:
        raise UserError(
            f"data.test {data.test!r} has no picture of its own: {overlap}; expected others, which `python -m "
            f"datasets.split` makes of one split, or data.allow_overlap=true to measure what is remembered"
        )


def training_set(data: DataConfig) -> tuple[str, str, str]:
    """Format, root and split of the training pictures."""
    return data.train_format or data.format, data.train_root or data.root, data.train


def count_training_pictures(data: DataConfig) -> int:
    """The number of pictures that a run trains on, without decoding them."""
    count = len(open_dataset(*training_set(data), classes=data.classes))
    count = min(count, data.max_samples) if data.max_samples > 0 else count
    return count - round(data.holdout_fraction * count)


def take(index: DatasetIndex, count: int) -> DatasetIndex:
    """`count` pictures of an index in its order, with their faults. The choice is random, but always the same."""
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:count]).tolist()
    taken = index.subset(rows)
    theirs = {"", *(sample.image_path.name for sample in taken.samples)}  # "": a fault of a whole file
    return dataclasses.replace(taken, faults=tuple(fault for fault in index.faults if fault.picture in theirs))


def build_criterion(config: Config, names: tuple[str, ...], student: nn.Module, teachers: Teachers) -> Criterion:
    """The criterion of a config's terms between these models. names: the dataset's classes."""
    return Criterion(
        config.terms,
        student=student,
        teachers=teachers.models,
        epochs=config.epochs,
        image_size=config.image_size,
        class_names=names,
        facts=teachers.facts,
        teacher_weighting=config.teacher_weighting,
    )


def augmentation_at(config: Config, epoch: int) -> AugmentConfig:
    """The augmentation of an epoch: the last ones have neither mosaic nor mixup, so that images are whole again."""
    if epoch >= config.epochs - config.augment.close_mosaic_epochs:
        return dataclasses.replace(config.augment, mosaic=0.0, mixup=0.0)
    return config.augment


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
