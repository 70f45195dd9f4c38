"""YOLOv5 n, s, m, l, x (release 6 and later): a one-stage detector with anchors, and its anchor-free `u` variants.

    images ── backbone (C3 blocks, SPPF) ── c3, c4, c5 ── neck (PANet) ── p3, p4, p5 ── head ── box, objectness, class

It has no paper; the architecture is the released one. Its parts: cross-stage partial blocks (CSPNet,
arXiv:1911.11929), SPP (arXiv:1406.4729), a top-down and a bottom-up path (PANet, arXiv:1803.01534), anchors and
objectness (YOLO9000, arXiv:1612.08242; YOLOv3, arXiv:1804.02767). YOLOv5u puts the head and the losses of YOLOv8
(yolo/yolov8.py) on the same backbone and neck. Losses: yolo/losses.py; matching: yolo/assigners.py.

Differs from the released code in form, not in results: `forward` returns the same in train and eval mode, and SIZES
lists every width and depth in place of multipliers. Decoding and losses are float32 under autocast.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.nms import select_detections
from layers.precision import at_least_float32
from structures import Detections, Targets, image_size_of
from weights import ClassRows, PublicLayout
from yolo.assigners import AnchorMatches, anchor_ratio_matches, make_anchors
from yolo.layers import SPPF, Bottleneck, ConvBNAct, upsample
from yolo.losses import decode_anchor_offsets, yolov5_assignment, yolov5_losses, yolov7_matches
from yolo.released_names import YOLOV5_NAMES, YOLOV5U_NAMES
from yolo.taps import is_requested, joint_logits, logits_at_boxes
from yolo.yolov8 import FEATURE_STRIDES, LEVEL_STRIDES, NECK_MAPS, AnchorFreeDetector, Size, level_sizes

ANCHORS_PIXELS = (  # width, height; three per level p3, p4, p5; fitted to COCO by the authors of the released weights
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
NUM_ANCHORS = 3  # per cell
HEAD_NAMES = frozenset({"box_logits", "objectness_logits", "class_logits"})

SIZES = {
    "n": Size(channels=(16, 32, 64, 128, 256), depths=(1, 2, 3, 1), neck_depth=1),
    "s": Size(channels=(32, 64, 128, 256, 512), depths=(1, 2, 3, 1), neck_depth=1),
    "m": Size(channels=(48, 96, 192, 384, 768), depths=(2, 4, 6, 2), neck_depth=2),
    "l": Size(channels=(64, 128, 256, 512, 1024), depths=(3, 6, 9, 3), neck_depth=3),
    "x": Size(channels=(80, 160, 320, 640, 1280), depths=(4, 8, 12, 4), neck_depth=4),
}


class C3(nn.Module):
    """One 1x1 projection passes `depth` bottlenecks, a second one bypasses them; a 1x1 convolution merges both."""

    def __init__(self, c_in: int, c_out: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.main = ConvBNAct(c_in, c_out // 2)
        self.bypass = ConvBNAct(c_in, c_out // 2)
        self.blocks = nn.Sequential(*(Bottleneck(c_out // 2, (1, 3), shortcut) for _ in range(depth)))
        self.merge = ConvBNAct(2 * (c_out // 2), c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat((self.blocks(self.main(x)), self.bypass(x)), 1))  # (B, C_out, H, W)


class Backbone(nn.Module):
    """images (B, 3, H, W) -> c3, c4, c5 at strides 8, 16, 32. `stageN` works at stride 2^N."""

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        self.stem = ConvBNAct(3, c1, 6, stride=2)
        self.down2 = ConvBNAct(c1, c2, 3, stride=2)
        self.stage2 = C3(c2, c2, depths[0], shortcut=True)
        self.down3 = ConvBNAct(c2, c3, 3, stride=2)
        self.stage3 = C3(c3, c3, depths[1], shortcut=True)
        self.down4 = ConvBNAct(c3, c4, 3, stride=2)
        self.stage4 = C3(c4, c4, depths[2], shortcut=True)
        self.down5 = ConvBNAct(c4, c5, 3, stride=2)
        self.stage5 = C3(c5, c5, depths[3], shortcut=True)
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
        self.lateral5 = ConvBNAct(c5, c4)
        self.top_down4 = C3(c4 + c4, c4, depth, shortcut=False)
        self.lateral4 = ConvBNAct(c4, c3)
        self.top_down3 = C3(c3 + c3, c3, depth, shortcut=False)
        self.down3 = ConvBNAct(c3, c3, 3, stride=2)
        self.bottom_up4 = C3(c3 + c3, c4, depth, shortcut=False)
        self.down4 = ConvBNAct(c4, c4, 3, stride=2)
        self.bottom_up5 = C3(c4 + c4, c5, depth, shortcut=False)

    def forward(self, c: dict[str, Tensor]) -> dict[str, Tensor]:
        mid5 = self.lateral5(c["c5"])
        mid4 = self.lateral4(self.top_down4(torch.cat((upsample(mid5), c["c4"]), 1)))
        p3 = self.top_down3(torch.cat((upsample(mid4), c["c3"]), 1))
        p4 = self.bottom_up4(torch.cat((self.down3(p3), mid4), 1))
        p5 = self.bottom_up5(torch.cat((self.down4(p4), mid5), 1))
        return {"p3": p3, "p4": p4, "p5": p5}


class AnchorHead(nn.Module):
    """One 1x1 convolution per level: for each of 3 anchors in a cell, 4 box numbers, an objectness and K class logits.

    anchors (3 levels, 3 anchors, 2): widths and heights in CELLS of their level. They are part of the state dict,
    because a released checkpoint may have been trained with anchors of its own.

    Fresh biases encode a prior, an idea of RetinaNet (arXiv:1708.02002, sec. 4.1). An image of 640 px holds 8 objects
    per level: the objectness bias is log(8 / (640 / stride)^2). The class bias is log(0.6 / (K - 0.99999)).
    """

    anchors: Tensor

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.predict = nn.ModuleList(nn.Conv2d(c, NUM_ANCHORS * (5 + num_classes), 1) for c in channels)
        strides = torch.tensor(LEVEL_STRIDES, dtype=torch.float32)[:, None, None]
        self.register_buffer("anchors", torch.tensor(ANCHORS_PIXELS, dtype=torch.float32) / strides)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv, stride in zip(self.predict, LEVEL_STRIDES):
            bias = cast(Tensor, conv.bias).detach().view(NUM_ANCHORS, 5 + self.num_classes)
            bias[:, 4] = math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] = math.log(0.6 / (self.num_classes - 0.99999))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """maps (B, C_l, H_l, W_l) per level -> box_logits (B, A, 4), objectness_logits (B, A), class_logits (B, A, K).

        A = sum_l 3 H_l W_l, level by level; within a level index = (anchor * H_l + y) * W_l + x.
        """
        levels = []
        for conv, x in zip(self.predict, maps):
            raw = conv(x).unflatten(1, (NUM_ANCHORS, 5 + self.num_classes))  # (B, 3, 5 + K, H, W)
            levels.append(raw.permute(0, 1, 3, 4, 2).flatten(1, 3))  # (B, 3 * H * W, 5 + K)
        raw = torch.cat(levels, dim=1)  # (B, A, 5 + K)
        return raw[..., :4], raw[..., 4], raw[..., 5:]


@dataclass(frozen=True)
class AnchorOutput:
    """The output of AnchorDetector.forward for images (B, 3, H, W), the same in train and eval mode.

    features: maps (B, C, H / s, W / s) by name: c3, c4, c5 (backbone) and p3, p4, p5 (neck, the head's input).
    box_logits (B, A, 4) before decoding, objectness_logits (B, A), class_logits (B, A, K): in the order of AnchorHead.
        A location is a pair of anchor and cell.
    image_size: (H, W).
    AnchorDetector.requested_outputs may leave out p3, p4, p5; the logits are None if it leaves out the head.
    """

    features: dict[str, Tensor]
    box_logits: Tensor | None
    objectness_logits: Tensor | None
    class_logits: Tensor | None
    image_size: tuple[int, int]

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """box_logits, objectness_logits and class_logits of a forward pass that ran the head."""
        box, objectness, classes = self.box_logits, self.objectness_logits, self.class_logits
        assert box is not None and objectness is not None and classes is not None, "requested_outputs left out the head"
        return box, objectness, classes


class AnchorDetector(nn.Module):
    """backbone -> neck -> anchor head: YOLOv5, and YOLOv7-tiny (yolo/yolov7.py). Satisfies DenseDetector.

    channels: of c3, c4, c5, p3, p4, p5, in this order. activation: its class in torch.nn.
    simota: whether an object learns those of its matches that are cheapest by the predictions (yolo/simota.py), as in
    YOLOv7, or all of them, as in YOLOv5.
    The gains weight the loss terms; the defaults are those of both released recipes. As there, obj_gain is multiplied
    by H W / 640^2 and cls_gain by K / 80.

    requested_outputs: the names of the features and logits that the caller needs, or None for all, as in
    AnchorFreeDetector.
    """

    class_activation = "sigmoid"

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        channels: tuple[int, ...],
        num_classes: int,
        public_layouts: tuple[PublicLayout, ...],
        activation: str = "SiLU",
        simota: bool = False,
        box_gain: float = 0.05,
        obj_gain: float = 1.0,
        cls_gain: float = 0.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = AnchorHead(channels[3:], num_classes)
        self.num_classes = num_classes
        self.strides = dict(FEATURE_STRIDES)
        self.channels = dict(zip(FEATURE_STRIDES, channels, strict=True))
        self.public_layouts = public_layouts
        self.public_names = public_layouts[0].table
        self.activation = activation
        self.simota = simota
        self.class_head = ("head.predict.",)  # one convolution predicts boxes, objectness and classes
        self.class_rows = (ClassRows("head.predict.{}.", groups=NUM_ANCHORS, shared=5),)
        self.requested_outputs: frozenset[str] | None = None
        self.box_gain, self.obj_gain, self.cls_gain = box_gain, obj_gain, cls_gain

    def forward(self, images: Tensor) -> AnchorOutput:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of 32, else ValueError."""
        image_size = image_size_of(images)
        features = self.backbone(images)
        box = objectness = classes = None
        if is_requested(self.requested_outputs, NECK_MAPS | HEAD_NAMES):
            features |= self.neck(features)
        if is_requested(self.requested_outputs, HEAD_NAMES):
            box, objectness, classes = self.head([features["p3"], features["p4"], features["p5"]])
        return AnchorOutput(features, box, objectness, classes, image_size)

    def tail(self, name: str) -> nn.Sequential:
        """KeyError for every name: there is no map inside a head of one convolution (see AnchorFreeDetector.tail)."""
        raise KeyError(f"{name!r} is not a map within the head: an anchor head has none")

    def anchors_pixels(self) -> Tensor:
        """(3 levels, 3 anchors, 2) widths and heights in pixels, float32."""
        anchors = at_least_float32(self.head.anchors)
        return anchors * anchors.new_tensor(LEVEL_STRIDES)[:, None, None]

    def anchors_at(self, name: str) -> Tensor:
        """(3, 2): widths and heights in pixels of the anchors of the level that has the stride of the map `name`."""
        return self.anchors_pixels()[LEVEL_STRIDES.index(self.strides[name])]

    def _grid(self, output: AnchorOutput) -> dict[str, Any]:
        """grid_sizes, strides and anchors: keyword arguments of yolo/losses.py and of make_anchors."""
        sizes = level_sizes(output.image_size)
        return {"grid_sizes": sizes, "strides": LEVEL_STRIDES, "anchors": self.anchors_pixels()}

    def _locations(self, output: AnchorOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Points (A, 2) in cells, strides (A, 1) and anchor sizes (A, 2) in pixels, in the order of the head."""
        return make_anchors(**self._grid(output))

    def decode(self, output: AnchorOutput) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, A, 4) in pixels, not clipped to the image, and scores (B, A, K) = objectness * class."""
        box_logits, objectness_logits, class_logits = map(at_least_float32, output.logits())
        boxes_xyxy = decode_anchor_offsets(box_logits, *self._locations(output))
        return boxes_xyxy, objectness_logits.sigmoid()[..., None] * class_logits.sigmoid()

    def _matches(self, output: AnchorOutput, targets: Targets) -> AnchorMatches:
        """The locations that learn each object: all of the right shape, or those of them that SimOTA chooses."""
        if not self.simota:
            return anchor_ratio_matches(**self._grid(output), targets=targets)
        box_logits, objectness_logits, class_logits = output.logits()
        return yolov7_matches(
            box_logits=box_logits,
            objectness_logits=objectness_logits,
            class_logits=class_logits,
            **self._grid(output),
            targets=targets,
        )

    def losses(self, output: AnchorOutput, targets: Targets) -> dict[str, Tensor]:
        """box (CIoU), obj and cls (BCE), weighted by the gains: see losses.yolov5_losses. float32 under autocast."""
        box_logits, objectness_logits, class_logits = output.logits()
        height, width = output.image_size
        return yolov5_losses(
            box_logits=box_logits,
            objectness_logits=objectness_logits,
            class_logits=class_logits,
            **self._grid(output),
            targets=targets,
            matches=self._matches(output, targets),
            box_gain=self.box_gain,
            obj_gain=self.obj_gain * height * width / 640**2,
            cls_gain=self.cls_gain * self.num_classes / 80,
        )

    def positives(self, output: AnchorOutput, targets: Targets) -> Tensor:
        """(B, A) int64: the row of `targets` that `losses` assigns to each pair of anchor and cell, or -1. No gradient.

        With simota the matches depend on the predictions in `output`, and a location learns one object. Without, they
        depend on the shapes of anchors and objects alone, and a location that several objects share learns box and
        class from all of them; its row here is the one whose overlap it learns as objectness (assigners.last_match).
        """
        box_logits, _, class_logits = output.logits()
        assignment = yolov5_assignment(
            box_logits=box_logits,
            class_logits=class_logits,
            **self._grid(output),
            targets=targets,
            matches=self._matches(output, targets),
        )
        return assignment.gt_index

    @torch.no_grad()
    def detect(
        self, output: AnchorOutput, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """The decoded locations after class-wise NMS, best first. One location may give several classes."""
        return select_detections(
            *self.decode(output),
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    def location_logits(self, output: AnchorOutput) -> Tensor:
        """(B, A, K): logits of objectness * class at each location, at least in float32; as class_logits_at.

        `output.class_logits` are another quantity: the class of a location, given that it holds an object.
        """
        _, objectness_logits, class_logits = map(at_least_float32, output.logits())
        return joint_logits(objectness_logits[..., None], class_logits)

    def class_logits_at(self, output: AnchorOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, K) logits, as taps.logits_at_boxes defines them.

        Each includes the objectness (joint_logits): it is the log-odds that the box holds an object of class k, as
        distill/losses/box_classes.py needs them from a sigmoid head. Its sigmoid is comparable to a score of `decode`.
        """
        with torch.no_grad():
            decoded_xyxy, _ = self.decode(output)
            points, strides, _ = self._locations(output)
        logits, centers = self.location_logits(output), points * strides
        return logits_at_boxes(logits, decoded_xyxy=decoded_xyxy, centers=centers, boxes_per_image=boxes_per_image)


def join_anchors(state: dict[str, Tensor], head: str = "model.24") -> dict[str, Tensor]:
    """Merge the anchors of a released state dict into one entry, `<head>.anchors` (3, 3, 2) in cells.

    Files of YOLOv5's release 6.0 and earlier, and of YOLOv7, have the anchors twice: `anchors` in cells, and
    `anchor_grid` in pixels, (3, 1, 3, 1, 1, 2). Either may be missing, and the 18 numbers may have any shape. KeyError
    if there are not 18, or if the two entries differ by more than half precision explains.
    """
    name, pixels_name = f"{head}.anchors", f"{head}.anchor_grid"
    if pixels_name not in state and (name not in state or state[name].shape == (3, NUM_ANCHORS, 2)):
        return state
    entries = {key: state[key].flatten() for key in (name, pixels_name) if key in state}
    for key, values in entries.items():
        if len(values) != 6 * NUM_ANCHORS or not values.is_floating_point():
            raise KeyError(f"{key!r} is {tuple(state[key].shape)} {state[key].dtype}, expected (3, {NUM_ANCHORS}, 2)")
    strides = torch.tensor(LEVEL_STRIDES).view(3, 1, 1)
    anchors = {key: values.float().view(3, NUM_ANCHORS, 2) for key, values in entries.items()}
    if pixels_name in anchors:
        anchors[pixels_name] = anchors[pixels_name] / strides
    if len(anchors) == 2 and not torch.allclose(anchors[name], anchors[pixels_name], rtol=4e-3):
        raise KeyError(f"{name!r} in cells and {pixels_name!r} in pixels are not the same anchors")
    rest = {key: value for key, value in state.items() if key not in entries}
    return rest | {name: next(iter(anchors.values()))}


def build_yolov5(size: str, num_classes: int) -> AnchorDetector:
    """A freshly initialised YOLOv5 with anchors; size is a key of SIZES. Draws from torch's global generator."""
    channels, depths, neck_depth = SIZES[size]
    return AnchorDetector(
        backbone=Backbone(channels, depths),
        neck=Neck(channels, neck_depth),
        channels=channels[2:] * 2,
        num_classes=num_classes,
        public_layouts=(PublicLayout("released", YOLOV5_NAMES, join_anchors),),
    )


def build_yolov5u(size: str, num_classes: int, *, class_width: int | None = None) -> AnchorFreeDetector:
    """A freshly initialised YOLOv5u (anchor-free); size is a key of SIZES. Draws from torch's global generator."""
    channels, depths, neck_depth = SIZES[size]
    return AnchorFreeDetector(
        backbone=Backbone(channels, depths),
        neck=Neck(channels, neck_depth),
        channels=channels,
        num_classes=num_classes,
        public_names=YOLOV5U_NAMES,
        class_width=class_width,
    )
