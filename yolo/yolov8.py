"""YOLOv8 n, s, m, l, x: an anchor-free, one-stage detector. There is no paper; the architecture is the released one.

    images ── backbone (C2f blocks, SPPF) ── c3, c4, c5 ── neck (PANet) ── p3, p4, p5 ── head ── box and class logits

Its parts: cross-stage partial blocks (CSPNet, arXiv:1911.11929), SPP (arXiv:1406.4729), a top-down and a bottom-up
path (FPN, arXiv:1612.03144; PANet, arXiv:1803.01534), one decoupled head per level (YOLOX, arXiv:2107.08430), box edges
as distributions (Generalized Focal Loss, arXiv:2006.04388). Losses and assigner: yolo/losses.py.

"p" is none of the released sizes: half as wide as n and less deep, for the matching networks of dataset distillation on
a few cores; it has no weights to load.

Differs from the released code, not in what it computes: the bins 0..R-1 are no parameter (losses.decode_distances
counts them), `forward` returns the same in train and eval mode, and sizes are written out instead of multiplied out.
Decoding and losses are float32 under autocast.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from boxes import box_iou
from kernels.nms import select_detections
from structures import Detections, Targets
from yolo.assigners import make_points
from yolo.layers import SPPF, Bottleneck, ConvBNAct, check_image_size, is_wanted, to_float, upsample
from yolo.losses import decode_distances, yolov8_assignment, yolov8_losses

LEVEL_STRIDES = (8, 16, 32)  # pixels, of p3, p4, p5
FEATURE_STRIDES = {"c3": 8, "c4": 16, "c5": 32, "p3": 8, "p4": 16, "p5": 32}
NECK_MAPS = frozenset({"p3", "p4", "p5"})
LEVELS = (3, 4, 5)
HEAD_MAPS = {  # name: branch, row of LEVEL_STRIDES, how many layers of the branch the map has passed
    f"{kind}{level}_{count}": (kind, row, count)
    for kind in ("box", "cls")
    for row, level in enumerate(LEVELS)
    for count in (1, 2)
}
HEAD_NAMES = frozenset({"box_logits", "class_logits", *HEAD_MAPS})
NUM_BINS = 16  # R: an edge is at most 15 strides away from its point

# channels: of the maps at stride 2, 4, 8, 16, 32. depths: bottlenecks in the stages at stride 4, 8, 16, 32.
SIZES = {
    "p": dict(channels=(8, 16, 32, 64, 128), depths=(1, 1, 1, 1), neck_depth=1),  # of ours
    "n": dict(channels=(16, 32, 64, 128, 256), depths=(1, 2, 2, 1), neck_depth=1),
    "s": dict(channels=(32, 64, 128, 256, 512), depths=(1, 2, 2, 1), neck_depth=1),
    "m": dict(channels=(48, 96, 192, 384, 576), depths=(2, 4, 4, 2), neck_depth=2),
    "l": dict(channels=(64, 128, 256, 512, 512), depths=(3, 6, 6, 3), neck_depth=3),
    "x": dict(channels=(80, 160, 320, 640, 640), depths=(3, 6, 6, 3), neck_depth=3),
}


class C2f(nn.Module):
    """Half of the channels go through `depth` bottlenecks in a row; every intermediate joins the final 1x1 merge."""

    def __init__(self, c_in: int, c_out: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.split = ConvBNAct(c_in, c_out)
        self.blocks = nn.ModuleList(Bottleneck(c_out // 2, (3, 3), shortcut) for _ in range(depth))
        self.merge = ConvBNAct((2 + depth) * (c_out // 2), c_out)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(x).chunk(2, dim=1))  # 2 of (B, C_out / 2, H, W)
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
    """c3, c4, c5 -> p3, p4, p5 of the same sizes and channels: coarse to fine, then fine to coarse again."""

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
    """Per location K class logits and 4 distributions over R distances, from two branches of convolutions per level.

    An edge distance, in units of the level's stride, is the expectation over the bins 0..R-1
    (Generalized Focal Loss, arXiv:2006.04388):  d = sum_r r * softmax(z)_r

    Fresh weights start from a prior: the class bias is log(5 / K / (640 / stride)^2), as if an image of 640 px held
    5 objects spread over K classes and the level's locations (the idea is RetinaNet's, arXiv:1708.02002, sec. 4.1), and
    every bin's bias is 1.
    """

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.widths = {
            "box": max(16, channels[0] // 4, 4 * NUM_BINS),
            "cls": max(channels[0], min(num_classes, 100)),
        }
        self.box = nn.ModuleList(branch(c, self.widths["box"], 4 * NUM_BINS) for c in channels)
        self.cls = nn.ModuleList(branch(c, self.widths["cls"], num_classes) for c in channels)
        for box, cls, stride in zip(self.box, self.cls, LEVEL_STRIDES):
            nn.init.constant_(box[-1].bias, 1.0)
            nn.init.constant_(cls[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))

    def forward(
        self, maps: list[Tensor], wanted: frozenset[str] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """maps (B, C_l, H_l, W_l) per level -> box_logits (B, A, 4, R), class_logits (B, A, K), A = sum_l H_l W_l.

        Locations run level by level, row by row; edges are left, top, right, bottom. The third result holds the maps
        within the branches that are `wanted` (None: all), by the names of HEAD_MAPS, (B, widths[branch], H_l, W_l).
        """
        logits, between = {"box": [], "cls": []}, {}
        for kind, per_level in logits.items():
            for level, branch_of_level, x in zip(LEVELS, getattr(self, kind), maps):
                *hidden, last = branch_of_level
                for count, layer in enumerate(hidden, start=1):
                    x = layer(x)
                    name = f"{kind}{level}_{count}"
                    if is_wanted(wanted, {name}):
                        between[name] = x
                # Channels go last before the levels are joined: in channels_last memory that is one straight copy.
                per_level.append(last(x).flatten(2).transpose(1, 2))  # (B, H_l W_l, 4R or K)
        box, cls = (torch.cat(per_level, dim=1) for per_level in logits.values())
        return box.unflatten(2, (4, NUM_BINS)), cls, between

    def tail(self, name: str) -> nn.Sequential:
        """What follows the map `name` in its branch: see AnchorFreeDetector.tail."""
        if name not in HEAD_MAPS:
            raise KeyError(f"{name!r} is no map within the head; those are {', '.join(HEAD_MAPS)}")
        kind, row, count = HEAD_MAPS[name]
        rest = getattr(self, kind)[row][count:]
        rest.training = self.training  # a slice is a new module around the same layers
        return rest


def branch(c_in: int, width: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(ConvBNAct(c_in, width, 3), ConvBNAct(width, width, 3), nn.Conv2d(width, c_out, 1))


def level_sizes(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """(H, W) in pixels -> (h, w) in cells of p3, p4, p5."""
    height, width = image_size
    return [(height // stride, width // stride) for stride in LEVEL_STRIDES]


def read_at_boxes(
    logits: Tensor, *, decoded_xyxy: Tensor, points: Tensor, boxes_xyxy: Tensor, locations: int = 10
) -> Tensor:
    """What the locations of one image say about N given boxes: logits (A, K) -> (N, K), a weighted mean of them.

        out_n = sum_a w_na z_a / sum_a w_na,    w_na = IoU(decoded_a, box_n) where point a lies in box n, else 0

    over the `locations` largest w_na alone (the assigner of the training loss takes as many). A box that no such
    location overlaps reads the point nearest to its center. decoded_xyxy (A, 4), points (A, 2) and boxes_xyxy (N, 4)
    are pixels; the gradient flows into `logits`, not through w. N = 0 gives (0, K).
    """
    with torch.no_grad():
        boxes_xyxy = boxes_xyxy.to(decoded_xyxy)
        x, y = points[:, 0], points[:, 1]
        x1, y1, x2, y2 = boxes_xyxy[:, :, None].unbind(1)  # (N, 1) each
        is_inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)  # (N, A)
        weight = box_iou(boxes_xyxy, decoded_xyxy) * is_inside  # (N, A)
        weight, index = weight.topk(min(locations, len(points)), dim=1)  # (N, k)
        centers = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        nearest = (centers[:, None] - points).square().sum(-1).argmin(1)  # (N,)
        is_unseen = weight[:, 0] == 0
        index[:, 0] = torch.where(is_unseen, nearest, index[:, 0])
        weight[:, 0] = torch.where(is_unseen, 1.0, weight[:, 0])
        weight = weight / weight.sum(1, keepdim=True)
    return (weight[:, :, None] * logits[index]).sum(1)  # (N, k, K) -> (N, K)


@dataclass(frozen=True)
class AnchorFreeOutput:
    """What AnchorFreeDetector.forward returns, in train and eval mode alike, for images (B, 3, H, W).

    features: c3, c4, c5 (backbone), p3, p4, p5 (neck, what the head reads), and the maps within the head's branches,
    box3_1 ... box5_2 and cls3_1 ... cls5_2: of the level, after that many of the branch's two 3x3 convolutions (with
    BatchNorm and activation). (B, C, H / s, W / s) each.
    box_logits (B, A, 4, R) and class_logits (B, A, K) as the head orders them; image_size is (H, W).
    Both logits are None, and maps are missing, where AnchorFreeDetector.wanted leaves them out.
    """

    features: dict[str, Tensor]
    box_logits: Tensor | None
    class_logits: Tensor | None
    image_size: tuple[int, int]


class AnchorFreeDetector(nn.Module):
    """backbone -> neck -> anchor-free head: YOLOv8, and YOLOv5u (yolo/yolov5.py). Satisfies DenseDetector.

    channels are the five of SIZES. The gains weight the loss terms; the defaults are the released recipe's.

    wanted: the names of the features and logits that the caller reads, or None for all of them. Of a teacher that only
    lends its maps, the head is not run (nor the neck, for maps of the backbone alone). Whatever is not named may be
    missing. A head that runs for one of its names gives both logits; decode, detect, losses, positives and
    class_logits_at need both.
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
        box_gain: float = 7.5,
        cls_gain: float = 0.5,
        dfl_gain: float = 1.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = AnchorFreeHead(channels[2:], num_classes)
        self.num_classes = num_classes
        self.strides = FEATURE_STRIDES | {name: LEVEL_STRIDES[row] for name, (_, row, _) in HEAD_MAPS.items()}
        self.channels = dict(zip(FEATURE_STRIDES, channels[2:] * 2))
        self.channels |= {name: self.head.widths[kind] for name, (kind, _, _) in HEAD_MAPS.items()}
        self.wanted: frozenset[str] | None = None
        self.public_names = public_names
        self.class_head = ("head.cls.",)
        self.box_gain, self.cls_gain, self.dfl_gain = box_gain, cls_gain, dfl_gain

    def forward(self, images: Tensor) -> AnchorFreeOutput:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of 32, else ValueError."""
        image_size = check_image_size(images)
        features = self.backbone(images)
        box_logits = class_logits = None
        if is_wanted(self.wanted, NECK_MAPS | HEAD_NAMES):
            features |= self.neck(features)
        if is_wanted(self.wanted, HEAD_NAMES):
            maps = [features["p3"], features["p4"], features["p5"]]
            box_logits, class_logits, between = self.head(maps, self.wanted)
            features |= between
        return AnchorFreeOutput(features, box_logits, class_logits, image_size)

    def tail(self, name: str) -> nn.Sequential:
        """What follows one of the maps within the head, "cls3_1" for instance, in its branch (for distill/crosskd.py).

        (B, C, H / s, W / s) -> (B, K, H / s, W / s) in a class branch, (B, 4 R, H / s, W / s) in a box branch, edge by
        edge: the logits of that level. The layers are the detector's own, not copies, in its train or eval mode as of
        now. KeyError for another name lists those there are.
        """
        return self.head.tail(name)

    def _locations(self, output: AnchorFreeOutput) -> tuple[Tensor, Tensor]:
        """Points (A, 2) in cells and strides (A, 1) in pixels, in the order of the head."""
        return make_points(level_sizes(output.image_size), LEVEL_STRIDES, output.box_logits.device)

    def decode(self, output: AnchorFreeOutput) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, A, 4) in pixels, not clipped to the image, and scores (B, A, K) = sigmoid(class_logits)."""
        boxes_xyxy = decode_distances(to_float(output.box_logits), *self._locations(output))
        return boxes_xyxy, to_float(output.class_logits).sigmoid()

    def losses(self, output: AnchorFreeOutput, targets: Targets) -> dict[str, Tensor]:
        """box (CIoU), cls (BCE) and dfl, weighted by the gains: see losses.yolov8_losses. float32 under autocast."""
        points, strides = self._locations(output)
        return yolov8_losses(
            box_logits=output.box_logits,
            class_logits=output.class_logits,
            points=points,
            strides=strides,
            targets=targets,
            box_gain=self.box_gain,
            cls_gain=self.cls_gain,
            dfl_gain=self.dfl_gain,
        )

    def positives(self, output: AnchorFreeOutput, targets: Targets) -> Tensor:
        """(B, A) int64: the row of `targets` that `losses` assigns to each location of the head, or -1. No gradient.

        The task-aligned assigner chooses by the predictions in `output`. A location that several objects choose belongs
        to the one its decoded box overlaps most (CIoU), of equal ones the lower row.
        """
        points, strides = self._locations(output)
        assignment = yolov8_assignment(
            box_logits=output.box_logits,
            class_logits=output.class_logits,
            points=points,
            strides=strides,
            targets=targets,
        )
        return assignment.gt_index

    @torch.no_grad()
    def detect(
        self, output: AnchorFreeOutput, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """Decoded locations after class-wise NMS, best first; a location may report several classes."""
        boxes_xyxy, scores = self.decode(output)
        return select_detections(
            boxes_xyxy,
            scores,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    def location_logits(self, output: AnchorFreeOutput) -> Tensor:
        """(B, A, K), what class_logits_at says at each location: the class logits, at least in float32."""
        return to_float(output.class_logits)

    def class_logits_at(self, output: AnchorFreeOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, K) class logits, by the rule of read_at_boxes.

        Each is the log-odds of "here is an object of class k"; their sigmoid is comparable to a score of `decode`.
        """
        with torch.no_grad():
            decoded_xyxy, _ = self.decode(output)
            points, strides = self._locations(output)
        logits = self.location_logits(output)
        return torch.cat(
            [
                read_at_boxes(z, decoded_xyxy=d, points=points * strides, boxes_xyxy=boxes_xyxy)
                for z, d, boxes_xyxy in zip(logits, decoded_xyxy, boxes_per_image, strict=True)
            ]
        )


# fmt: off
PUBLIC_NAMES = [  # each {} is one integer
    # released checkpoint       ours
    ("model.0.",                "backbone.stem."),
    ("model.1.",                "backbone.down2."),
    ("model.2.cv1.",            "backbone.stage2.split."),
    ("model.2.m.{}.cv{}.",      "backbone.stage2.blocks.{}.conv{}."),
    ("model.2.cv2.",            "backbone.stage2.merge."),
    ("model.3.",                "backbone.down3."),
    ("model.4.cv1.",            "backbone.stage3.split."),
    ("model.4.m.{}.cv{}.",      "backbone.stage3.blocks.{}.conv{}."),
    ("model.4.cv2.",            "backbone.stage3.merge."),
    ("model.5.",                "backbone.down4."),
    ("model.6.cv1.",            "backbone.stage4.split."),
    ("model.6.m.{}.cv{}.",      "backbone.stage4.blocks.{}.conv{}."),
    ("model.6.cv2.",            "backbone.stage4.merge."),
    ("model.7.",                "backbone.down5."),
    ("model.8.cv1.",            "backbone.stage5.split."),
    ("model.8.m.{}.cv{}.",      "backbone.stage5.blocks.{}.conv{}."),
    ("model.8.cv2.",            "backbone.stage5.merge."),
    ("model.9.cv1.",            "backbone.spp.reduce."),
    ("model.9.cv2.",            "backbone.spp.merge."),
    ("model.12.cv1.",           "neck.top_down4.split."),
    ("model.12.m.{}.cv{}.",     "neck.top_down4.blocks.{}.conv{}."),
    ("model.12.cv2.",           "neck.top_down4.merge."),
    ("model.15.cv1.",           "neck.top_down3.split."),
    ("model.15.m.{}.cv{}.",     "neck.top_down3.blocks.{}.conv{}."),
    ("model.15.cv2.",           "neck.top_down3.merge."),
    ("model.16.",               "neck.down3."),
    ("model.18.cv1.",           "neck.bottom_up4.split."),
    ("model.18.m.{}.cv{}.",     "neck.bottom_up4.blocks.{}.conv{}."),
    ("model.18.cv2.",           "neck.bottom_up4.merge."),
    ("model.19.",               "neck.down4."),
    ("model.21.cv1.",           "neck.bottom_up5.split."),
    ("model.21.m.{}.cv{}.",     "neck.bottom_up5.blocks.{}.conv{}."),
    ("model.21.cv2.",           "neck.bottom_up5.merge."),
    ("model.22.cv2.{}.{}.",     "head.box.{}.{}."),
    ("model.22.cv3.{}.{}.",     "head.cls.{}.{}."),
    ("model.22.dfl.",           None),  # constant 0..R-1, counted in losses.decode_distances
]
# fmt: on


def build_yolov8(size: str, num_classes: int) -> AnchorFreeDetector:
    """A freshly initialised YOLOv8; size is a key of SIZES. Draws from torch's global generator."""
    channels, depths, neck_depth = (SIZES[size][key] for key in ("channels", "depths", "neck_depth"))
    return AnchorFreeDetector(
        backbone=Backbone(channels, depths),
        neck=Neck(channels, neck_depth),
        channels=channels,
        num_classes=num_classes,
        public_names=PUBLIC_NAMES,
    )
