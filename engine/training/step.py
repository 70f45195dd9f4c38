"""The parts of a training step around the forward passes: augmentation, the student's own losses, learning rates."""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from config import AugmentConfig, Config
from datasets.augment import augment, augment_content
from datasets.loader import Batch
from engine.training.building import TrainingSetup
from engine.training.optimization import apply_schedule
from engine.training.state import TrainingState
from random_streams import Stream, seeded_generator
from structures import Detector, Targets, select_images


def augment_batch(setup: TrainingSetup, batch: Batch, epoch: int, number: int) -> tuple[Tensor, Targets, Tensor | None]:
    """Batch `number` of an epoch on the device, augmented: a pure function of (seed, epoch, number, rank).

    The last value is (B, 1, H, W) bool, False in the padding of the images; None where no term leaves padding out.
    """
    config, device = setup.config, setup.processes.device
    settings = augmentation_at(config, epoch)
    stream = (Stream.AUGMENTATION, config.seed_of_views, epoch, number, setup.processes.rank)
    # Augmentation drops objects, so the targets stay on the host until their number is known.
    images, targets = augment(
        batch.images.to(device, non_blocking=True),
        batch.targets,
        generator=seeded_generator(*stream),
        settings=settings,
        content_xyxy=batch.content_xyxy,
        groups=batch.is_labelled,
    )
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    content = None
    if setup.criterion.leaves_padding_out:
        content = augment_content(
            batch.content_xyxy.to(device),
            image_size=config.image_size,
            generator=seeded_generator(*stream),  # the draws of the images, once more
            settings=settings,
            groups=batch.is_labelled,
        )
    return images, targets.to(device), content


def augmentation_at(config: Config, epoch: int) -> AugmentConfig:
    """The augmentation of an epoch: the last ones have neither mosaic nor mixup, so that images are whole again."""
    if epoch >= config.epochs - config.augment.close_mosaic_epochs:
        return dataclasses.replace(config.augment, mosaic=0.0, mixup=0.0)
    return config.augment


def detection_losses(setup: TrainingSetup, s_output: Any, targets: Targets, is_labelled: Tensor) -> dict[str, Tensor]:
    """The student's own losses, weighted; {} if the config gives them no weight.

    They are those of the images with boxes alone, the labelled ones, or all with pseudo boxes: so their size does not
    depend on how many others are in the batch. In a batch without any, the losses of all images count 0, so that every
    batch has the same losses. is_labelled: (B,) bool.
    """
    weight = setup.config.detection_weight
    if not weight:
        return {}
    has_boxes = is_labelled if setup.splits.pseudo is None else torch.ones_like(is_labelled)
    if not has_boxes.any():
        has_boxes, weight = torch.ones_like(is_labelled), 0.0
    student = cast(Detector, setup.student)  # the same module, typed by its own methods
    losses = student.losses(select_images(s_output, has_boxes), targets.of_images(has_boxes))
    return {name: weight * value for name, value in losses.items()}


def scheduled_step(setup: TrainingSetup, state: TrainingState) -> int:
    """The step that the schedules are at: state.step, unless the run was resumed with more or fewer steps an epoch."""
    return state.epoch * setup.steps_per_epoch + state.batch // setup.config.optimizer.accumulate


def set_learning_rates(setup: TrainingSetup, step: int) -> float:
    """Set the optimizer's rates for a step of the run; returns the scheduled learning rate."""
    total_steps, warmup_steps = setup.config.epochs * setup.steps_per_epoch, setup.warmup_steps
    settings = setup.config.optimizer
    return apply_schedule(setup.optimizer, step, settings, total_steps=total_steps, warmup_steps=warmup_steps)
