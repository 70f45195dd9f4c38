"""Faster R-CNN on the CPU: ours beside torchvision's, where torchvision is installed.

    python -m benchmarks.frcnn [--image-size 480] [--batch-size 2] [--rounds 7] [--threads N] [--cpu-time] [--only ROW]
    /path/to/env/bin/python -m benchmarks.frcnn      # an environment with torch and torchvision

Rows: a training step (forward, losses, backward, SGD), inference on one image from pixels to at most 100 detections,
and RoIAlign alone, forward and backward, 512 boxes of an image from four levels of 256 channels. Both sides have the
same weights, fresh ones of torchvision's loaded by our name tables; live BatchNorm, every layer trained, 20 classes,
ten objects an image; torchvision's resizing is switched off. Fresh weights keep the full 2,000 (training) or 1,000
(inference) proposals where trained ones keep fewer: the second stage costs at its worst. Ours runs in channels_last,
its default; `--peer-channels-last` puts torchvision in it too, which it leaves to the user.

The contestants take turns, round by round, in one process; rates are those of the median round, in brackets the best.
`--cpu-time` counts CPU seconds of all threads instead of the clock's; with `--threads 1` that is what to read on a
machine that others use. With more threads the clock is the fair judge: torchvision's RoIAlign runs on one.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.timing import build_step, header, options, parse, random_batch, row, take_turns, versions
from errors import run_script
from frcnn.resnet import ResNet
from kernels.roi_align import assign_levels, roi_align
from structures import Targets
from weights import load_public

NUM_CLASSES, BOXES = 20, 512
ARCHITECTURES = ("resnet18", "mobilenet_v3_large", "mobilenet_v3_large_320")
STRIDES, CHANNELS = [4, 8, 16, 32], 256
SELECTION = dict(score_threshold=0.05, iou_threshold=0.5, max_detections=100)
Step = Callable[[], float]


def peer_model(arch: str, image_size: int) -> nn.Module:
    """torchvision's detector, fresh weights, live BatchNorm, all layers trainable, no resizing."""
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FasterRCNN

    torch.manual_seed(0)
    sizes = dict(min_size=image_size, max_size=image_size, _skip_resize=True)
    if arch.startswith("resnet"):
        backbone = resnet_fpn_backbone(backbone_name=arch, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
        return FasterRCNN(backbone, 1 + NUM_CLASSES, **sizes)
    build = getattr(detection, f"fasterrcnn_{arch}_fpn")
    return build(weights=None, weights_backbone=None, num_classes=1 + NUM_CLASSES, **sizes)


def our_model(arch: str, peer: nn.Module | None) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(f"fasterrcnn_{arch}", NUM_CLASSES)
    if peer is not None:
        load_public(model, peer.state_dict())
    return model


@torch.no_grad()
def calibrate(backbone: nn.Module, images: Tensor) -> None:
    """Running statistics of these images. Fresh ones let a deep network's maps fade to 1e-8, and proposals tie."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches seen: this one
    mean, std = (torch.tensor(values)[:, None, None] for values in (ResNet.mean, ResNet.std))
    backbone.train()((images - mean) / std)


def training_steps(
    arch: str, batch: tuple[Tensor, Targets], peer: nn.Module | None, peer_last: bool
) -> dict[str, Step]:
    images, targets = batch
    model = our_model(arch, peer).train()
    steps = {
        "ours": build_step(
            model, lambda images: sum(model.losses(model(images), targets).values()), images, channels_last=True
        )
    }
    if peer is not None:
        peer.train()
        of = [targets.image == i for i in range(len(images))]
        rows = [dict(boxes=targets.boxes_xyxy[rows], labels=1 + targets.labels[rows]) for rows in of]
        loss = lambda images: sum(peer(list(images), rows).values())
        steps["peer"] = build_step(peer, loss, images, channels_last=peer_last)
    return steps


def inference_steps(arch: str, image: Tensor, peer: nn.Module | None, peer_last: bool) -> dict[str, Step]:
    """image (1, 3, S, S)."""
    if peer is not None:
        calibrate(peer.backbone, image)
    model = our_model(arch, peer).eval().to(memory_format=torch.channels_last)
    our_image = image.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def ours() -> float:
        return len(model.detect(model(our_image), **SELECTION)[0])

    @torch.inference_mode()
    def theirs() -> float:
        return len(peer(list(peer_image))[0]["scores"])

    if peer is None:
        return {"ours": ours}
    memory_format = torch.channels_last if peer_last else torch.contiguous_format
    peer.eval().to(memory_format=memory_format)
    peer_image = image.contiguous(memory_format=memory_format)
    return {"ours": ours, "peer": theirs}


def roi_align_steps(batch_size: int, image_size: int, has_peer: bool) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)
    sizes = [image_size // stride for stride in STRIDES]
    maps = [torch.randn(batch_size, CHANNELS, size, size, generator=generator) for size in sizes]
    our_maps = [m.contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps]
    _, targets = random_batch(batch_size, image_size, objects=BOXES, num_classes=NUM_CLASSES)
    boxes_xyxy, image = targets.boxes_xyxy, targets.image
    gradient = torch.randn(len(boxes_xyxy), CHANNELS, 7, 7, generator=generator)

    def ours() -> float:
        level = assign_levels(boxes_xyxy, STRIDES)
        pooled = roi_align(our_maps, boxes_xyxy, image, level, strides=STRIDES)
        torch.autograd.grad(pooled, our_maps, gradient)
        return 0.0

    if not has_peer:
        return {"ours": ours}
    from torchvision.ops import MultiScaleRoIAlign

    pool = MultiScaleRoIAlign([str(stride) for stride in STRIDES], output_size=7, sampling_ratio=2)
    peer_maps = {str(stride): m.clone().requires_grad_() for stride, m in zip(STRIDES, maps)}
    rows = list(boxes_xyxy.split(BOXES))

    def theirs() -> float:
        pooled = pool(peer_maps, rows, [(image_size, image_size)] * batch_size)
        torch.autograd.grad(pooled, list(peer_maps.values()), gradient)
        return 0.0

    return {"ours": ours, "peer": theirs}


def main(argv: list[str]) -> None:
    parser = options(__doc__, rounds=7, image_size=480, batch_size=2)
    parser.add_argument("--peer-channels-last", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name holds this: train, infer, RoIAlign, or a backbone")
    args = parse(parser, argv)
    with contextlib.suppress(ImportError):
        import torchvision  # noqa: F401
    has_peer = "torchvision" in sys.modules
    print(
        f"Faster R-CNN, {args.image_size} px, batch {args.batch_size} (inference: 1), {versions('torchvision')}\n"
        + header("images per CPU second" if args.cpu_time else "images/s", "torchvision")
    )
    batch = random_batch(args.batch_size, args.image_size, num_classes=NUM_CLASSES)
    peer = lambda arch: peer_model(arch, args.image_size) if has_peer else None
    last = args.peer_channels_last
    rows: dict[str, tuple[Callable[[], dict[str, Step]], int]] = {}
    for arch in ARCHITECTURES[:2]:
        rows[f"train {arch}"] = lambda arch=arch: training_steps(arch, batch, peer(arch), last), args.batch_size
    for arch in ARCHITECTURES:
        rows[f"infer {arch}"] = lambda arch=arch: inference_steps(arch, batch[0][:1], peer(arch), last), 1
    rows["RoIAlign, both ways"] = lambda: roi_align_steps(args.batch_size, args.image_size, has_peer), args.batch_size
    for name, (build, num_images) in rows.items():
        if args.only in name:
            print(row(name, take_turns(build(), args), lambda s, n=num_images: n / s), flush=True)


if __name__ == "__main__":
    run_script(main)
