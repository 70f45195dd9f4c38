"""The pictures that a synthetic set starts from: chosen or assembled from real ones. condense.py learns the pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import checkpoint
from distill.condense import coresets, crops
from distill.condense.head_matching import head_gradient_rows
from distill.losses.relations import pool_boxes
from engine.condensing.config import Task
from engine.condensing.frozen_backbone import PICTURES_AT_ONCE, FrozenBackbone
from engine.condensing.real_pictures import RealPictures
from errors import UserError, naming, shortened
from random_streams import Stream, seeded_generator
from structures import Detector, Targets

# Maps whose means describe a picture for herding and k_center, an object for region_cover
FEATURES = ("p3", "p4", "p5")


@dataclass(frozen=True, eq=False)
class Layout:
    """Images with objects.

    images uint8 (M, 3, S, S). content_xyxy (M, 4): the part of each image that is not padding; None: all of it.
    sources: names of the real pictures; empty for images assembled from several.
    """

    images: Tensor
    targets: Targets
    content_xyxy: Tensor | None
    sources: tuple[str, ...] = ()


def load_network(task: Task, device: str | torch.device = "cpu") -> tuple[nn.Module, tuple[str, ...]] | None:
    """The trained detector that a set needs, in eval mode, and its class names; None where it needs none.

    UserError if it cannot be loaded: call it before any picture is listed.
    """
    settings = task.condense.network
    if not task.needs_network:
        return None
    assert settings.weights is not None  # Task.check refuses it
    with naming("key 'condense.network.weights'"):
        model, info = checkpoint.load_model(settings.weights, settings.arch, device=str(device))
    return model, info.names


def check_classes(task: Task, found: tuple[str, ...], names: tuple[str, ...]) -> None:
    """UserError if the network's loss is needed and its classes are not the dataset's."""
    if task.rule == "highest_loss" and found != names:
        weights, own = task.condense.network.weights, shortened(found)
        raise UserError(f"{weights}: found the classes {own}; expected those of the dataset: {shortened(names)}")


def first_layout(task: Task, real: RealPictures, network: nn.Module | None) -> Layout:
    """The task.decoded pictures that a set starts from: those of the method, or of `init` for learnt pixels.

    UserError if the dataset has too few.
    """
    c, count = task.condense, task.decoded
    task.check_source(len(real))
    if "crops" in (c.method, c.init if task.is_learnt else c.method):
        return crop_layout(task, real, count)
    assert task.rule is not None  # only sets of crops have none
    generator = seeded_generator(Stream.CHOICE, task.seed)
    rows = choose(task.rule, real, network, count, generator, ridge=c.head.ridge).tolist()
    batch = real.read(rows)
    sources = tuple(real.index.samples[row].image_path.name for row in rows)
    return Layout(batch.images, batch.targets, batch.content_xyxy, sources)


def choose(
    rule: str, real: RealPictures, network: nn.Module | None, count: int, generator: torch.Generator, *, ridge: float
) -> Tensor:
    """`count` rows of the real pictures by a rule of distill.condense. ridge: of the head, for head_gradient."""
    if rule == "random":
        return coresets.random_rows(len(real), count, generator=generator)
    if rule == "in_turn":
        return coresets.rows_in_turn(real.class_counts(), count, generator=generator)
    if rule == "uniform":
        return coresets.balanced_rows(real.class_counts(), count, generator=generator)
    if rule == "most_objects":
        return coresets.top_rows(real.class_counts().sum(1), count)
    assert network is not None  # task.needs_network
    if rule == "highest_loss":
        return coresets.top_rows(losses_of(real, network), count)
    if rule == "head_gradient":
        backbone = FrozenBackbone(network, real.image_size, len(real.index.names))
        data = backbone.data_of(real)
        fresh = backbone.grid.fresh_head(data.widths, backbone.num_classes)
        return head_gradient_rows(data, count, fresh, ridge)
    if rule == "region_cover":
        rows, labels = real.objects()
        return coresets.region_cover(region_features_of(real, network), rows, labels, count, len(real))
    return {"herding": coresets.herding, "k_center": coresets.k_center}[rule](features_of(real, network), count)


def features_of(real: RealPictures, network: nn.Module) -> Tensor:
    """(N, D): the concatenated means of the network's maps FEATURES over each picture, on the CPU."""
    return torch.cat([torch.cat([x.mean((2, 3)) for x in maps], dim=1).cpu() for _, maps in maps_of(real, network)])


