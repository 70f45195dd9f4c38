"""The names of RT-DETR's released weights, each with our name.

There is a table for each of Ultralytics' models and for each backbone depth of the authors' models. weights.rename
applies them: exactly one row must claim each released name.
"""

from functools import partial

from torch import Tensor

from weights import PublicLayout


# fmt: off
def _encoder_block(theirs: str, ours: str) -> list[tuple[str, str | None]]:
    """A fusion block in Ultralytics' names; these models have no narrow blocks with a last convolution."""
    return [
        (f"{theirs}.cv1.",              f"encoder.{ours}.enter."),
        (f"{theirs}.cv2.",              f"encoder.{ours}.bypass."),
        (f"{theirs}.m.{{}}.conv1.",     f"encoder.{ours}.blocks.{{}}.conv3x3."),
        (f"{theirs}.m.{{}}.conv2.",     f"encoder.{ours}.blocks.{{}}.conv1x1."),
    ]


def _plain_block(theirs: str, ours: str) -> list[tuple[str, str | None]]:
    """A backbone block of full convolutions in Ultralytics' names."""
    return [
        (f"{theirs}.m.{{}}.",           f"backbone.stages.{ours}.layers.{{}}."),
        (f"{theirs}.sc.",               f"backbone.stages.{ours}.squeeze."),
        (f"{theirs}.ec.",               f"backbone.stages.{ours}.widen."),
    ]


def _light_block(theirs: str, ours: str) -> list[tuple[str, str | None]]:
    """A backbone block of light convolutions in Ultralytics' names."""
    return [
        (f"{theirs}.m.{{}}.conv1.",     f"backbone.stages.{ours}.layers.{{}}.pointwise."),
        (f"{theirs}.m.{{}}.conv2.",     f"backbone.stages.{ours}.layers.{{}}.depthwise."),
        (f"{theirs}.sc.",               f"backbone.stages.{ours}.squeeze."),
        (f"{theirs}.ec.",               f"backbone.stages.{ours}.widen."),
    ]


def _decoder(theirs: str) -> list[tuple[str, str | None]]:
    """The rows that both publishers share: the decoder without the 1x1 convolutions in front of it."""
    layer, ours = f"{theirs}.decoder.layers.{{}}", "decoder.layers.{}"
    return [
        (f"{layer}.self_attn.",                     f"{ours}.self_attention."),
        (f"{layer}.norm1.",                         f"{ours}.self_norm."),
        (f"{layer}.cross_attn.sampling_offsets.",   f"{ours}.cross_attention.offsets."),
        (f"{layer}.cross_attn.attention_weights.",  f"{ours}.cross_attention.logits."),
        (f"{layer}.cross_attn.value_proj.",         f"{ours}.cross_attention.value."),
        (f"{layer}.cross_attn.output_proj.",        f"{ours}.cross_attention.output."),
        (f"{layer}.norm2.",                         f"{ours}.cross_norm."),
        (f"{layer}.linear1.",                       f"{ours}.expand."),
        (f"{layer}.linear2.",                       f"{ours}.contract."),
        (f"{layer}.norm3.",                         f"{ours}.network_norm."),
        (f"{theirs}.denoising_class_embed.",        "decoder.denoising_class."),
        (f"{theirs}.query_pos_head.",               "decoder.query_position."),
        (f"{theirs}.enc_output.",                   "decoder.candidate."),
        (f"{theirs}.enc_score_head.",               "decoder.candidate_class."),
        (f"{theirs}.enc_bbox_head.",                "decoder.candidate_box."),
        (f"{theirs}.dec_score_head.{{}}.",          "decoder.class_heads.{}."),
        (f"{theirs}.dec_bbox_head.{{}}.",           "decoder.box_heads.{}."),
    ]


