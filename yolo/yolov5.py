"""YOLOv5 n, s, m, l, x (release 6 and later): a one-stage detector with anchors, and its anchor-free `u` variants.

    images ── backbone (C3 blocks, SPPF) ── c3, c4, c5 ── neck (PANet) ── p3, p4, p5 ── head ── box, objectness, class

There is no paper; the architecture is the released one. Its parts: cross-stage partial blocks (CSPNet,
arXiv:1911.11929), SPP (arXiv:1406.4729), a top-down and a bottom-up path (PANet, arXiv:1803.01534), anchors and
objectness (YOLO9000, arXiv:1612.08242; YOLOv3, arXiv:1804.02767). YOLOv5u puts the head and the losses of YOLOv8
(yolo/yolov8.py) on the same backbone and neck. Losses and matching: yolo/losses.py.

Differs from the released code, not in what it computes: `forward` returns the same in train and eval mode, and sizes
are written out instead of multiplied out. Decoding and losses are float32 under autocast.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.nms import select_detections
from layers.precision import at_least_float32
from structures import Detections, Targets
from weights import ClassRows, PublicLayout
from yolo.assigners import make_anchors
from yolo.layers import SPPF, Bottleneck, ConvBNAct, check_image_size, upsample
from yolo.losses import decode_anchor_offsets, yolov5_assignment, yolov5_losses
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
    """`depth` bottlenecks on one 1x1 projection, a second projection around them, and a 1x1 merge of both."""

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
    """c3, c4, c5 -> p3, p4, p5 of the same sizes and channels: coarse to fine, then fine to coarse again."""

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

    `anchors` (3 levels, 3 anchors, 2) are widths and heights in CELLS of their level. They are part of the state dict,
    because a released checkpoint may have been trained with anchors of its own.

    Fresh weights start from a prior, as if an image of 640 px held 8 objects per level: the objectness bias is
    log(8 / (640 / stride)^2), the class bias log(0.6 / (K - 0.99999)), near 1 / K (the idea is RetinaNet's,
    arXiv:1708.02002, sec. 4.1).
    """

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.predict = nn.ModuleList(nn.Conv2d(c, NUM_ANCHORS * (5 + num_classes), 1) for c in channels)
        strides = torch.tensor(LEVEL_STRIDES, dtype=torch.float32)[:, None, None]
        self.register_buffer("anchors", torch.tensor(ANCHORS_PIXELS, dtype=torch.float32) / strides)
        for conv, stride in zip(self.predict, LEVEL_STRIDES):
            bias = conv.bias.detach().view(NUM_ANCHORS, 5 + num_classes)
            bias[:, 4] = math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] = math.log(0.6 / (num_classes - 0.99999))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """maps (B, C_l, H_l, W_l) per level -> box_logits (B, A, 4), objectness_logits (B, A), class_logits (B, A, K).

        A = sum_l 3 H_l W_l, level by level; within a level anchor by anchor, each row by row:
        index = (anchor * H_l + y) * W_l + x.
        """
        levels = []
        for conv, x in zip(self.predict, maps):
            raw = conv(x).unflatten(1, (NUM_ANCHORS, 5 + self.num_classes))  # (B, 3, 5 + K, H, W)
            levels.append(raw.permute(0, 1, 3, 4, 2).flatten(1, 3))  # (B, 3 * H * W, 5 + K)
        raw = torch.cat(levels, dim=1)  # (B, A, 5 + K)
        return raw[..., :4], raw[..., 4], raw[..., 5:]


@dataclass(frozen=True)
class YOLOv5Output:
    """What YOLOv5.forward returns, in train and eval mode alike, for images (B, 3, H, W).

    features: c3, c4, c5 (backbone) and p3, p4, p5 (neck, what the head reads), (B, C, H / s, W / s) each.
    box_logits (B, A, 4) raw, objectness_logits (B, A) and class_logits (B, A, K) as AnchorHead orders them (a location
    is a pair of anchor and cell); image_size is (H, W). The logits are None, and p3, p4, p5 missing, where
    YOLOv5.requested_outputs leaves them out.
    """

    features: dict[str, Tensor]
    box_logits: Tensor | None
    objectness_logits: Tensor | None
    class_logits: Tensor | None
    image_size: tuple[int, int]


