"""Image classification weights for the backbones: load them, classify with them, freeze the stages they filled.

Backbone is the interface; ResNet, MobileNetV3 and VisionTransformer implement it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from frcnn.norm import EPSILON, freeze_norms, rescale_for_epsilon
from weights import LoadReport, PublicLayout, load_public

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, of images in [0, 1]

WRAPPERS = ("module.", "model.", "backbone.")  # prefixes that training scripts put before every name
IMAGENET_NORMALIZATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """The interface of a backbone: normalised images (B, 3, H, W) -> maps by name.

    strides, channels: map name -> stride in pixels, number of channels.
    mean, std: of the images in [0, 1]; the input is (image - mean) / std, per channel.
    public_names, public_layouts: tables that read its released ImageNet files (weights.load_public).
    head_names: the rows of those tables for the classifier. class_head is (), since a backbone keeps no classifier.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    strides: dict[str, int]
    channels: dict[str, int]
    public_names: list[tuple[str, str]]
    public_layouts: tuple[PublicLayout, ...]
    head_names: list[tuple[str, str]]
    class_head: tuple[str, ...] = ()

    @property
    def stages(self) -> list[list[nn.Module]]:
        """Lists of modules in the order of the forward pass, for `freeze`."""
        raise NotImplementedError

    def pooled(self, images: Tensor) -> Tensor:
        """normalised images (B, 3, H, W) -> (B, C), the input of the released classifier."""
        raise NotImplementedError

    def make_head(self, num_classes: int) -> nn.Module:
        """The released classifier for K classes, freshly initialised: (B, C) -> (B, K)."""
        raise NotImplementedError


def load_backbone(
    backbone: Backbone,
    state_or_path: dict[str, Tensor] | str | Path,
    *,
    file_normalization: Normalization | None = None,
) -> LoadReport:
    """Fill a backbone from a released ImageNet file. The classifier's entries are dropped; all others must fit.

    The rules and errors are those of weights.load_public. The classifier may be missing, and all names may begin with
    one of WRAPPERS. BatchNorms trained with another epsilon are rescaled (norm.rescale_for_epsilon).

    file_normalization: (mean, std) of the images that the weights were trained on. Only a VisionTransformer accepts
        other values than its own (`adopt_normalization`); another backbone raises ValueError. None means the backbone's
        own, but ImageNet's for a file whose name begins with "deit": DeiT was trained so, and its file does not tell.
    """
    own = (backbone.mean, backbone.std)
    is_deit = not isinstance(state_or_path, dict) and Path(state_or_path).name.lower().startswith("deit")
    file_normalization = file_normalization or (IMAGENET_NORMALIZATION if is_deit else own)
    if file_normalization == own:
        return load_public(backbone, state_or_path)
    adopt_normalization = getattr(backbone, "adopt_normalization", None)
    if adopt_normalization is None:
        raise ValueError(f"{type(backbone).__name__} takes images of mean and std {own}, not {file_normalization}")
    report = load_public(backbone, state_or_path)
    adopt_normalization(*file_normalization)
    return report


def strip_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes of WRAPPERS that all of its names share, such as "model.module."."""
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return strip_wrapper({name.removeprefix(wrapper): value for name, value in state.items()})
    return state


def read_classifier_file(state: dict[str, Tensor], *, file_epsilon: float) -> dict[str, Tensor]:
    """strip_wrapper, then norm.rescale_for_epsilon if the file's epsilon is not ours."""
    state = strip_wrapper(state)
    if file_epsilon == EPSILON:
        return state
    return rescale_for_epsilon(state, file_epsilon=file_epsilon, epsilon=EPSILON)


def backbone_layouts(
    names: Sequence[tuple[str, str]],
    head_names: Sequence[tuple[str, str]],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> tuple[PublicLayout, ...]:
    """Two layouts: a released file with its classifier, whose entries are dropped, and a file without one."""
    dropped = [(old, None) for old, _ in head_names]
    return PublicLayout("classifier", [*names, *dropped], convert), PublicLayout("backbone", names, convert)


class ImageClassifier(nn.Module):
    """The whole model of an ImageNet file: a backbone, pooling, and the released classifier.

    images (B, 3, H, W), normalised with backbone.mean and .std -> class logits (B, K). Used to check weights and to
    pretrain. The dropout of the released training is left out.
    """

    class_head = ("head.",)

    def __init__(self, backbone: Backbone, num_classes: int = 1000) -> None:
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


def freeze(backbone: Backbone, trainable_stages: int) -> None:
    """Freeze all but the last `trainable_stages` of `backbone.stages`: 0 freezes all of them, len(stages) none.

    Stages are counted as in torchvision's `trainable_backbone_layers`: ResNet has 5 (stem, stage2 .. stage5),
    MobileNetV3 6, ViT 5 (patches and positions, then a quarter of the blocks each). The BatchNorms of a frozen stage
    keep their running statistics; torchvision's live ones update them.
    """
    num_stages = len(backbone.stages)
    if not 0 <= trainable_stages <= num_stages:
        raise ValueError(f"{trainable_stages} trainable stages: expected 0 to {num_stages}")
    for stage in backbone.stages[: num_stages - trainable_stages]:
        for part in stage:
            part.requires_grad_(False)
            freeze_norms(part)