def region_features_of(real: RealPictures, network: nn.Module) -> Tensor:
    """(M, D): the same over the box of each object, in the order of real.objects()."""
    found, size = [], (real.image_size, real.image_size)
    for targets, maps in maps_of(real, network):
        boxes_xyxy, image = targets.boxes_xyxy, targets.image
        inside = [pool_boxes(x, boxes_xyxy=boxes_xyxy, image=image, image_size=size).mean((2, 3)) for x in maps]
        found.append(torch.cat(inside, dim=1).cpu())
    return torch.cat(found)


@torch.no_grad()
def maps_of(real: RealPictures, network: nn.Module) -> Iterator[tuple[Targets, list[Tensor]]]:
    """The objects of each batch of pictures, and the network's maps FEATURES of it in float32."""
    device = next(network.parameters()).device
    for rows in torch.arange(len(real)).split(PICTURES_AT_ONCE):
        batch = real.read(rows.tolist()).to(device)
        features = network(batch.images.float() / 255).features
        maps = [features[name].float() for name in FEATURES if name in features]
        if not maps:
            kind = type(network).__name__
            raise UserError(f"key 'condense.network': {kind} has none of the maps {', '.join(FEATURES)}")
        yield batch.targets, maps


@torch.no_grad()
def losses_of(real: RealPictures, network: nn.Module) -> Tensor:
    """(N,): the network's detection loss on each picture. Losses that sample are seeded by the row."""
    if not hasattr(network, "losses"):
        raise UserError(f"key 'condense.network': {type(network).__name__} has no training losses here")
    detector = cast(Detector, network)  # PyTorch types every attribute of a module as Tensor | Module
    device, found = next(network.parameters()).device, []
    for row in range(len(real)):
        batch = real.read([row]).to(device)
        torch.manual_seed(row)
        losses = detector.losses(network(batch.images.float() / 255), batch.targets)
        found.append(float(sum(losses.values())))
    return torch.tensor(found, dtype=torch.float64)


def crop_layout(task: Task, real: RealPictures, count: int) -> Layout:
    """`count` mosaics of crops around objects, with the classes in turn."""
    grid, generator = task.condense.crops, seeded_generator(Stream.CROPS, task.seed)
    cell = real.image_size // grid
    rows, labels = real.objects()
    num_crops = count * grid**2
    if num_crops > len(rows):
        raise UserError(f"key 'condense.pictures': {num_crops} crops need as many objects; there are {len(rows)}")
    tiles = []
    for number in crops.in_turn(labels, generator=generator)[:num_crops].tolist():
        batch = real.read([int(rows[number])])
        within = int((rows[:number] == rows[number]).sum())  # index among the objects of its picture
        window = crops.crop_window(batch.targets.boxes_xyxy[within], batch.content_xyxy[0], cell)
        tiles.append(crops.crop(batch.images[0], batch.targets.boxes_xyxy, batch.targets.labels, window, cell))
    return joined([crops.pack_crops(tiles[i : i + grid**2], grid) for i in range(0, num_crops, grid**2)])


def joined(pictures: list[tuple[Tensor, Tensor, Tensor]]) -> Layout:
    """(image, boxes, labels) of each -> one Layout without padding."""
    counts = torch.tensor([len(labels) for _, _, labels in pictures])
    labels = torch.cat([labels for _, _, labels in pictures])
    image = torch.arange(len(pictures)).repeat_interleave(counts)
    targets = Targets(torch.cat([b for _, b, _ in pictures]), labels, image, torch.zeros(len(labels), dtype=torch.bool))
    return Layout(torch.stack([picture for picture, _, _ in pictures]), targets, None)
