"""YOLOv8 n, s, m, l, x: an anchor-free one-stage detector. It has no paper; the architecture is the released one.

    images ── backbone (C2f blocks, SPPF) ── c3, c4, c5 ── neck (PANet) ── p3, p4, p5 ── head ── box and class logits

Its parts: cross-stage partial blocks (CSPNet, arXiv:1911.11929), SPP (arXiv:1406.4729), a top-down and a bottom-up
path (FPN, arXiv:1612.03144; PANet, arXiv:1803.01534), one decoupled head per level (YOLOX, arXiv:2107.08430), box edges
as distributions (Generalized Focal Loss, arXiv:2006.04388). Losses and assigner: yolo/losses.py.

The sizes "narrow" and "half" were not released and have no weights to load. Both are half as wide as n. "narrow" is
less deep: dataset distillation uses it as a matching network on machines with few cores. "half" is as deep as n, so
that it can begin as half of the channels of n's weights (student.inherit).

Differs from the released code in form, not in results: the bins 0..R-1 are not a parameter (losses.decode_distances
makes them), `forward` returns the same in train and eval mode, and SIZES lists every width and depth in place of
multipliers. Decoding and losses are float32 under autocast.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels.nms import select_detections
from layers.precision import at_least_float32
from structures import Detections, Targets, image_size_of
from weights import ClassRows
from yolo.assigners import in_ignored_box, make_points
from yolo.layers import SPPF, Bottleneck, ConvBNAct, upsample
from yolo.losses import decode_distances, yolov8_assignment, yolov8_losses
from yolo.released_names import YOLOV8_NAMES
from yolo.taps import BRANCH_MAPS, branch_maps, branch_tail, is_requested, layer_outputs, logits_at_boxes

LEVEL_STRIDES = (8, 16, 32)  # pixels, of p3, p4, p5
FEATURE_STRIDES = {"c3": 8, "c4": 16, "c5": 32, "p3": 8, "p4": 16, "p5": 32}
NECK_MAPS = frozenset({"p3", "p4", "p5"})
HEAD_NAMES = frozenset({"box_logits", "class_logits", *BRANCH_MAPS})
MAX_DEPTH = 32  # bottlenecks of a stage
NUM_BINS = 16  # R: an edge is at most 15 strides away from its point


class Size(NamedTuple):
    """channels: of the maps at stride 2, 4, 8, 16, 32. depths: bottlenecks of the backbone's stages at stride 4, 8, 16,
    32. neck_depth: bottlenecks of each block of the neck.
    """

    channels: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int]
    neck_depth: int

    @property
    def all_depths(self) -> tuple[int, ...]:
        """The argument `depths` of build_yolov8."""
        return (*self.depths, self.neck_depth)


SIZES = {
    "narrow": Size(channels=(8, 16, 32, 64, 128), depths=(1, 1, 1, 1), neck_depth=1),
    "half": Size(channels=(8, 16, 32, 64, 128), depths=(1, 2, 2, 1), neck_depth=1),
    "n": Size(channels=(16, 32, 64, 128, 256), depths=(1, 2, 2, 1), neck_depth=1),
    "s": Size(channels=(32, 64, 128, 256, 512), depths=(1, 2, 2, 1), neck_depth=1),
    "m": Size(channels=(48, 96, 192, 384, 576), depths=(2, 4, 4, 2), neck_depth=2),
    "l": Size(channels=(64, 128, 256, 512, 512), depths=(3, 6, 6, 3), neck_depth=3),
    "x": Size(channels=(80, 160, 320, 640, 640), depths=(3, 6, 6, 3), neck_depth=3),
}


class C2f(nn.Module):
    """Half of the channels pass `depth` bottlenecks in a row; a 1x1 convolution merges both halves and every result.

    In a pruned block (distill/pruning) the two parts may have different widths.
    """

    def __init__(self, c_in: int, c_out: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.split = ConvBNAct(c_in, c_out)
        self.blocks = nn.ModuleList(Bottleneck(c_out // 2, (3, 3), shortcut) for _ in range(depth))
        self.merge = ConvBNAct((2 + depth) * (c_out // 2), c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.split(x)
        passing = cast(Bottleneck, self.blocks[0]).conv1.conv.weight.shape[1]
        parts = list(x.split((x.shape[1] - passing, passing), dim=1))  # 2 of (B, C_out / 2, H, W)
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat(parts, 1))  # (B, C_out, H, W)


class Backbone(nn.Module):
    """images (B, 3, H, W) -> c3, c4, c5 at strides 8, 16, 32. `stageN` works at stride 2^N."""

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        self.stem = ConvBNAct(3, c1, 3, stride=2)
        self.down2 = ConvBNAct(c1, c2, 3, stride=2)
        self.stage2 = C2f(c2, c2, depths[0], shortcut=True)
        self.down3 = ConvBNAct(c2, c3, 3, stride=2)
        self.stage3 = C2f(c3, c3, depths[1], shortcut=True)
        self.down4 = ConvBNAct(c3, c4, 3, stride=2)
        self.stage4 = C2f(c4, c4, depths[2], shortcut=True)
        self.down5 = ConvBNAct(c4, c5, 3, stride=2)
        self.stage5 = C2f(c5, c5, depths[3], shortcut=True)
        self.spp = SPPF(c5, c5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c2 = self.stage2(self.down2(self.stem(images)))
        c3 = self.stage3(self.down3(c2))
        c4 = self.stage4(self.down4(c3))
        c5 = self.spp(self.stage5(self.down5(c4)))
        return {"c3": c3, "c4": c4, "c5": c5}


class Neck(nn.Module):
    """c3, c4, c5 -> p3, p4, p5 of the same sizes and channels: a top-down path, then a bottom-up path."""

    def __init__(self, channels: tuple[int, ...], depth: int) -> None:
        super().__init__()
        c3, c4, c5 = channels[2:]
        self.top_down4 = C2f(c5 + c4, c4, depth, shortcut=False)
        self.top_down3 = C2f(c4 + c3, c3, depth, shortcut=False)
        self.down3 = ConvBNAct(c3, c3, 3, stride=2)
        self.bottom_up4 = C2f(c3 + c4, c4, depth, shortcut=False)
        self.down4 = ConvBNAct(c4, c4, 3, stride=2)
        self.bottom_up5 = C2f(c4 + c5, c5, depth, shortcut=False)

    def forward(self, c: dict[str, Tensor]) -> dict[str, Tensor]:
        mid4 = self.top_down4(torch.cat((upsample(c["c5"]), c["c4"]), 1))
        p3 = self.top_down3(torch.cat((upsample(mid4), c["c3"]), 1))
        p4 = self.bottom_up4(torch.cat((self.down3(p3), mid4), 1))
        p5 = self.bottom_up5(torch.cat((self.down4(p4), c["c5"]), 1))
        return {"p3": p3, "p4": p4, "p5": p5}


class AnchorFreeHead(nn.Module):
    """K class logits and 4 distributions over R distances per location, from two branches of convolutions per level.

    An edge distance, in units of the level's stride, is the expectation over the bins 0..R-1
    (Generalized Focal Loss, arXiv:2006.04388):  d = sum_r r * softmax(z)_r

    Fresh biases encode a prior, an idea of RetinaNet (arXiv:1708.02002, sec. 4.1). The class bias is
    log(5 / K / (640 / stride)^2): an image of 640 px holds 5 objects, spread over K classes and the level's locations.
    The bias of every bin is 1.

    class_width: channels within the class branches. None is the released rule, max(channels[0], min(K, 100)). A head
    that starts from the weights of a head for more classes keeps the width of that head.
    """

    def __init__(self, channels: tuple[int, ...], num_classes: int, class_width: int | None = None) -> None:
        super().__init__()
        class_width = class_width or max(channels[0], min(num_classes, 100))
        self.widths = {"box": max(16, channels[0] // 4, 4 * NUM_BINS), "cls": class_width}
        self.class_biases = [math.log(5 / num_classes / (640 / stride) ** 2) for stride in LEVEL_STRIDES]
        self.box = nn.ModuleList(branch(c, self.widths["box"], 4 * NUM_BINS) for c in channels)
        self.cls = nn.ModuleList(branch(c, self.widths["cls"], num_classes) for c in channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for box, cls, class_bias in zip(self.box, self.cls, self.class_biases):
            for layers, bias in ((box, 1.0), (cls, class_bias)):
                predict = cast(nn.Conv2d, cast(nn.Sequential, layers)[-1])
                nn.init.constant_(cast(Tensor, predict.bias), bias)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, list[list[Tensor]]]]:
        """maps (B, C_l, H_l, W_l) per level -> box_logits (B, A, 4, R), class_logits (B, A, K), A = sum_l H_l W_l.

        Locations are ordered level by level, row by row; edges are left, top, right, bottom. The third result holds the
        outputs of every layer of the branches "box" and "cls", per level; taps.branch_maps names them.
        """
        box = [layer_outputs(branch, x) for branch, x in zip(self.box, maps)]
        cls = [layer_outputs(branch, x) for branch, x in zip(self.cls, maps)]
        box_logits = torch.cat([flatten_cells(outputs[-1]) for outputs in box], dim=1)  # (B, A, 4R)
        class_logits = torch.cat([flatten_cells(outputs[-1]) for outputs in cls], dim=1)  # (B, A, K)
        return box_logits.unflatten(2, (4, NUM_BINS)), class_logits, {"box": box, "cls": cls}


def branch(c_in: int, width: int, c_out: int) -> nn.Sequential:
    """Two 3x3 convolutions and a 1x1 convolution to the logits."""
    return nn.Sequential(ConvBNAct(c_in, width, 3), ConvBNAct(width, width, 3), nn.Conv2d(width, c_out, 1))


def flatten_cells(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C). In channels_last memory, joining such levels is one straight copy."""
    return x.flatten(2).transpose(1, 2)