class YOLOv5(nn.Module):
    """YOLOv5 with the anchor head. Satisfies DenseDetector.

    The gains weight the loss terms; the defaults are the released recipe's, which makes two of them depend on the task:
    obj_gain is multiplied by H W / 640^2, cls_gain by K / 80.

    requested_outputs: the names of the features and logits that the caller reads, or None for all: as in
    AnchorFreeDetector.
    """

    class_activation = "sigmoid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        depths: tuple[int, ...],
        neck_depth: int,
        num_classes: int,
        box_gain: float = 0.05,
        obj_gain: float = 1.0,
        cls_gain: float = 0.5,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(channels, depths)
        self.neck = Neck(channels, neck_depth)
        self.head = AnchorHead(channels[2:], num_classes)
        self.num_classes = num_classes
        self.strides = dict(FEATURE_STRIDES)
        self.channels = dict(zip(FEATURE_STRIDES, channels[2:] * 2))
        self.public_names = YOLOV5_NAMES
        self.public_layouts = (PublicLayout("released", YOLOV5_NAMES, join_anchors),)
        self.class_head = ("head.predict.",)  # one convolution predicts boxes, objectness and classes
        self.class_rows = (ClassRows("head.predict.{}.", groups=NUM_ANCHORS, shared=5),)
        self.requested_outputs: frozenset[str] | None = None
        self.box_gain, self.obj_gain, self.cls_gain = box_gain, obj_gain, cls_gain

    def forward(self, images: Tensor) -> YOLOv5Output:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of 32, else ValueError."""
        image_size = check_image_size(images)
        features = self.backbone(images)
        box = objectness = classes = None
        if is_requested(self.requested_outputs, NECK_MAPS | HEAD_NAMES):
            features |= self.neck(features)
        if is_requested(self.requested_outputs, HEAD_NAMES):
            box, objectness, classes = self.head([features["p3"], features["p4"], features["p5"]])
        return YOLOv5Output(features, box, objectness, classes, image_size)

    def tail(self, name: str) -> nn.Sequential:
        """KeyError for every name: a head of one convolution has no map within (AnchorFreeDetector.tail)."""
        raise KeyError(f"{name!r} is no map within the head: the anchor head of YOLOv5 has none")

    def anchors_pixels(self) -> Tensor:
        """(3 levels, 3 anchors, 2) widths and heights in pixels, float32."""
        anchors = at_least_float32(self.head.anchors)
        return anchors * anchors.new_tensor(LEVEL_STRIDES)[:, None, None]

    def anchors_at(self, name: str) -> Tensor:
        """(3, 2) widths and heights in pixels of the anchors at the stride of a map of `features`."""
        return self.anchors_pixels()[LEVEL_STRIDES.index(self.strides[name])]

    def _locations(self, output: YOLOv5Output) -> tuple[Tensor, Tensor, Tensor]:
        """Points (A, 2) in cells, strides (A, 1) and anchor sizes (A, 2) in pixels, in the order of the head."""
        return make_anchors(level_sizes(output.image_size), LEVEL_STRIDES, self.anchors_pixels())

    def decode(self, output: YOLOv5Output) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, A, 4) in pixels, not clipped to the image, and scores (B, A, K) = objectness * class."""
        boxes_xyxy = decode_anchor_offsets(at_least_float32(output.box_logits), *self._locations(output))
        objectness = at_least_float32(output.objectness_logits).sigmoid()
        return boxes_xyxy, objectness[..., None] * at_least_float32(output.class_logits).sigmoid()

    def losses(self, output: YOLOv5Output, targets: Targets) -> dict[str, Tensor]:
        """box (CIoU), obj and cls (BCE), weighted by the gains: see losses.yolov5_losses. float32 under autocast."""
        height, width = output.image_size
        return yolov5_losses(
            box_logits=output.box_logits,
            objectness_logits=output.objectness_logits,
            class_logits=output.class_logits,
            grid_sizes=level_sizes(output.image_size),
            strides=LEVEL_STRIDES,
            anchors=self.anchors_pixels(),
            targets=targets,
            box_gain=self.box_gain,
            obj_gain=self.obj_gain * height * width / 640**2,
            cls_gain=self.cls_gain * self.num_classes / 80,
        )

    def positives(self, output: YOLOv5Output, targets: Targets) -> Tensor:
        """(B, A) int64: the row of `targets` that `losses` assigns to each pair of anchor and cell, or -1. No gradient.

        Anchors choose by their shape alone, whatever `output` predicts. All objects that share a location teach it box
        and class; this is the row whose overlap it learns as objectness (assigners.last_match).
        """
        assignment = yolov5_assignment(
            box_logits=output.box_logits,
            class_logits=output.class_logits,
            grid_sizes=level_sizes(output.image_size),
            strides=LEVEL_STRIDES,
            anchors=self.anchors_pixels(),
            targets=targets,
        )
        return assignment.gt_index

    @torch.no_grad()
    def detect(
        self, output: YOLOv5Output, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """Decoded locations after class-wise NMS, best first; a location may report several classes."""
        return select_detections(
            *self.decode(output),
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    def location_logits(self, output: YOLOv5Output) -> Tensor:
        """(B, A, K), what class_logits_at says at each location: objectness and class, at least in float32.

        `output.class_logits` mean something else: the class of a location, given that it holds an object.
        """
        return joint_logits(
            at_least_float32(output.objectness_logits)[..., None], at_least_float32(output.class_logits)
        )

    def class_logits_at(self, output: YOLOv5Output, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, K) logits, by the rule of taps.logits_at_boxes.

        Objectness is included (joint_logits): each is the log-odds of "here is an object of class k", as
        distill/losses/box_classes.py takes them of any sigmoid head, and their sigmoid is comparable to a score of
        `decode`.
        """
        with torch.no_grad():
            decoded_xyxy, _ = self.decode(output)
            points, strides, _ = self._locations(output)
        logits, centers = self.location_logits(output), points * strides
        return logits_at_boxes(logits, decoded_xyxy=decoded_xyxy, centers=centers, boxes_per_image=boxes_per_image)


def join_anchors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released names with one entry of anchors, `model.24.anchors` (3, 3, 2) in cells.

    Files that were written by release 6.0 and before have the anchors twice: `anchors` in cells, and `anchor_grid` in
    pixels, (3, 1, 3, 1, 1, 2). Either may lack, and each may have any shape of these 18 numbers. KeyError where the two
    differ by more than half precision explains, or where there are not 18.
    """
    name, pixels_name = "model.24.anchors", "model.24.anchor_grid"
    if pixels_name not in state and (name not in state or state[name].shape == (3, NUM_ANCHORS, 2)):
        return state
    found = {key: state[key].flatten() for key in (name, pixels_name) if key in state}
    for key, values in found.items():
        if len(values) != 6 * NUM_ANCHORS or not values.is_floating_point():
            raise KeyError(f"{key!r} is {tuple(state[key].shape)} {state[key].dtype}, expected (3, {NUM_ANCHORS}, 2)")
    strides = torch.tensor(LEVEL_STRIDES).view(3, 1, 1)
    anchors = {key: values.float().view(3, NUM_ANCHORS, 2) for key, values in found.items()}
    if pixels_name in anchors:
        anchors[pixels_name] = anchors[pixels_name] / strides
    if len(anchors) == 2 and not torch.allclose(anchors[name], anchors[pixels_name], rtol=4e-3):
        raise KeyError(f"{name!r} in cells and {pixels_name!r} in pixels are not the same anchors")
    rest = {key: value for key, value in state.items() if key not in found}
    return rest | {name: next(iter(anchors.values()))}


def build_yolov5(size: str, num_classes: int) -> YOLOv5:
    """A freshly initialised YOLOv5 with anchors; size is a key of SIZES. Draws from torch's global generator."""
    return YOLOv5(**SIZES[size]._asdict(), num_classes=num_classes)


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
