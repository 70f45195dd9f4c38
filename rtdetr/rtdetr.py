"""RT-DETR L, X, R18 and R50, a detector without non-maximum suppression.

Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", arXiv:2304.08069.

    images ── backbone ── c3, c4, c5 ── hybrid encoder ── p3, p4, p5 ── decoder ── Q boxes and their class logits

Backbones: rtdetr/hgnetv2.py (L, X; released by Ultralytics) and rtdetr/resnet_vd.py (R18, R50; the authors' PyTorch
weights). What it learns: matching.py, losses.py, denoising.py.

It does not learn from scratch on small data: the authors advise against it (their issue 382), and others report an AP
of 0 after a whole schedule. It needs released weights to start from, or very many pictures.

Differs from the released code in form, not in results for images of at least 128x128 pixels: `forward` returns the same
in train and eval mode, a smaller image (fewer cells than queries) gets as many queries as cells, and boxes are float32
under autocast. H and W may be any multiples of 32; the released weights were trained at 640x640.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from boxes import box_iou, cxcywh_to_xyxy
from layers.precision import at_least_float32, in_precision_of
from rtdetr.decoder import Decoded, Decoder, map_sizes
from rtdetr.denoising import NoisyObjects, make_noisy_objects
from rtdetr.encoder import HybridEncoder
from rtdetr.hgnetv2 import HGNetV2
from rtdetr.losses import class_shares, is_in_ignored, object_count, query_losses, to_fractions
from rtdetr.matching import match_queries
from rtdetr.names import RTDETR_L_NAMES, RTDETR_X_NAMES, authors_layout
from rtdetr.resnet_vd import ResNetVD
from structures import FOR_LOSSES, SIZE_MULTIPLE, Detections, Targets, image_size_of
from weights import ClassRows, PublicLayout

FEATURE_STRIDES = {"c3": 8, "c4": 16, "c5": 32, "p3": 8, "p4": 16, "p5": 32}
LEVELS = ("p3", "p4", "p5")
DECODER_PARTS = frozenset({"boxes_xyxy", "query_logits"})
IOU_POWER = 6.0  # see read_best_query


class Size(NamedTuple):
    """width, hidden, feedforward: of HybridEncoder. num_layers: of Decoder.

    batchnorm_eps: the epsilon that the released models were trained with; a state dict does not hold it.
    """

    width: int
    hidden: int
    feedforward: int
    num_layers: int
    batchnorm_eps: float


SIZES = {
    "l": Size(width=256, hidden=256, feedforward=1024, num_layers=6, batchnorm_eps=1e-3),
    "x": Size(width=384, hidden=384, feedforward=2048, num_layers=6, batchnorm_eps=1e-3),
    "r18vd": Size(width=256, hidden=128, feedforward=1024, num_layers=3, batchnorm_eps=1e-5),
    "r50vd": Size(width=256, hidden=256, feedforward=1024, num_layers=6, batchnorm_eps=1e-5),
}


@dataclass(frozen=True)
class RTDETROutput:
    """The output of RTDETR.forward for images (B, 3, H, W), the same in train and eval mode.

    features: maps (B, C, H / s, W / s) by name: c3, c4, c5 (backbone) and p3, p4, p5 (encoder).
    boxes_xyxy (B, Q, 4) in pixels, not clipped to the image, query_logits (B, Q, K): from the last decoder layer, with
        the queries in the order of their selection.
    image_size: (H, W).
    memory (B, S, D), layer_inputs (B, L, Q, D), layer_boxes (B, 1 + L, Q, 4), layer_logits (B, 1 + L, Q, K): what the
        losses need besides (decoder.Decoded).
    The tensors of the decoder are None if RTDETR.requested_outputs leaves it out.
    """

    features: dict[str, Tensor]
    boxes_xyxy: Tensor | None
    query_logits: Tensor | None
    image_size: tuple[int, int]
    memory: Tensor | None = field(default=None, metadata=FOR_LOSSES)
    layer_inputs: Tensor | None = field(default=None, metadata=FOR_LOSSES)
    layer_boxes: Tensor | None = field(default=None, metadata=FOR_LOSSES)
    layer_logits: Tensor | None = field(default=None, metadata=FOR_LOSSES)

    def decoded(self) -> Decoded:
        """The decoder's output. ValueError if it was skipped."""
        if self.memory is None or self.layer_inputs is None or self.layer_boxes is None or self.layer_logits is None:
            raise ValueError("the output has no decoder layers: it was skipped, or the output comes from a cache")
        return Decoded(self.memory, self.layer_inputs, self.layer_boxes, self.layer_logits)


