"""Faster R-CNN (Ren et al., arXiv:1506.01497) on a feature pyramid (Lin et al., arXiv:1612.03144): two stages.

    images ── normalise ── backbone ── c2..c5 ── pyramid ── p2..p6 ─┬─ region proposal network ── proposals
                                                                    └─ RoIAlign under them ── box head ── classes, boxes

Backbones: ResNet-18, -34, -50, MobileNetV3-Small and -Large, ViT-Tiny. The weights of torchvision's detectors load; the
tables of their names are at the end of the file.

`forward` stops before the second stage, because each caller needs other regions: `losses` samples proposals against the
targets, `detect` takes the best proposals, `predict_at` and `class_logits_at` take given boxes.

Differs from torchvision in form, not in results for the same input: the model does not resize images (torchvision
resizes the shorter side to 800 px, or 320 px for _320), and `forward` returns the same in train and eval mode.
Two deliberate differences: ignored objects are left out of the losses (matching.py), and the RPN's losses are computed
at the sampled anchors only.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Unpack

import torch
from torch import Tensor, nn

from frcnn.anchors import ROI_WEIGHTS, RPN_WEIGHTS, anchor_shapes, encode_boxes, place_anchors
from frcnn.fpn import FPN, Pyramid, fpn_names
from frcnn.heads import POOLED_SIZE, BoxHead, BoxPredictor, ConvBoxHead, select_boxes
from frcnn.losses import roi_losses, rpn_losses
from frcnn.matching import ImageTargets, match, sample, split_targets
from frcnn.mobilenet import MobileNetV3
from frcnn.norm import EPSILON, rescale_for_epsilon
from frcnn.pretrained import Backbone
from frcnn.resnet import ResNet
from frcnn.rpn import RPNHead, Selection, select_proposals
from frcnn.vit import SimpleFeaturePyramid, VisionTransformer
from kernels.roi_align import assign_levels, roi_align
from layers.precision import in_precision_of
from structures import OF_BATCH, SIZE_MULTIPLE, Detections, Targets, image_size_of
from weights import ClassRows, PublicLayout

PYRAMID_WIDTH = 256
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width
LEVEL_SIZES = ((32,), (64,), (128,), (256,), (512,))  # anchor sizes in pixels on p2..p6
ALL_SIZES = ((32, 64, 128, 256, 512),) * 3  # MobileNet has every size on each of p5_first, p5, p6
RPN_SAMPLES, RPN_POSITIVE_FRACTION = 256, 0.5  # anchors per image
ROI_SAMPLES, ROI_POSITIVE_FRACTION = 512, 0.25  # proposals per image; of a FasterRCNN `roi_samples`
TRAIN_CANDIDATES = TRAIN_PROPOSALS = 2000  # candidates per level, before suppression; proposals per image


@dataclass(frozen=True)
class FasterRCNNOutput:
    """The output of FasterRCNN.forward for images (B, 3, H, W), the same in train and eval mode.

    features: maps (B, C, H / s, W / s) by name, of the backbone ("c2", ...) and the pyramid ("p2", ..., "p6").
    objectness_logits (B, A), box_deltas (B, A, 4): of the region proposal network, in the order of anchors_xyxy.
    anchors_xyxy (A, 4): level by level and row by row (anchors.place_anchors).
    level_counts: number of anchors of each level.
    image_size: (H, W).
    selection: arguments of select_proposals in evaluation.
    proposals: for each image (N_b, 4) xyxy within it, best first, N_b <= 1000; the regions of `detect`. Computed at the
        first use, without gradient.
    """

    features: dict[str, Tensor]
    objectness_logits: Tensor
    box_deltas: Tensor
    anchors_xyxy: Tensor = field(metadata=OF_BATCH)
    level_counts: list[int]
    image_size: tuple[int, int]
    selection: Selection

    @cached_property
    def proposals(self) -> list[Tensor]:
        return self.select(**self.selection)

    def select(self, **selection: Unpack[Selection]) -> list[Tensor]:
        """rpn.select_proposals of this output with other counts."""
        return select_proposals(
            self.objectness_logits.detach(),
            self.box_deltas.detach(),
            self.anchors_xyxy,
            level_counts=self.level_counts,
            image_size=self.image_size,
            **selection,
        )


class FasterRCNN(nn.Module):
    """backbone -> pyramid -> region proposal network -> box head. Satisfies structures.Detector.

    Args:
        backbone: normalised images -> maps.
        pyramid: those maps -> levels of equal width. Only the region proposal network uses the last level, "p6".
        public_layouts: the layouts of released files, the most usual first.
        anchor_sizes: in pixels, for each level of the pyramid.
        rpn_depth, box_head: 1 and BoxHead as published, 2 and ConvBoxHead for the v2 form.
        eval_proposals: outside of training, candidates per level before suppression and proposals per image after it.
        min_objectness: proposals with a lower score are dropped, in training too.
        other_classes: of heads.BoxPredictor.
    """

    class_activation = "softmax"
    class_head = ("predictor.",)
    size_multiple = SIZE_MULTIPLE
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        pyramid: Pyramid,
        num_classes: int,
        public_layouts: tuple[PublicLayout, ...],
        anchor_sizes: tuple[tuple[int, ...], ...] = LEVEL_SIZES,
        rpn_depth: int = 1,
        box_head: type[nn.Module] = BoxHead,
        eval_proposals: int = 1000,
        min_objectness: float = 0.0,
        other_classes: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.rpn = RPNHead(PYRAMID_WIDTH, len(anchor_sizes[0]) * len(ASPECT_RATIOS), rpn_depth)
        self.box_head = box_head(PYRAMID_WIDTH)
        self.predictor = BoxPredictor(num_classes, other_classes)
        self.class_rows = (
            ClassRows("predictor.classify.", shared=1, others=other_classes, is_softmax=True),
            ClassRows("predictor.regress.", shared=4, each=4),
        )
        self.num_classes = num_classes
        self.strides = backbone.strides | pyramid.level_strides(backbone.strides)
        self.channels = backbone.channels | pyramid.channels
        self.levels = list(pyramid.channels)
        self.public_layouts = public_layouts
        self.public_names = public_layouts[0].table
        self.anchor_sizes = anchor_sizes
        self.train_selection = Selection(
            candidates=TRAIN_CANDIDATES, proposals=TRAIN_PROPOSALS, min_score=min_objectness
        )
        self.roi_samples = ROI_SAMPLES
        self.eval_selection = Selection(candidates=eval_proposals, proposals=eval_proposals, min_score=min_objectness)
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> FasterRCNNOutput:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of 32, else ValueError."""
        image_size = image_size_of(images)
        features = self.backbone((images - self.mean) / self.std)
        features |= self.pyramid(features)
        maps = [features[level] for level in self.levels]
        objectness_logits, box_deltas = self.rpn(maps)
        shapes = [anchor_shapes(sizes, ASPECT_RATIOS).to(images.device) for sizes in self.anchor_sizes]
        grids = [(m.shape[-2], m.shape[-1]) for m in maps]
        anchors_xyxy = place_anchors(shapes, grids, image_size)
        level_counts = [len(shape) * h * w for shape, (h, w) in zip(shapes, grids)]
        return FasterRCNNOutput(
            features, objectness_logits, box_deltas, anchors_xyxy, level_counts, image_size, self.eval_selection
        )

    def anchors_at(self, name: str) -> Tensor:
        """(n, 2): widths and heights in pixels of the anchors at the map `name` of `features`.

        They are those of the pyramid's level with that name, or else of a level with that stride. KeyError if there is
        no such level.
        """
        levels = [level for level in self.levels if self.strides[level] == self.strides[name]]
        if not levels:
            raise KeyError(f"{name!r} has the stride of no level with anchors, expected {', '.join(self.levels)}")
        level = name if name in levels else levels[0]
        shapes = anchor_shapes(self.anchor_sizes[self.levels.index(level)], ASPECT_RATIOS)  # (n, 4) about the origin
        return shapes[:, 2:] - shapes[:, :2]

    def predict_at(self, output: FasterRCNNOutput, boxes_per_image: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The second stage on B tensors (N_b, 4) of xyxy pixels: class_logits (N, 1 + K), box_deltas (N, 1 + K, 4).

        N = sum N_b, image by image; the background is in column 0. Gradients flow into the features, not the boxes.
        Runs in the precision of the maps, which is that of autocast if `forward` ran under it. ValueError if there are
        not B tensors.
        """
        if len(boxes_per_image) != len(output.objectness_logits):
            raise ValueError(f"boxes of {len(boxes_per_image)} images, expected {len(output.objectness_logits)} images")
        names = [level for level in self.levels if level != "p6"]
        maps, strides = [output.features[name] for name in names], [self.strides[name] for name in names]
        boxes_xyxy = torch.cat(boxes_per_image).to(output.anchors_xyxy)
        counts = torch.tensor([len(boxes) for boxes in boxes_per_image], device=boxes_xyxy.device)
        image = torch.repeat_interleave(counts, output_size=len(boxes_xyxy))
        level = assign_levels(boxes_xyxy, strides)
        with in_precision_of(maps[0]):
            pooled = roi_align(maps, boxes_xyxy, image, level, strides=strides, output_size=POOLED_SIZE)
            return self.predictor(self.box_head(pooled))

    def class_logits_at(self, output: FasterRCNNOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, 1 + K) logits, the background in column 0."""
        return self.predict_at(output, boxes_per_image)[0]

    @torch.no_grad()
    def detect(
        self, output: FasterRCNNOutput, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """The classes and boxes of the proposals after class-wise NMS, best first. Published: 0.05, 0.5 and 100."""
        counts = [len(boxes) for boxes in output.proposals]
        class_logits, box_deltas = self.predict_at(output, output.proposals)
        return [
            select_boxes(
                logits,
                deltas,
                boxes_xyxy,
                image_size=output.image_size,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
            )
            for boxes_xyxy, logits, deltas in zip(
                output.proposals, class_logits.split(counts), box_deltas.split(counts)
            )
        ]

    def losses(self, output: FasterRCNNOutput, targets: Targets) -> dict[str, Tensor]:
        """rpn_objectness, rpn_box, roi_class and roi_box (losses.py), all with weight 1, float32 under autocast.

        They are means over the samples of all images: 256 anchors per image, at most half of them positive, and
        `roi_samples` (512) proposals and objects per image, at most a quarter positive. matching.sample draws them
        from torch's global CPU generator. ValueError for an object of an image that the batch does not have: it would
        be left out.
        """
        num_images = len(output.objectness_logits)
        if ((targets.image < 0) | (targets.image >= num_images)).any():
            raise ValueError(f"targets: image is {targets.image.tolist()}, expected 0..{num_images - 1}")
        per_image = [split_targets(targets, image) for image in range(num_images)]
        return self._rpn_losses(output, per_image) | self._roi_losses(output, per_image)

    def _rpn_losses(self, output: FasterRCNNOutput, per_image: list[ImageTargets]) -> dict[str, Tensor]:
        """Sample anchors of each image, run the network at these alone, and compare them with their objects."""
        anchors_xyxy, rows = output.anchors_xyxy, []
        for b, own in enumerate(per_image):
            matched = match(
                anchors_xyxy, own.objects_xyxy, own.ignored_xyxy, positive_iou=0.7, negative_iou=0.3, every_object=True
            )
            positives, background = sample(matched, RPN_SAMPLES, RPN_POSITIVE_FRACTION)
            anchor = torch.cat((positives, background))
            is_positive = matched[anchor] >= 0
            target = encode_boxes(own.objects_xyxy[matched[positives]], anchors_xyxy[positives], RPN_WEIGHTS)
            rows.append((torch.full_like(anchor, b), anchor, is_positive, target))
        image, anchor, is_positive, target_deltas = (torch.cat(column) for column in zip(*rows))
        maps = [output.features[level] for level in self.levels]
        with in_precision_of(maps[0]):
            logits, deltas = self.rpn.at(maps, image, anchor)
        objectness, box = rpn_losses(
            objectness_logits=logits,
            is_positive=is_positive,
            box_deltas=deltas[is_positive],
            target_deltas=target_deltas,
        )
        return {"rpn_objectness": objectness, "rpn_box": box}

    def _roi_losses(self, output: FasterRCNNOutput, per_image: list[ImageTargets]) -> dict[str, Tensor]:
        """Sample proposals of each image, run the second stage on these, and compare them with their objects."""
        sampled_xyxy, sampled_labels, target_deltas, class_scores = [], [], [], []  # of each image
        for proposals, own in zip(output.select(**self.train_selection), per_image):
            objects_xyxy = own.objects_xyxy.to(proposals)
            boxes_xyxy = torch.cat((proposals, objects_xyxy))  # the objects are proposals too
            matched = match(
                boxes_xyxy, objects_xyxy, own.ignored_xyxy, positive_iou=0.5, negative_iou=0.5, every_object=False
            )
            positives, background = sample(matched, self.roi_samples, ROI_POSITIVE_FRACTION)
            learnt = matched[positives]  # the object of each positive
            sampled_xyxy.append(boxes_xyxy[torch.cat((positives, background))])
            sampled_labels.append(torch.cat((1 + own.labels[learnt], torch.zeros_like(background))))
            target_deltas.append(encode_boxes(objects_xyxy[learnt], boxes_xyxy[positives], ROI_WEIGHTS))
            if own.class_scores is not None:
                class_scores.append(own.class_scores[learnt])
        class_logits, box_deltas = self.predict_at(output, sampled_xyxy)
        labels = torch.cat(sampled_labels)
        positive = labels.nonzero().squeeze(1)
        classes, box = roi_losses(
            class_logits=class_logits,
            labels=labels,
            box_deltas=box_deltas[positive, labels[positive]],
            target_deltas=torch.cat(target_deltas),
            class_scores=torch.cat(class_scores) if class_scores else None,
        )
        return {"roi_class": classes, "roi_box": box}


def build_fasterrcnn_resnet(depth: int, num_classes: int, *, other_classes: int = 0) -> FasterRCNN:
    """Faster R-CNN on ResNet-18, -34 or -50, as torchvision's fasterrcnn_resnet50_fpn."""
    backbone = ResNet(depth)
    file_epsilon = 0.0 if depth == 50 else EPSILON
    return build_with_fpn(
        backbone, backbone.channels, num_classes, file_epsilon=file_epsilon, other_classes=other_classes
    )


def build_fasterrcnn_resnet50_v2(num_classes: int, *, other_classes: int = 0) -> FasterRCNN:
    """torchvision's fasterrcnn_resnet50_fpn_v2: ResNet-50, BatchNorm in pyramid and box head, a deeper RPN."""
    backbone = ResNet(50)
    fpn_rows = fpn_names(backbone.channels, norm=True)
    names = torchvision_names(backbone, fpn_rows, [*RPN_NAMES, RPN_SECOND, *CONV_BOX_HEAD_NAMES, *PREDICTOR_NAMES])
    return FasterRCNN(
        backbone=backbone,
        pyramid=FPN(backbone.channels, norm=True),
        num_classes=num_classes,
        public_layouts=(PublicLayout("torchvision", names),),
        rpn_depth=2,
        box_head=ConvBoxHead,
        other_classes=other_classes,
    )


def build_fasterrcnn_mobilenet(
    size: str, num_classes: int, *, eval_proposals: int = 1000, other_classes: int = 0
) -> FasterRCNN:
    """torchvision's fasterrcnn_mobilenet_v3_large_fpn on MobileNetV3 "small" or "large": two levels at stride 32.

    fasterrcnn_mobilenet_v3_large_320_fpn is the same network with 150 proposals, for images of 320 px.
    """
    backbone = MobileNetV3(size)
    in_channels = {name: backbone.channels[name] for name in ("c5_first", "c5")}
    return build_with_fpn(
        backbone,
        in_channels,
        num_classes,
        file_epsilon=EPSILON,
        anchor_sizes=ALL_SIZES,
        eval_proposals=eval_proposals,
        min_objectness=0.05,
        other_classes=other_classes,
    )


def build_fasterrcnn_vit_tiny(num_classes: int, *, other_classes: int = 0) -> FasterRCNN:
    """Faster R-CNN on ViT-Tiny with ViTDet's simple feature pyramid. Nobody released weights of it; it reads ours."""
    backbone = VisionTransformer("tiny")
    names = [(f"{part}.", f"{part}.") for part in ("backbone", "pyramid", "rpn", "box_head", "predictor")]
    return FasterRCNN(
        backbone=backbone,
        pyramid=SimpleFeaturePyramid(backbone.channels),
        num_classes=num_classes,
        public_layouts=(PublicLayout("ours", names),),
        other_classes=other_classes,
    )


def build_with_fpn(
    backbone: Backbone, in_channels: dict[str, int], num_classes: int, *, file_epsilon: float, **options
) -> FasterRCNN:
    """Faster R-CNN with a plain FPN on the maps `in_channels` of the backbone.

    file_epsilon: the epsilon of the frozen BatchNorms in torchvision's files.
    """
    head_names = [*BOX_HEAD_NAMES, *PREDICTOR_NAMES]
    names = torchvision_names(backbone, fpn_names(in_channels, norm=False), [*RPN_NAMES, *head_names])
    old_fpn_rows = fpn_names(in_channels, norm=False, version=1)
    old_names = torchvision_names(backbone, old_fpn_rows, [*RPN_NAMES_BEFORE_VERSION_2, *head_names])
    convert = partial(rescale_frozen, file_epsilon=file_epsilon)
    return FasterRCNN(
        backbone=backbone,
        pyramid=FPN(in_channels),
        num_classes=num_classes,
        public_layouts=(
            PublicLayout("torchvision", names),
            PublicLayout("torchvision before version 2", old_names, convert),
        ),
        **options,
    )


def rescale_frozen(state: dict[str, Tensor], *, file_epsilon: float) -> dict[str, Tensor]:
    """norm.rescale_for_epsilon for a file with frozen BatchNorms, which have no counters of batches.

    fasterrcnn_resnet50_fpn_coco-258fb6c6.pth was trained without an epsilon.
    """
    if file_epsilon == EPSILON or any(name.endswith("num_batches_tracked") for name in state):
        return state
    return rescale_for_epsilon(state, file_epsilon=file_epsilon, epsilon=EPSILON)


def torchvision_names(
    backbone: Backbone, fpn_rows: list[tuple[str, str]], head_rows: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The table of a whole detector: the rows of backbone and pyramid with their prefixes, then those of the heads."""
    # In torchvision's detectors MobileNet has no prefix `features`.
    backbone_rows = [(old.removeprefix("features."), new) for old, new in backbone.public_names]
    return [
        *((f"backbone.body.{old}", f"backbone.{new}") for old, new in backbone_rows),
        *((f"backbone.fpn.{old}", f"pyramid.{new}") for old, new in fpn_rows),
        *head_rows,
    ]


# fmt: off
RPN_NAMES = [
    # torchvision                       ours
    ("rpn.head.conv.0.0.",              "rpn.convs.0."),
    ("rpn.head.cls_logits.",            "rpn.objectness."),
    ("rpn.head.bbox_pred.",             "rpn.deltas."),
]
RPN_SECOND = ("rpn.head.conv.1.0.",     "rpn.convs.1.")
RPN_NAMES_BEFORE_VERSION_2 = [
    ("rpn.head.conv.",                  "rpn.convs.0."),
    *RPN_NAMES[1:],
]
BOX_HEAD_NAMES = [
    ("roi_heads.box_head.fc6.",         "box_head.fc6."),
    ("roi_heads.box_head.fc7.",         "box_head.fc7."),
]
CONV_BOX_HEAD_NAMES = [
    ("roi_heads.box_head.{}.0.",        "box_head.convs.{}.conv."),
    ("roi_heads.box_head.{}.1.",        "box_head.convs.{}.norm."),
    ("roi_heads.box_head.5.",           "box_head.fc."),
]
PREDICTOR_NAMES = [
    ("roi_heads.box_predictor.cls_score.", "predictor.classify."),
    ("roi_heads.box_predictor.bbox_pred.", "predictor.regress."),
]
# fmt: on
