"""Checks of a config and of the weights that it names: all mistakes that can be found before any picture is listed.

A run that would end in an error after minutes of decoding ends in the same error at once.
"""

import functools
import math
import operator
from collections.abc import Callable, Collection
from pathlib import Path

import checkpoint
import models
from config import (
    RANDOM,
    STUDENT,
    Config,
    DataConfig,
    GradientShare,
    PseudoBoxConfig,
    UnlabelledConfig,
    check_image_size,
)
from datasets.download import how_to_fetch
from distill.checks import check_terms
from distill.terms import LOSSES
from engine.runtime.run_folder import check_name
from engine.training.int8 import check_int8
from engine.training.student import (
    backbone_of,
    check_backbone,
    check_inherit,
    check_widths,
    find_backbone_file,
    inherit_source,
)
from engine.training.teaching import EMA, check_input_size, check_names, find_file
from errors import UserError, expect, naming
from frcnn.pretrained import load_backbone
from teachers.clip_tokenizer import VOCABULARY_PATH, ClipTokenizer
from weights import file_of_run, load_public

# What is expected of a number: (in words, as a test, of these keys). Null is allowed where the key's type allows it.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        "epochs optimizer.accumulate evaluation.batch_size evaluation.max_detections",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "patience save_every_steps seed view_seed detection_weight teacher_cache_gigabytes augment.close_mosaic_epochs "
        "evaluation.every_epochs optimizer.weight_decay optimizer.warmup_epochs optimizer.warmup_bias_learning_rate "
        "optimizer.clip_norm optimizer.ema_ramp_steps",
    ),
    ("a number above 0", lambda value: value > 0, "optimizer.learning_rate optimizer.backbone_factor"),
    (
        "a number of 0 up to less than 1",
        lambda value: 0 <= value < 1,
        "optimizer.momentum optimizer.warmup_momentum optimizer.ema_decay",
    ),
    (
        "a number in 0..1",
        lambda value: 0 <= value <= 1,
        "optimizer.final_fraction evaluation.score_threshold evaluation.iou_threshold",
    ),
)


def check_config(
    config: Config, without_weights: Collection[str] = (), processes: int = 1, *, is_resumed: bool = False
) -> None:
    """UserError, with the key, for a config that cannot be trained. Opens no dataset.

    without_weights: names of teachers that need none: their modules are given, or they are trained first.
    is_resumed: the student goes on from a checkpoint, so the file that it started from may be gone.
    """
    if not is_resumed:
        check_name(config.name)
    check_numbers(config, processes)
    check_data(config.data)
    check_student(config, without_weights, is_resumed=is_resumed)
    check_names(config, without_weights)
    check_terms(config.terms, tuple(teacher.name for teacher in config.teachers))
    check_kept_outputs(config)
    check_use_of_unlabelled(config)
    check_mixture(config, processes)
    check_teachers(config, without_weights)


def check_numbers(config: Config, processes: int) -> None:
    """Check the range of every number that needs neither data nor models."""
    if config.batch_size < 1 or config.batch_size % processes:
        expected = f"a multiple of {processes} processes" if processes > 1 else "at least 1"
        raise UserError(f"key 'batch_size': found {config.batch_size}, expected {expected}")
    taught_by_itself = all(term.teacher == STUDENT for term in config.terms)
    if not config.detection_weight >= 0 or (config.detection_weight == 0 and taught_by_itself):
        raise UserError(f"key 'detection_weight': found {config.detection_weight}, expected a number above 0")
    for index, term in enumerate(config.terms):
        if isinstance(term.weight, GradientShare) and config.detection_weight == 0:
            found = f"key 'terms.{index}.weight.share': a share of the detection loss's gradient, whose weight is 0"
            raise UserError(f"{found}; expected a number as weight, or detection_weight above 0")
    check_image_size("key 'image_size'", config.image_size)
    if config.patience and not config.data.holdout_fraction:
        raise UserError("key 'patience': needs held-out pictures to judge by, expected data.holdout_fraction above 0")
    for expected, holds, keys in RANGES:
        for key in keys.split():
            value = operator.attrgetter(key)(config)
            expect(value is None or (math.isfinite(value) and holds(value)), f"key {key!r}", value, expected)
    for index, teacher in enumerate(config.teachers):
        is_met = teacher.epochs is None or teacher.epochs >= 1
        expect(is_met, f"key 'teachers.{index}.epochs'", teacher.epochs, "at least 1")
    models.check_suppression("key 'evaluation.iou_threshold'", config.student.arch, config.evaluation.iou_threshold)


