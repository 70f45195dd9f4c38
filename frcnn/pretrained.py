"""Image classification weights for the backbones: loading them, classifying with them, and freezing what they filled.

A backbone (ResNet, MobileNetV3, VisionTransformer) is a module that maps normalised images (B, 3, H, W) to named maps:

    strides, channels   for each map's name, its stride in pixels and its channel count
    stages              lists of modules in the order of the forward pass, for `freeze`
    mean, std           what its images are to be normalised with: (image in [0, 1] - mean) / std, per channel
    public_layouts      how its released ImageNet files are read (weights.load_public); class_head is (): none is kept
    pooled(images)      (B, C): what the released classifier looks at
    make_head(K)        that classifier; head_names: the rows of its table
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from frcnn.norm import freeze_norms, rescale_for_epsilon
from weights import LoadReport, PublicLayout, load_public

WRAPPERS = ("module.", "model.", "backbone.")  # what training scripts put before every name
IMAGENET_NORMALIZATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std of its pictures in [0, 1]


def load_backbone(
    backbone: nn.Module,
    state_or_path: dict[str, Tensor] | str | Path,
    *,
    file_normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> LoadReport:
    """Fill a backbone from a released ImageNet file: the classifier's entries are dropped, all others must fit.

    The rules and errors are those of weights.load_public. Files without the classifier fit too, and so do names that
    all begin with one of WRAPPERS. BatchNorms trained with another epsilon are rescaled (norm.rescale_for_epsilon).

    file_normalization: (mean, std) of the images the weights were trained on, where they are not the backbone's own. Of
    a VisionTransformer alone: `adopt_normalization`. None means the backbone's own, or, for a VisionTransformer and a
    file whose name begins with "deit", ImageNet's, which is what DeiT's were trained on; the file itself does not say.
    """
    own = (backbone.mean, backbone.std)
    is_deit = not isinstance(state_or_path, dict) and Path(state_or_path).name.lower().startswith("deit")
    file_normalization = file_normalization or (IMAGENET_NORMALIZATION if is_deit else own)
    if file_normalization != own and not hasattr(backbone, "adopt_normalization"):
        raise ValueError(f"{type(backbone).__name__} takes images of mean and std {own}, not {file_normalization}")
    report = load_public(backbone, state_or_path)
    if file_normalization != own:
        backbone.adopt_normalization(*file_normalization)
    return report


def strip_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without a prefix of WRAPPERS that every name has, if there is one; repeated ("model.module.")."""
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return strip_wrapper({name.removeprefix(wrapper): value for name, value in state.items()})
    return state


def read_classifier_file(
    state: dict[str, Tensor], *, file_epsilon: float | None = None, epsilon: float | None = None
) -> dict[str, Tensor]:
    """strip_wrapper, and norm.rescale_for_epsilon where the two epsilons differ."""
    state = strip_wrapper(state)
    if file_epsilon == epsilon:
        return state
    return rescale_for_epsilon(state, file_epsilon=file_epsilon, epsilon=epsilon)


def backbone_layouts(
    names: list[tuple[str, str]],
    head_names: list[tuple[str, str]],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> tuple[PublicLayout, ...]:
    """The released file with its classifier, which a backbone drops, and one without."""
    dropped = [(old, None) for old, _ in head_names]
    return PublicLayout("classifier", names + dropped, convert), PublicLayout("backbone", names, convert)


class ImageClassifier(nn.Module):
    """What the ImageNet files are weights of: a backbone, pooled, and the released classifier on top.

    images (B, 3, H, W), normalised with backbone.mean and .std -> class logits (B, K). It serves to check weights, and
    to pretrain. Dropout of the released training is left out.
    """

    class_head = ("head.",)

    def __init__(self, backbone: nn.Module, num_classes: int = 1000) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = backbone.make_head(num_classes)
        with_head = backbone.public_layouts[0]
        rows = [(old, f"backbone.{new}") for old, new in with_head.table if new is not None]
        rows += [(old, f"head.{new}") for old, new in backbone.head_names]
        self.public_names = rows
        self.public_layouts = (PublicLayout("classifier", rows, with_head.convert),)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone.pooled(images))


def freeze(backbone: nn.Module, trainable_stages: int) -> None:
    """Only the last `trainable_stages` of `backbone.stages` go on learning; 0 freezes all, len(stages) nothing.

    The stages count as torchvision's `trainable_backbone_layers`: ResNet has 5 (stem, stage2 .. stage5), MobileNetV3 6,
    ViT 5 (patches and positions, then a quarter of the blocks each). A frozen stage learns nothing at all: its
    BatchNorms keep their running statistics too, where torchvision's live ones go on counting.
    """
    num_stages = len(backbone.stages)
    if not 0 <= trainable_stages <= num_stages:
        raise ValueError(f"{trainable_stages} trainable stages: expected 0 to {num_stages}")
    for stage in backbone.stages[: num_stages - trainable_stages]:
        for part in stage:
            part.requires_grad_(False)
            freeze_norms(part)