class RTDETR(nn.Module):
    """backbone -> hybrid encoder -> decoder. Satisfies structures.Detector.

    requested_outputs: names of the output's parts that the caller needs, or None for all. The decoder runs only if
        `boxes_xyxy` or `query_logits` is among them; a teacher used for its feature maps only skips it.
    backbone: images -> {"c3", "c4", "c5"}. width, hidden, feedforward: of HybridEncoder.
    """

    def __init__(
        self,
        *,
        backbone: HGNetV2 | ResNetVD,
        num_classes: int,
        width: int,
        hidden: int,
        feedforward: int,
        num_layers: int,
        batchnorm_eps: float,
        public_layout: PublicLayout,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = HybridEncoder(
            tuple(backbone.channels.values()), width=width, hidden=hidden, feedforward=feedforward
        )
        self.decoder = Decoder(in_channels=width, num_classes=num_classes, num_layers=num_layers)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = batchnorm_eps
        self.num_classes = num_classes
        self.strides = dict(FEATURE_STRIDES)
        self.channels = backbone.channels | {name: width for name in ("p3", "p4", "p5")}
        self.size_multiple = SIZE_MULTIPLE
        self.public_layouts = (public_layout,)
        self.public_names = public_layout.table
        self.class_head = ("decoder.candidate_class.", "decoder.class_heads.", "decoder.denoising_class.")
        self.class_rows = tuple(
            ClassRows(f"decoder.{layer}.") for layer in ("candidate_class", "class_heads.{}", "denoising_class")
        )
        self.class_activation = "sigmoid"
        self.is_twice_differentiable = False  # grid_sample, in the deformable attention, is not
        self.requested_outputs: frozenset[str] | None = None

    def forward(self, images: Tensor) -> RTDETROutput:
        """images (B, 3, H, W) in [0, 1], not normalised; H and W multiples of 32, else ValueError."""
        image_size = image_size_of(images)
        features = self.backbone(images)
        features = features | self.encoder(features)
        if self.requested_outputs is not None and not self.requested_outputs & DECODER_PARTS:
            return RTDETROutput(features, None, None, image_size)
        decoded = self.decoder([features[name] for name in LEVELS])
        height, width = image_size
        x1, y1, x2, y2 = cxcywh_to_xyxy(decoded.boxes[:, -1]).unbind(-1)
        # Side by side: torch.export would keep a tensor of the four sides as a constant.
        boxes_xyxy = torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=-1)
        return RTDETROutput(
            features,
            boxes_xyxy,
            decoded.logits[:, -1],
            image_size,
            decoded.memory,
            decoded.inputs,
            decoded.boxes,
            decoded.logits,
        )

    def losses(self, output: RTDETROutput, targets: Targets) -> dict[str, Tensor]:
        """vfl, l1 and giou of losses.query_losses, and the same of the denoising queries; float32 under autocast.

        vfl, l1, giou: the sums over the encoder's proposals and the decoder layers, each matched by itself.
        denoising_*: the sums over the decoder layers, divided by the number of groups as well.
        The noise comes from torch's global CPU generator.
        """
        decoded, objects = output.decoded(), targets.learnt()
        gt_boxes = to_fractions(objects.boxes_xyxy, output.image_size)
        where = dict(labels=objects.labels, gt_boxes=gt_boxes, image=objects.image)
        matches = match_queries(decoded.logits, decoded.boxes, **where)
        count = object_count(len(objects), gt_boxes)
        about = dict(gt_boxes=gt_boxes, classes=class_shares(objects, self.num_classes, gt_boxes.dtype))
        is_ignored = is_in_ignored(decoded.boxes, targets, output.image_size)
        losses = query_losses(decoded.logits, decoded.boxes, matches, **about, count=count, is_left_out=is_ignored)
        noisy = self.make_queries(output, targets, num_classes=self.num_classes)
        boxes, logits = self.decode_queries(output, noisy)
        denoised = query_losses(
            logits,
            boxes,
            noisy.matches_of_layers(boxes.shape[1]),
            **about,
            count=count * noisy.groups,
            is_left_out=~noisy.is_real[:, None].expand(boxes.shape[:3]),
        )
        return losses | {f"denoising_{name}": value for name, value in denoised.items()}

    def make_queries(self, output: RTDETROutput, targets: Targets, *, num_classes: int) -> NoisyObjects:
        """Denoising queries of the learnt objects; their labels are in 0..num_classes-1, before and after the noise.

        They hold nothing of this model, so another RT-DETR may decode them for the same images.
        """
        objects = targets.learnt()
        gt_boxes, num_images = to_fractions(objects.boxes_xyxy, output.image_size), len(output.decoded().memory)
        return make_noisy_objects(
            gt_boxes, objects.labels, objects.image, num_images=num_images, num_classes=num_classes
        )

    def decode_queries(self, output: RTDETROutput, noisy: NoisyObjects) -> tuple[Tensor, Tensor]:
        """Boxes (B, L, T, 4) cxcywh_norm and logits (B, L, T, K) of denoising queries, after each decoder layer."""
        decoded = output.decoded()
        with in_precision_of(decoded.memory):
            level_sizes = map_sizes([output.features[name] for name in LEVELS])
            return self.decoder.denoise(decoded, noisy, level_sizes)

    def decode(self, output: RTDETROutput) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, Q, 4) in pixels and scores (B, Q, K) = sigmoid(query_logits). ValueError without a decoder."""
        if output.boxes_xyxy is None or output.query_logits is None:
            requested = sorted(self.requested_outputs or ())
            raise ValueError(f"the decoder was skipped: requested_outputs is {requested}, without query_logits")
        return output.boxes_xyxy, at_least_float32(output.query_logits).sigmoid()

    @torch.no_grad()
    def detect(
        self, output: RTDETROutput, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """The best pairs (query, class) of each image, best first, ties by query and then class.

        A query may give detections of several classes. Nothing is suppressed, since training gives each object one
        query; iou_threshold is ignored and only there for the common signature.
        """
        del iou_threshold
        detections = []
        for boxes_xyxy, scores in zip(*self.decode(output)):
            pairs = (scores.flatten() > score_threshold).nonzero().squeeze(1)  # query * K + class; nan is never above
            order = scores.flatten()[pairs].sort(stable=True, descending=True).indices[:max_detections]
            query, labels = pairs[order] // scores.shape[1], pairs[order] % scores.shape[1]
            detections.append(Detections(boxes_xyxy[query], scores[query, labels], labels))
        return detections

    def class_logits_at(self, output: RTDETROutput, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, K) class logits, as read_best_query defines them."""
        boxes_xyxy, _ = self.decode(output)
        assert output.query_logits is not None  # or decode had raised
        return torch.cat(
            [
                read_best_query(z, query_xyxy=queries, boxes_xyxy=boxes)
                for z, queries, boxes in zip(
                    at_least_float32(output.query_logits), boxes_xyxy, boxes_per_image, strict=True
                )
            ]
        )