def check_data(data: DataConfig) -> None:
    """The keys that choose the pictures to train on."""
    is_met = data.train_format is None or data.train_root is not None
    expect(is_met, "key 'data.train_format'", f"{data.train_format} without data.train_root", "both")
    expect(data.max_samples >= -1, "key 'data.max_samples'", data.max_samples, "a number, or -1 for all")
    if data.train is None and (data.unlabelled is None or data.train_root or data.per_class or data.max_samples > 0):
        raise UserError("key 'data.train': found null, expected a split; or data.unlabelled, and no other training key")
    if data.train is None and data.holdout_fraction:
        raise UserError("key 'data.holdout_fraction': there are no labelled pictures (data.train is null), expected 0")
    is_met = data.per_class == 0 or (data.per_class > 0 and data.max_samples <= 0)
    expected = "a number of pictures without data.max_samples, or 0 for all"
    expect(is_met, "key 'data.per_class'", data.per_class, expected)
    is_met = data.draw_seed is None or (data.draw_seed >= 0 and data.per_class > 0)
    expect(is_met, "key 'data.draw_seed'", data.draw_seed, "0 or more beside data.per_class")
    if data.unlabelled is not None:
        check_unlabelled(data.unlabelled, has_labelled=data.train is not None)
    pictures, holdout, bad = data.pictures_per_epoch, data.holdout_fraction, data.max_bad_fraction
    expect(pictures >= 0, "key 'data.pictures_per_epoch'", pictures, "a number, or 0 for one pass over the set")
    expect(0 <= holdout < 1, "key 'data.holdout_fraction'", holdout, "0 up to less than 1")
    expect(0 <= bad <= 1, "key 'data.max_bad_fraction'", bad, "a number in 0..1")
    expect(data.workers >= 0, "key 'data.workers'", data.workers, "a number, or 0 for none")


def check_unlabelled(settings: UnlabelledConfig, *, has_labelled: bool) -> None:
    """The keys of the pictures without labels, and of their pseudo boxes."""
    key = "data.unlabelled"
    pseudo = settings.pseudo
    needs_labelled = {"rest": settings.rest, "labelled_share": settings.labelled_share is not None}
    needs_labelled["pseudo.boxes_per_object"] = pseudo is not None and pseudo.boxes_per_object is not None
    for name, is_given in needs_labelled.items():
        if is_given and not has_labelled:
            raise UserError(f"key '{key}.{name}': there are no labelled pictures (data.train is null), expected none")
    if not settings.rest and settings.split is None and settings.root is None:
        raise UserError(f"key '{key}': found no pictures, expected rest: true, a split, or the root of a folder")
    is_met = settings.format is None or settings.split is not None
    expect(is_met, f"key '{key}.format'", f"{settings.format} without a split", "both")
    share = settings.labelled_share
    expect(settings.max_samples >= 0, f"key '{key}.max_samples'", settings.max_samples, "a number, or 0 for all")
    expect(share is None or 0 < share < 1, f"key '{key}.labelled_share'", share, "a number between 0 and 1")
    if pseudo is not None:
        check_pseudo_boxes(pseudo, f"{key}.pseudo")


def check_pseudo_boxes(settings: PseudoBoxConfig, key: str) -> None:
    """Check the scores and counts that decide which of a teacher's detections become boxes."""
    of_classes = {f"class_thresholds.{name}": value for name, value in settings.class_thresholds.items()}
    for where, value in {"threshold": settings.threshold, **of_classes}.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        expect(is_number and 0 < value <= 1, f"key '{key}.{where}'", repr(value), "a score above 0 and at most 1")
    expect(0 < settings.ignore_above <= 1, f"key '{key}.ignore_above'", settings.ignore_above, "above 0 and at most 1")
    for name in ("boxes_per_object", "ignored_per_object"):
        value = getattr(settings, name)
        is_met = value is None or (math.isfinite(value) and value >= 0)
        expect(is_met, f"key '{key}.{name}'", value, "a number of 0 or more")
    is_met = settings.ignored_per_object is None or settings.boxes_per_object is not None
    expect(is_met, f"key '{key}.ignored_per_object'", "it alone", "boxes_per_object beside it")
    iou = settings.iou_threshold
    expect(iou is None or 0 < iou <= 1, f"key '{key}.iou_threshold'", iou, "above 0 and at most 1")
    if settings.image_size is not None:
        check_image_size(f"key '{key}.image_size'", settings.image_size)


def check_kept_outputs(config: Config) -> None:
    """UserError for a term that reads more of a teacher than the part of its output that is kept on disk."""
    for index, term in enumerate(config.terms):
        if config.teacher_cache_gigabytes and LOSSES[term.loss].compares == "queries":
            found = f"key 'teacher_cache_gigabytes': found {config.teacher_cache_gigabytes} beside terms.{index}"
            raise UserError(f"{found}, whose loss {term.loss!r} runs the teacher's decoder again, expected 0")


def check_use_of_unlabelled(config: Config) -> None:
    """UserError for pictures without labels from which nothing learns, and for terms on kinds that are not there."""
    if config.data.unlabelled is None:
        for index, term in enumerate(config.terms):
            if term.on != "all":
                raise UserError(f"key 'terms.{index}.on': found {term.on} without data.unlabelled, expected all")
        return
    pseudo = config.data.unlabelled.pseudo
    if pseudo is None:
        if config.data.train is None and config.detection_weight:
            found = f"key 'detection_weight': found {config.detection_weight} without labelled pictures"
            raise UserError(f"{found} (data.train is null), expected 0, or data.unlabelled.pseudo")
        if all(term.on == "labelled" for term in config.terms):
            raise UserError("key 'data.unlabelled': no term acts on these pictures, and they have no pseudo boxes")
        return
    if not config.detection_weight:
        raise UserError("key 'data.unlabelled.pseudo': nothing learns from boxes, expected detection_weight above 0")
    teacher = config.teacher_named(pseudo.teacher)
    if teacher.arch == EMA or teacher.arch in models.TEACHERS:
        found = f"key 'data.unlabelled.pseudo.teacher': {teacher.name!r} is {teacher.arch}"
        raise UserError(f"{found}, expected a detector that learns nothing during the run")
    models.check_suppression("key 'data.unlabelled.pseudo.iou_threshold'", teacher.arch, pseudo.iou_threshold)


