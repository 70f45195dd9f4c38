"""Guess a released model by names and shapes, for messages and `python -m weights inspect`."""

import re

YOLO_SIZES = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # by the channels of the first convolution
CLIP_SIZES = {3: "rn", 14: "vit_l14", 16: "vit_b16", 32: "vit_b32"}  # by the side of a patch
DINOV2_SIZES = {384: "vits14", 768: "vitb14", 1024: "vitl14", 1536: "vitg14"}  # by the width of a token
SIZES = CLIP_SIZES | DINOV2_SIZES  # by the last dimension of the first name of a row
# fmt: off
FAMILIES = [  # names that must all be there -> the model; the first row that fits counts
    (("model.0.stem1.conv.weight", "model.28.dec_score_head.0.weight"), "rtdetr-l (Ultralytics)"),
    (("model.0.stem1.conv.weight", "model.32.dec_score_head.0.weight"), "rtdetr-x (Ultralytics)"),
    (("decoder.dec_score_head.0.weight", "backbone.res_layers.2.blocks.22.branch2c.conv.weight"), "rtdetr_r101vd"),
    (("decoder.dec_score_head.0.weight", "backbone.res_layers.2.blocks.5.branch2c.conv.weight"), "rtdetr_r50vd"),
    (("decoder.dec_score_head.0.weight", "backbone.res_layers.2.blocks.5.branch2b.conv.weight"), "rtdetr_r34vd"),
    (("decoder.dec_score_head.0.weight", "backbone.res_layers.2.blocks.1.branch2b.conv.weight"), "rtdetr_r18vd"),
    (("decoder.dec_score_head.0.weight", "backbone.conv1.conv1_1.conv.weight"), "rtdetr (authors' layout)"),
    (("model.decoder.class_embed.0.weight", "model.backbone.model.embedder.embedder.0.convolution.weight"),
     "rtdetr (Hugging Face layout)"),
    (("model.0.conv.conv.weight",), "yolov5 before release 6 (Focus stem)"),
    (("model.0.conv.weight", "model.77.m.0.weight"), "yolov7-tiny"),
    (("roi_heads.box_predictor.cls_score.weight", "backbone.fpn.layer_blocks.0.1.weight"),
     "fasterrcnn_resnet50_fpn_v2"),
    (("roi_heads.box_predictor.cls_score.weight", "backbone.body.conv1.weight"), "fasterrcnn_resnet50_fpn"),
    (("roi_heads.box_predictor.cls_score.weight", "backbone.body.0.0.weight"), "fasterrcnn_mobilenet_v3_large_fpn"),
    (("conv1.weight", "layer3.22.conv3.weight"), "resnet101"),
    (("conv1.weight", "layer3.5.conv3.weight"), "resnet50"),
    (("conv1.weight", "layer3.5.conv2.weight"), "resnet34"),
    (("conv1.weight", "layer4.1.conv2.weight"), "resnet18"),
    (("features.0.0.weight", "features.16.0.weight", "classifier.3.weight"), "mobilenet_v3_large"),
    (("features.0.0.weight", "features.12.0.weight", "classifier.3.weight"), "mobilenet_v3_small"),
    (("blocks.0.ls1.gamma", "register_tokens"), "dinov2_{size}_reg"),
    (("blocks.0.ls1.gamma",), "dinov2_{size}"),
    (("encoder.layer.0.layer_scale1.lambda1", "embeddings.register_tokens"), "dinov2_{size}_reg (Hugging Face layout)"),
    (("encoder.layer.0.layer_scale1.lambda1",), "dinov2_{size} (Hugging Face layout)"),
    (("visual.conv1.weight", "text_projection"), "clip_{size}"),
    (("vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layrnorm.weight", "visual_projection.weight"),
     "clip_{size} (Hugging Face layout)"),
    (("cls_token", "pos_embed", "head.weight"), "vit or deit"),
]
# fmt: on

ARCHITECTURES = {  # families whose architecture has another name here; a released file fits the architecture alone
    "fasterrcnn_resnet50_fpn": "fasterrcnn_resnet50",
    "fasterrcnn_resnet50_fpn_v2": "fasterrcnn_resnet50_v2",
    "rtdetr-l (Ultralytics)": "rtdetr_l",
    "rtdetr-x (Ultralytics)": "rtdetr_x",
    "yolov7-tiny": "yolov7_tiny",
}
AMBIGUOUS = ("fasterrcnn_mobilenet_v3_large_fpn",)  # with the 320 px model, which differs in its proposals alone


def arch_of_family(family: str | None) -> str | None:
    """The name in models.ARCHITECTURES or TEACHERS of what guess_family returned; None where it is open."""
    name = ARCHITECTURES.get(str(family), str(family).removesuffix(" (Hugging Face layout)"))
    return name if family and name.isidentifier() and name not in (*AMBIGUOUS, "rtdetr") else None


def guess_family(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The model that released names and shapes look like, such as "yolov8n"; None where nothing is recognised."""
    stem = shapes.get("model.0.conv.weight", ())
    if len(stem) == 4 and stem[1] == 3:
        size = YOLO_SIZES.get(stem[0], "?")
        if stem[2] == 6 and "model.24.m.0.weight" in shapes:
            return f"yolov5{size}" + ("-seg" if "model.24.proto.cv1.conv.weight" in shapes else "")
        if stem[2] == 6 and "model.24.cv2.0.0.conv.weight" in shapes:
            return f"yolov5{size}u"
        if stem[2] == 3 and "model.22.cv2.0.0.conv.weight" in shapes:
            is_segment, has_fourth = (
                "model.22.proto.cv1.conv.weight" in shapes,
                "model.22.cv4.0.0.conv.weight" in shapes,
            )
            return f"yolov8{size}" + ("-seg" if is_segment else "-pose or -obb" if has_fourth else "")
        if stem[2] == 3 and "model.9.linear.weight" in shapes:
            return f"yolov8{size}-cls"
        heads = [match[1] for name in shapes if (match := re.match(r"model\.(\d+)\.cv2\.0\.0\.conv\.weight", name))]
        if heads:
            return f"another Ultralytics YOLO (its head is layer {heads[-1]})"
    for names, family in FAMILIES:
        if all(name in shapes for name in names):
            shape = shapes[names[0]]
            return family.format(size=SIZES.get(shape[-1], "?") if shape else "?")
    return None