def _ultralytics_stem_and_neck(first: int) -> list[tuple[str, str | None]]:
    """The rows around the backbone's stages; `first` is the number of the layer that follows them."""
    def layer(offset: int) -> str:
        return f"model.{first + offset}"
    return [
        ("model.0.stem1.",                  "backbone.stem.enter."),
        ("model.0.stem2a.",                 "backbone.stem.narrow."),
        ("model.0.stem2b.",                 "backbone.stem.widen."),
        ("model.0.stem3.",                  "backbone.stem.down."),
        ("model.0.stem4.",                  "backbone.stem.leave."),
        (f"{layer(0)}.",                    "encoder.enter5."),
        (f"{layer(1)}.ma.",                 "encoder.aifi.attention."),
        (f"{layer(1)}.norm1.",              "encoder.aifi.attention_norm."),
        (f"{layer(1)}.fc1.",                "encoder.aifi.expand."),
        (f"{layer(1)}.fc2.",                "encoder.aifi.contract."),
        (f"{layer(1)}.norm2.",              "encoder.aifi.network_norm."),
        (f"{layer(2)}.",                    "encoder.lateral5."),
        (f"{layer(4)}.",                    "encoder.enter4."),
        *_encoder_block(layer(6),           "top_down4"),
        (f"{layer(7)}.",                    "encoder.lateral4."),
        (f"{layer(9)}.",                    "encoder.enter3."),
        *_encoder_block(layer(11),          "top_down3"),
        (f"{layer(12)}.",                   "encoder.down3."),
        *_encoder_block(layer(14),          "bottom_up4"),
        (f"{layer(15)}.",                   "encoder.down4."),
        *_encoder_block(layer(17),          "bottom_up5"),
        (f"{layer(18)}.input_proj.{{}}.0.", "decoder.enter.{}.conv."),
        (f"{layer(18)}.input_proj.{{}}.1.", "decoder.enter.{}.bn."),
        *_decoder(layer(18)),
    ]


RTDETR_L_NAMES = [  # each {} is one integer
    # released checkpoint       ours
    *_plain_block("model.1",    "0.blocks.0"),
    ("model.2.",                "backbone.stages.1.down."),
    *_plain_block("model.3",    "1.blocks.0"),
    ("model.4.",                "backbone.stages.2.down."),
    *_light_block("model.5",    "2.blocks.0"),
    *_light_block("model.6",    "2.blocks.1"),
    *_light_block("model.7",    "2.blocks.2"),
    ("model.8.",                "backbone.stages.3.down."),
    *_light_block("model.9",    "3.blocks.0"),
    *_ultralytics_stem_and_neck(first=10),
]

RTDETR_X_NAMES = [
    *_plain_block("model.1",    "0.blocks.0"),
    ("model.2.",                "backbone.stages.1.down."),
    *_plain_block("model.3",    "1.blocks.0"),
    *_plain_block("model.4",    "1.blocks.1"),
    ("model.5.",                "backbone.stages.2.down."),
    *_light_block("model.6",    "2.blocks.0"),
    *_light_block("model.7",    "2.blocks.1"),
    *_light_block("model.8",    "2.blocks.2"),
    *_light_block("model.9",    "2.blocks.3"),
    *_light_block("model.10",   "2.blocks.4"),
    ("model.11.",               "backbone.stages.3.down."),
    *_light_block("model.12",   "3.blocks.0"),
    *_light_block("model.13",   "3.blocks.1"),
    *_ultralytics_stem_and_neck(first=14),
]


def _conv_bn(theirs: str, ours: str) -> list[tuple[str, str | None]]:
    """A convolution and its BatchNorm, in the authors' names."""
    return [(f"{theirs}.conv.", f"{ours}.conv."), (f"{theirs}.norm.", f"{ours}.bn.")]


def _fusion_blocks(theirs: str, ours: str, *, narrow: bool) -> list[tuple[str, str | None]]:
    """A fusion block in the authors' names; narrow blocks have one more convolution, which widens them."""
    return [
        *_conv_bn(f"{theirs}.conv1",                        f"encoder.{ours}.enter"),
        *_conv_bn(f"{theirs}.conv2",                        f"encoder.{ours}.bypass"),
        *_conv_bn(f"{theirs}.bottlenecks.{{}}.conv1",       f"encoder.{ours}.blocks.{{}}.conv3x3"),
        *_conv_bn(f"{theirs}.bottlenecks.{{}}.conv2",       f"encoder.{ours}.blocks.{{}}.conv1x1"),
        *(_conv_bn(f"{theirs}.conv3",                       f"encoder.{ours}.leave") if narrow else []),
    ]