def check_mixture(config: Config, processes: int) -> None:
    """UserError where batches could not mix labelled and unlabelled pictures as the losses need it.

    Several processes count their normalisers together, so each needs equally many labelled images in every batch.
    """
    settings, batch_size = config.data.unlabelled, config.batch_size
    if settings is None:
        return
    key, share = "key 'data.unlabelled.labelled_share'", settings.labelled_share
    labelled = round(batch_size * (share or 0))
    if share is not None and (abs(labelled - batch_size * share) > 1e-6 or not 0 < labelled < batch_size):
        found = f"{key}: found {share}, {batch_size * share:g} of {batch_size} images"
        raise UserError(f"{found}, expected a whole number of them, at least one of each kind")
    needs_equal = settings.pseudo is None or any(term.on != "all" for term in config.terms)
    has_equal = share is not None and labelled % processes == 0
    has_whole_batches = config.data.pictures_per_epoch > 0 and config.data.pictures_per_epoch % batch_size == 0
    if processes > 1 and needs_equal and not (has_equal and has_whole_batches):
        raise UserError(
            f"{key}: found {share}, expected a share that gives each of {processes} processes equally many labelled "
            f"images, and data.pictures_per_epoch a multiple of {batch_size}"
        )


def check_student(config: Config, without_weights: Collection[str] = (), *, is_resumed: bool = False) -> None:
    """The student's architecture, the files of its weights, and the frozen parts of its backbone."""
    settings = config.student
    with naming("key 'student.arch'"):
        models.check_arch(settings.arch)
    check_backbone(settings)
    check_inherit(config)
    check_int8(config)
    if is_resumed:
        return
    check_widths(settings)
    if settings.inherit is not None and settings.inherit.teacher not in without_weights:
        inherit_source(config)
    if settings.weights is not None:
        start = file_of_run(settings.weights)
        if not start.is_file():
            expected = "null, which starts fresh" if settings.weights == RANDOM else "weights or a run"
            found = "no checkpoint in this folder" if Path(settings.weights).is_dir() else "no such file"
            advice = how_to_fetch(start.name)
            raise UserError(f"key 'student.weights': {settings.weights}: {found}, expected {expected}{advice}")
        check_file("key 'student.weights'", settings.arch, str(start))
    elif settings.backbone_weights is not None:
        file = find_backbone_file(Path(settings.backbone_weights), settings.arch)
        check_file("key 'student.backbone_weights'", settings.arch, str(file), is_backbone=True)


def check_teachers(config: Config, without_weights: Collection[str]) -> None:
    """Each teacher's architecture, file, image size and vocabulary; those in `without_weights` have no file."""
    if config.teacher_weighting == "confidence" and len(config.teachers) < 2:
        raise UserError(f"key 'teacher_weighting': confidence compares teachers, found {len(config.teachers)}")
    for index, teacher in enumerate(config.teachers):
        key = f"teachers.{index}"
        if teacher.name in without_weights:
            continue
        if teacher.arch == EMA:
            if teacher.weights is not None:
                found = f"key '{key}.weights': found {teacher.weights!r}"
                raise UserError(f"{found}, the student's average has no file")
            continue
        if teacher.arch not in models.TEACHERS:
            try:
                models.check_arch(teacher.arch)
            except UserError as error:
                raise UserError(f"key '{key}.arch': {error}, {', '.join(models.TEACHERS)}, {EMA}") from None
        if teacher.is_random:
            continue
        multiple, reads_text = check_file(f"key '{key}.weights'", teacher.arch, find_file(teacher, key))
        check_input_size(teacher, key, multiple)
        if reads_text:
            ClipTokenizer(teacher.vocabulary or VOCABULARY_PATH)


def check_file(key: str, arch: str, path: str, *, is_backbone: bool = False) -> tuple[int, bool]:
    """UserError where a file holds no weights of this architecture. An unchanged file is read once.

    Returns two facts about its model: the number that its image size is a multiple of, and whether it reads text.
    """
    status = Path(path).stat()
    with naming(key):
        return _read_weights(arch, path, is_backbone, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _read_weights(arch: str, path: str, is_backbone: bool, *version: int) -> tuple[int, bool]:
    if is_backbone:
        model = models.build(arch, 1)
        load_backbone(backbone_of(model), Path(path))
    elif arch in models.TEACHERS:
        model = models.build_teacher(arch)
        load_public(model, path)
    else:
        model, _ = checkpoint.load_model(path, arch)
    return getattr(model, "size_multiple", 1), hasattr(model, "set_classes")