def level_sizes(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """(H, W) in pixels -> (h, w) in cells of p3, p4, p5."""
    height, width = image_size
    return [(height // stride, width // stride) for stride in LEVEL_STRIDES]


@dataclass(frozen=True)
class AnchorFreeOutput:
    """The output of AnchorFreeDetector.forward for images (B, 3, H, W), the same in train and eval mode.

    features: maps (B, C, H / s, W / s) by name: c3, c4, c5 (backbone); p3, p4, p5 (neck, the head's input); and those
        within the head, box3_1 ... box5_2 and cls3_1 ... cls5_2. box4_1 is in the box branch of level 4, after the
        first of its two 3x3 convolutions (with BatchNorm and activation).
    box_logits (B, A, 4, R), class_logits (B, A, K): in the order of AnchorFreeHead. image_size: (H, W).
    AnchorFreeDetector.requested_outputs may leave maps out; both logits are None if it leaves out the head.
    """

    features: dict[str, Tensor]
    box_logits: Tensor | None
    class_logits: Tensor | None
    image_size: tuple[int, int]

    def logits(self) -> tuple[Tensor, Tensor]:
        """box_logits and class_logits of a forward pass that ran the head."""
        assert self.box_logits is not None and self.class_logits is not None, "requested_outputs left out the head"
        return self.box_logits, self.class_logits


class AnchorFreeDetector(nn.Module):
    """backbone -> neck -> anchor-free head: YOLOv8, and YOLOv5u (yolo/yolov5.py). Satisfies DenseDetector.

    channels: the five of Size. class_width: of AnchorFreeHead. The gains weight the loss terms; the defaults are those
    of the released recipe.

    requested_outputs: the names of the features and logits that the caller needs, or None for all. The head is
    skipped if none of its outputs is named, the neck if none of either is. Maps that are not named may be missing. If
    the head runs, it gives both logits; decode, detect, losses, positives and class_logits_at need them.
    """

    class_activation = "sigmoid"

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        channels: tuple[int, ...],
        num_classes: int,
        public_names: list[tuple[str, str | None]],
        class_width: int | None = None,
        box_gain: float = 7.5,
        cls_gain: float = 0.5,
        dfl_gain: float = 1.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = AnchorFreeHead(channels[2:], num_classes, class_width)
        self.num_classes = num_classes
        self.strides = FEATURE_STRIDES | {name: LEVEL_STRIDES[row] for name, (_, row, _) in BRANCH_MAPS.items()}
        self.channels = dict(zip(FEATURE_STRIDES, channels[2:] * 2))
        self.channels |= {name: self.head.widths[kind] for name, (kind, _, _) in BRANCH_MAPS.items()}
        self.requested_outputs: frozenset[str] | None = None
        self.public_names = public_names
        self.class_head = ("head.cls.",)
        self.class_rows = (ClassRows("head.cls.{}.2."),)
        self.box_gain, self.cls_gain, self.dfl_gain = box_gain, cls_gain, dfl_gain

    def forward(self, images: Tensor) -> AnchorFreeOutput:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of 32, else ValueError."""
        image_size = image_size_of(images)
        features = self.backbone(images)
        box_logits = class_logits = None
        if is_requested(self.requested_outputs, NECK_MAPS | HEAD_NAMES):
            features |= self.neck(features)
        if is_requested(self.requested_outputs, HEAD_NAMES):
            box_logits, class_logits, outputs = self.head([features["p3"], features["p4"], features["p5"]])
            features |= branch_maps(outputs, self.requested_outputs)
        return AnchorFreeOutput(features, box_logits, class_logits, image_size)

    def tail(self, name: str) -> nn.Sequential:
        """The layers between a map within the head, such as "cls3_1", and its level's logits (taps.branch_tail)."""
        return branch_tail(self.head, name)

    def _locations(self, output: AnchorFreeOutput) -> tuple[Tensor, Tensor]:
        """Points (A, 2) in cells and strides (A, 1) in pixels, in the order of the head."""
        return make_points(level_sizes(output.image_size), LEVEL_STRIDES, output.logits()[0].device)

    def decode(self, output: AnchorFreeOutput) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, A, 4) in pixels, not clipped to the image, and scores (B, A, K) = sigmoid(class_logits)."""
        box_logits, class_logits = output.logits()
        boxes_xyxy = decode_distances(at_least_float32(box_logits), *self._locations(output))
        return boxes_xyxy, at_least_float32(class_logits).sigmoid()

    def losses(self, output: AnchorFreeOutput, targets: Targets) -> dict[str, Tensor]:
        """box (CIoU), cls (BCE) and dfl, weighted by the gains: see losses.yolov8_losses. float32 under autocast."""
        box_logits, class_logits = output.logits()
        points, strides = self._locations(output)
        return yolov8_losses(
            box_logits=box_logits,
            class_logits=class_logits,
            points=points,
            strides=strides,
            targets=targets,
            box_gain=self.box_gain,
            cls_gain=self.cls_gain,
            dfl_gain=self.dfl_gain,
        )

    def positives(self, output: AnchorFreeOutput, targets: Targets) -> Tensor:
        """(B, A) int64: the row of `targets` that `losses` assigns to each location of the head, or -1. No gradient.

        The task-aligned assigner chooses by the predictions in `output`. A location that several objects choose goes to
        the object that its decoded box overlaps most (CIoU); ties go to the lower row.
        """
        box_logits, class_logits = output.logits()
        points, strides = self._locations(output)
        return yolov8_assignment(
            box_logits=box_logits, class_logits=class_logits, points=points, strides=strides, targets=targets
        ).gt_index

    def in_ignored_boxes(self, output: AnchorFreeOutput, targets: Targets) -> Tensor:
        """(B, A) bool: the locations of the head whose center lies inside an ignored box."""
        points, strides = self._locations(output)
        return in_ignored_box(points * strides, targets, len(output.logits()[0]))

    @torch.no_grad()
    def detect(
        self, output: AnchorFreeOutput, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """The decoded locations after class-wise NMS, best first. One location may give several classes."""
        return select_detections(
            *self.decode(output),
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    def location_logits(self, output: AnchorFreeOutput) -> Tensor:
        """(B, A, K): the class logits of each location, at least in float32; the same quantity as class_logits_at."""
        return at_least_float32(output.logits()[1])

    def class_logits_at(self, output: AnchorFreeOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, K) class logits, as taps.logits_at_boxes defines them.

        Each is the log-odds that the box holds an object of class k. Its sigmoid is comparable to a score of `decode`.
        """
        with torch.no_grad():
            decoded_xyxy, _ = self.decode(output)
            points, strides = self._locations(output)
        logits, centers = self.location_logits(output), points * strides
        return logits_at_boxes(logits, decoded_xyxy=decoded_xyxy, centers=centers, boxes_per_image=boxes_per_image)


def build_yolov8(
    size: str,
    num_classes: int,
    *,
    class_width: int | None = None,
    channels: tuple[int, ...] | None = None,
    depths: tuple[int, ...] | None = None,
) -> AnchorFreeDetector:
    """A freshly initialised YOLOv8; size is a key of SIZES. Draws from torch's global generator.

    channels, depths: those of Size in place of the size's own; the last of the five depths is neck_depth.
    """
    own = SIZES[size]
    channels = channels or own.channels
    *backbone_depths, neck_depth = depths or own.all_depths
    return AnchorFreeDetector(
        backbone=Backbone(channels, tuple(backbone_depths)),
        neck=Neck(channels, neck_depth),
        channels=channels,
        num_classes=num_classes,
        public_names=YOLOV8_NAMES,
        class_width=class_width,
    )


def depths_in(names: Iterable[str], size: Size) -> tuple[int, ...]:
    """The argument `depths` with which a YOLOv8 has the layers of these names, entries of a state dict or modules.

    A stage has the depth that it has in `size` where no block of it is named, or more than MAX_DEPTH: a file cannot ask
    for a model of any size, and its names then do not fit.
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        if match := re.match(r"(backbone\.stage[2-5]|neck)\..*?blocks\.(\d+)\.", str(name)):
            blocks.setdefault(match[1], set()).add(match[2])
    stages = (*(f"backbone.stage{stage}" for stage in range(2, 6)), "neck")
    named = (len(blocks.get(stage, ())) for stage in stages)
    return tuple(n if 0 < n <= MAX_DEPTH else own for n, own in zip(named, size.all_depths, strict=True))