def authors_names(*, convolutions_per_block: int, narrow: bool) -> list[tuple[str, str | None]]:
    """The authors' PyTorch models: ResNet blocks of 2 (18) or 3 (50) convolutions; narrow fusion blocks in R18."""
    block = "backbone.res_layers.{}.blocks.{}"
    branches = [
        row
        for number, letter in zip(range(1, convolutions_per_block + 1), "abc")
        for row in _conv_bn(f"{block}.branch2{letter}", f"backbone.stages.{{}}.{{}}.conv{number}")
    ]
    # A shortcut that halves the map is a sequence of a mean and a convolution, and has one more name for it.
    shortcuts = [
        row
        for stage, inner in ((0, ""), (1, ".conv"), (2, ".conv"), (3, ".conv"))
        for row in _conv_bn(
            f"backbone.res_layers.{stage}.blocks.0.short{inner}", f"backbone.stages.{stage}.0.shortcut.project"
        )
    ]
    return [
        *_conv_bn("backbone.conv1.conv1_1",                 "backbone.stem.0"),
        *_conv_bn("backbone.conv1.conv1_2",                 "backbone.stem.1"),
        *_conv_bn("backbone.conv1.conv1_3",                 "backbone.stem.2"),
        *branches,
        *shortcuts,
        ("encoder.input_proj.0.0.",                         "encoder.enter3.conv."),
        ("encoder.input_proj.0.1.",                         "encoder.enter3.bn."),
        ("encoder.input_proj.1.0.",                         "encoder.enter4.conv."),
        ("encoder.input_proj.1.1.",                         "encoder.enter4.bn."),
        ("encoder.input_proj.2.0.",                         "encoder.enter5.conv."),
        ("encoder.input_proj.2.1.",                         "encoder.enter5.bn."),
        ("encoder.encoder.0.layers.0.self_attn.",           "encoder.aifi.attention."),
        ("encoder.encoder.0.layers.0.linear1.",             "encoder.aifi.expand."),
        ("encoder.encoder.0.layers.0.linear2.",             "encoder.aifi.contract."),
        ("encoder.encoder.0.layers.0.norm1.",               "encoder.aifi.attention_norm."),
        ("encoder.encoder.0.layers.0.norm2.",               "encoder.aifi.network_norm."),
        *_conv_bn("encoder.lateral_convs.0",                "encoder.lateral5"),
        *_conv_bn("encoder.lateral_convs.1",                "encoder.lateral4"),
        *_fusion_blocks("encoder.fpn_blocks.0",             "top_down4", narrow=narrow),
        *_fusion_blocks("encoder.fpn_blocks.1",             "top_down3", narrow=narrow),
        *_conv_bn("encoder.downsample_convs.0",             "encoder.down3"),
        *_conv_bn("encoder.downsample_convs.1",             "encoder.down4"),
        *_fusion_blocks("encoder.pan_blocks.0",             "bottom_up4", narrow=narrow),
        *_fusion_blocks("encoder.pan_blocks.1",             "bottom_up5", narrow=narrow),
        *_conv_bn("decoder.input_proj.{}",                  "decoder.enter.{}"),
        *_decoder("decoder"),
    ]
# fmt: on


def authors_layout(*, convolutions_per_block: int, narrow: bool) -> PublicLayout:
    """The authors' layout: their denoising embedding has one more row, for padding, which is dropped."""
    table = authors_names(convolutions_per_block=convolutions_per_block, narrow=narrow)
    return PublicLayout("authors", table, partial(drop_last_row, name="decoder.denoising_class_embed.weight"))


def drop_last_row(state: dict[str, Tensor], *, name: str) -> dict[str, Tensor]:
    if name not in state:
        raise KeyError(f"{name!r} is absent")
    return state | {name: state[name][:-1]}