def read_best_query(logits: Tensor, *, query_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """The class logits of N given boxes in one image: logits (Q, K) -> (N, K). Each row is that of one query.

        out_n = z_q(n),    q(n) = argmax_q  IoU(query_q, box_n)^6 * max_k sigmoid(z_qk)

    This is the alignment metric of TOOD (arXiv:2108.07755) with exponents 6 and 1. Overlap decides; among queries with
    similar overlap the most confident one wins, because training pushes the scores of all but one query of an object to
    0. Each box chooses alone; two boxes may share a query. A box that no query overlaps gets, for each class, the
    lowest logit of all queries.

    query_xyxy (Q, 4) and boxes_xyxy (N, 4) are in pixels. The gradient flows into `logits`, not through the choice.
    N = 0 gives (0, K).
    """
    with torch.no_grad():
        iou = box_iou(boxes_xyxy.to(query_xyxy), query_xyxy)  # (N, Q)
        match = iou**IOU_POWER * logits.sigmoid().amax(1)
        best = match.argmax(1)  # (N,)
        has_overlap = (iou > 0).any(1, keepdim=True)  # (N, 1)
    return torch.where(has_overlap, logits[best], logits.amin(0))


def build_rtdetr(size: str, num_classes: int) -> RTDETR:
    """A freshly initialised RT-DETR; size is a key of SIZES. Draws from torch's global generator."""
    parts: dict[str, Callable[[], tuple[HGNetV2 | ResNetVD, PublicLayout]]] = {
        "l": lambda: (HGNetV2("l"), PublicLayout("Ultralytics", RTDETR_L_NAMES)),
        "x": lambda: (HGNetV2("x"), PublicLayout("Ultralytics", RTDETR_X_NAMES)),
        "r18vd": lambda: (ResNetVD(18), authors_layout(convolutions_per_block=2, narrow=True)),
        "r50vd": lambda: (ResNetVD(50), authors_layout(convolutions_per_block=3, narrow=False)),
    }
    backbone, public_layout = parts[size]()
    return RTDETR(backbone=backbone, num_classes=num_classes, public_layout=public_layout, **SIZES[size]._asdict())
