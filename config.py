"""YAML <-> frozen dataclasses. An experiment is one YAML file; `key=value` arguments override it.

Every value is checked against the type of its field. An unknown key is an error that names the nearest key. Models,
losses, readers and metrics take plain arguments; the criterion takes the terms, and engine/ the whole config.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from errors import UserError, expect
from structures import SIZE_MULTIPLE, DetectionSettings
from yaml_files import parse_yaml, read_mapping

STUDENT = "student"  # the `teacher` of a term in which the student teaches itself
RANDOM = "random"  # weights of a teacher that is untrained: its run is no measurement (Config.plumbing)
NEAR = 0.7  # difflib's ratio from which an error offers a key for an unknown one; below it they are other words


@dataclass(frozen=True)
class PseudoBoxConfig:
    """A teacher's detections, made once before training, as the boxes of pictures without labels."""

    teacher: str  # the name of one of `teachers`, a detector; it needs no term
    threshold: float = 0.4  # a detection with at least this score is an object
    class_thresholds: dict[str, Any] = field(default_factory=dict)  # class of the dataset: its own threshold
    boxes_per_object: float | None = None  # choose each class's threshold: this many boxes per labelled object of it
    ignored_per_object: float | None = None  # and this many ignored ones, in place of ignore_above
    ignore_above: float = 0.1  # a detection from this score to the threshold is ignored: neither learnt nor punished
    image_size: int | None = None  # side of the teacher's images in pixels; None: what it was trained with
    iou_threshold: float | None = None  # of non-maximum suppression; None: the published one of its family


@dataclass(frozen=True)
class UnlabelledConfig:
    """Pictures of which nothing but the pixels is read, beside the labelled ones. Both sources may be given."""

    rest: bool = False  # the pictures of data.train that per_class or max_samples leaves out
    split: str | None = None  # a split of `root` in `format`; None: every picture below `root`, if that is given
    root: str | None = None  # a folder of pictures, or of a set; None: data.root
    format: Literal["voc", "coco", "yolo", "kitti", "shapes"] | None = None  # of the set; None: data.format
    max_samples: int = 0  # at most this many, the same random choice each time; 0: all
    labelled_share: float | None = None  # share of labelled pictures in every batch; None: both are one list
    pseudo: PseudoBoxConfig | None = None  # boxes for them; None: only terms act on them


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are. `root` and the splits are arguments of datasets.open_dataset."""

    format: Literal["voc", "coco", "yolo", "kitti", "shapes"]  # how the labels are stored
    root: str  # the folder of the set; for a YOLO set its yaml file works too
    train: str | None = "train"  # the split to train on; "a+b" joins two of a VOC set; None: no labelled pictures
    test: str = "test"  # the split to measure on
    train_root: str | None = None  # another root for the training split, such as a synthetic set; None: `root`
    train_format: Literal["voc", "coco", "yolo", "kitti", "shapes"] | None = None  # of train_root; None: `format`
    pictures_per_epoch: int = 0  # pictures of an epoch, cut from passes over the split; 0: one pass
    max_samples: int = 0  # train on at most this many pictures, the same random choice each time; -1, 0: all
    per_class: int = 0  # train on this many pictures drawn for each class, others for each seed; 0: all
    draw_seed: int | None = None  # of the draw of per_class; None: `seed`
    unlabelled: UnlabelledConfig | None = None  # train on pictures without labels as well
    classes: tuple[str, ...] = ()  # use only these classes of the set, in this order; none: all of them
    allow_overlap: bool = False  # allow a test split whose pictures are all trained on
    holdout_fraction: float = 0.0  # share of the training pictures kept aside to choose `best.safetensors` on
    max_bad_fraction: float = 0.01  # a larger share of bad samples stops the run
    cache: bool = True  # keep the decoded, resized uint8 pictures in memory (3 * image_size^2 bytes each)
    workers: int = 0  # processes that read pictures; 0: the training process reads them

    @property
    def train_place(self) -> tuple[str, str, str]:
        """Format, root and split of the training pictures."""
        return self.train_format or self.format, self.train_root or self.root, self.train or ""

    @property
    def test_place(self) -> tuple[str, str, str]:
        return self.format, self.root, self.test


@dataclass(frozen=True)
class InheritConfig:
    """A student that begins as a selection of the channels of a wider model of its family and depth."""

    teacher: str | None = None  # the wider model: the name of one of `teachers`; or give `weights`
    weights: str | None = None  # a released file, or a checkpoint of ours
    arch: str | None = None  # the architecture in a released file that does not name it
    by: Literal["bn_gamma", "l2", "random"] = "bn_gamma"  # keep channels with large gammas, large weights, or any


@dataclass(frozen=True)
class Int8Config:
    """Fine-tuning for int8: the student rounds weights and activations as export.py --int8 writes them."""

    percentile: float = 99.99  # an activation's range ends at its percentiles 100 - p and p; 100: min-max
    pictures: int = 64  # training pictures that the first ranges are measured on
    frozen_epochs: int = 1  # the last epochs, in which the ranges stay; before, they follow the batches


@dataclass(frozen=True)
class ModelConfig:
    """A detector: its architecture and where its weights come from."""

    arch: str  # a key of models.ARCHITECTURES
    weights: str | None = None  # a released file, or a checkpoint of ours; None: fresh
    backbone_weights: str | None = None  # an ImageNet file for a Faster R-CNN's backbone, or a folder of them
    trainable_stages: int | None = None  # number of last stages of a Faster R-CNN's backbone to train; None: all
    frozen_norms: bool = False  # freeze the BatchNorms of a Faster R-CNN's backbone, for small batches
    roi_samples: int | None = None  # proposals of a picture that a Faster R-CNN's second stage learns from; None: 512
    new_head: bool = False  # start the whole class head fresh; otherwise classes with the same name keep their rows
    inherit: InheritConfig | None = None  # begin as a part of a wider model; instead of `weights`
    widths: str | None = None  # a file of engine.pruning or engine.search: other widths, or depths, than arch has
    int8: Int8Config | None = None  # fine-tune `weights` for int8; None: do not round


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen model that teaches. If it has no weights, compare.py first trains it on the same data ("in place")."""

    name: str  # the terms refer to it by this name
    arch: str  # a key of models.ARCHITECTURES or models.TEACHERS; or ema, the running mean of the student's own weights
    weights: str | None = None  # a released file, a checkpoint of ours; or random: untrained, to try a config
    image_size: int | None = None  # side of its images in pixels; None: the student's, rounded to the teacher's stride
    aliases: dict[str, Any] = field(default_factory=dict)  # class of the dataset: class of the teacher; wins over names
    vocabulary: str | None = None  # the file of CLIP's vocabulary; None: where datasets.download puts it
    epochs: int | None = None  # epochs of training in place; None: as many as the student
    start_weights: str | None = None  # training in place starts from this file, as student.weights
    backbone_weights: str | None = None  # its backbone starts from this file, as student.backbone_weights
    optimizer: dict[str, Any] = field(default_factory=dict)  # keys of `optimizer` that differ for training in place
    data: dict[str, Any] = field(default_factory=dict)  # keys of `data` that differ for training in place

    @property
    def is_random(self) -> bool:
        return self.weights == RANDOM

    @property
    def class_aliases(self) -> dict[str, str]:
        """`aliases` as names: YAML reads 0 and yes as other values."""
        return {str(name): str(theirs) for name, theirs in self.aliases.items()}


@dataclass(frozen=True)
class GradientShare:
    """A term's weight, measured after the warm-up and then fixed; distill/gradient_shares.py has the definition."""

    share: float  # the term's gradient on the student's pyramid, as a share of the detection loss's there


@dataclass(frozen=True)
class TermConfig:
    """One distillation term: weight * schedule(epoch) * loss(adapter(student map), teacher map), summed over maps."""

    teacher: str  # the name of one of `teachers`; student: itself, for a loss that compares its own layers
    loss: str  # a name in distill.terms.LOSSES
    weight: float | GradientShare  # factor of the loss; {share: 0.1}: measured, see terms.0.weight; 0: left out
    student_maps: tuple[str, ...] = ()  # maps or logits of the student; none: the loss compares boxes or whole outputs
    teacher_maps: tuple[str, ...] = ()  # maps or logits of the teacher; none: the same names as student_maps
    name: str | None = None  # its column in metrics.csv; None: loss_teacher
    adapter: Literal["none", "conv1x1", "conv1x1_norm", "conv3x3", "mlp"] = "none"  # widens the student's map
    warmup_epochs: float = 0.0  # the weight rises linearly from 0
    stop_epoch: float | None = None  # the term is off from here on
    decay: Literal["none", "linear", "cosine"] = "none"  # how the weight falls to final_fraction at the last epoch
    final_fraction: float = 0.0  # the share of the weight that remains at the end
    on: Literal["all", "labelled", "unlabelled"] = "all"  # the images of a batch that it acts on
    content_only: bool = False  # for losses on maps: set both maps to 0 in the padding of an image
    parameters: dict[str, Any] = field(default_factory=dict)  # of the loss: see docs/losses


@dataclass(frozen=True)
class OptimizerConfig:
    """How the student's weights, adapters and trained losses learn."""

    name: Literal["sgd", "adamw"] = "sgd"  # SGD has Nesterov momentum
    learning_rate: float = 0.01  # the peak, after the warm-up
    final_fraction: float = 0.01  # learning rate at the end, as a fraction of the peak
    schedule: Literal["linear", "cosine"] = "linear"  # how the learning rate falls after the warm-up
    momentum: float = 0.937  # of SGD; beta_1 of AdamW
    weight_decay: float = 5e-4  # not on biases and normalisation
    backbone_factor: float = 1.0  # learning rate of the student's backbone, as a factor of that of the rest
    warmup_epochs: float = 3.0  # rates and momentum move linearly to their values in these epochs
    warmup_momentum: float = 0.8  # momentum of SGD at the first step
    warmup_bias_learning_rate: float = 0.1  # learning rate of the biases at the first step, SGD only
    clip_norm: float = 10.0  # largest norm of the gradient; 0: not clipped
    accumulate: int = 1  # batches per optimizer step
    sum_over_batch: bool = True  # multiply the loss by the batch size, as the published YOLO rates expect
    ema_decay: float = 0.9999  # decay of the running mean of the weights; the mean is what is evaluated
    ema_ramp_steps: float = 2000.0  # decay(step) = ema_decay * (1 - exp(-step / ramp))


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities and ranges of datasets.augment. All zero: images stay unchanged."""

    mosaic: float = 1.0  # probability
    mixup: float = 0.0  # probability
    scale: float = 0.5  # zoom in 1 - scale .. 1 + scale
    translate: float = 0.1  # shift in +-translate of the size
    degrees: float = 0.0  # turn by +-degrees
    shear: float = 0.0  # shear by +-degrees
    flip_horizontal: float = 0.5  # probability
    flip_vertical: float = 0.0  # probability
    hue: float = 0.015  # shift of the hue by +-hue turns
    saturation: float = 0.7  # gain of the saturation in 1 - x .. 1 + x
    value: float = 0.4  # gain of the value in 1 - x .. 1 + x
    close_mosaic_epochs: int = 10  # the last epochs train without mosaic and mixup


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run measures metrics.csv, its best weights and report.json; eval.py measures its weights in the same way.

    Thresholds that are not given are the published ones of the student's family (models.published_detection). A run
    saves the numbers it uses.
    """

    every_epochs: int = 1  # epochs between two evaluations; 0: only at the end
    of_start: bool = True  # measure a student that begins at weights (or inherits) on the test split before it learns
    protocol: Literal["coco", "voc07", "voc12"] = "coco"  # the metric; its mAP chooses best.safetensors
    ignore_difficult: bool = True  # leave objects that training ignores (VOC's difficult) out of the numbers
    score_threshold: float | None = None  # detections with a lower score are dropped
    iou_threshold: float | None = None  # non-maximum suppression drops a box with a higher IoU with a better one
    max_detections: int | None = None  # the most detections of an image
    batch_size: int = 32  # images of one forward pass
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # of every evaluation, during training and at its end

    @property
    def counts_difficult(self) -> bool:
        """Whether difficult objects are objects to be found; for the VOC protocols they never are."""
        return self.protocol == "coco" and not self.ignore_difficult

    def completed(self, published: DetectionSettings) -> "EvaluationConfig":
        """A copy whose missing thresholds are the published ones."""
        given = dataclasses.asdict(published)
        return dataclasses.replace(self, **{name: v for name, v in given.items() if getattr(self, name) is None})

    @property
    def detection(self) -> DetectionSettings:
        """The thresholds, of a config that is `completed`."""
        score, iou, most = self.score_threshold, self.iou_threshold, self.max_detections
        assert score is not None and iou is not None and most is not None
        return DetectionSettings(score, iou, most)

    def arguments(self) -> dict[str, Any]:
        """Arguments of engine.evaluation.measuring.evaluate_loader, of a config that is `completed`."""
        names = ("protocol", "ignore_difficult", "precision")
        return {"detection": self.detection} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Config:
    """One experiment. The top level of the YAML file."""

    name: str  # name of the run's folder in `runs`
    data: DataConfig  # where the pictures are
    student: ModelConfig  # what is trained
    teachers: tuple[TeacherConfig, ...] = ()  # frozen models
    terms: tuple[TermConfig, ...] = ()  # the distillation losses
    detection_weight: float = 1.0  # weight of the student's own losses beside the terms; 0: it learns from terms alone
    teacher_weighting: Literal["fixed", "confidence"] = "fixed"  # confidence: by each teacher's fit to the labels
    teacher_cache_gigabytes: float = 0.0  # keep the teachers' outputs of each view on disk, up to this size; 0: do not
    epochs: int = 100  # passes over the training pictures
    batch_size: int = 16  # images of a batch, over all processes
    image_size: int = 640  # side of the square image in pixels, a multiple of 32
    seed: int = 0  # of all random numbers
    view_seed: int | None = None  # of the order and the augmentation of pictures, to share them among seeds; None: seed
    optimizer: OptimizerConfig = OptimizerConfig()  # how it learns
    augment: AugmentConfig = AugmentConfig()  # how images are changed
    evaluation: EvaluationConfig = EvaluationConfig()  # how it is measured
    device: str = "auto"  # a device of torch; auto: cuda where there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware computes in it
    channels_last: bool = True  # memory layout of images and weights
    compile: bool = False  # torch.compile the student and the teachers
    patience: int = 0  # epochs without a better held-out mAP before stopping; 0: never
    student_file: Literal["float16", "float32"] = "float16"  # numbers of weights/student.safetensors, at the end
    save_every_steps: int = 0  # steps between two checkpoints within an epoch; 0: only at its end
    runs: str = "runs"  # the folder of all runs

    @property
    def seed_of_views(self) -> int:
        return self.seed if self.view_seed is None else self.view_seed

    def teacher_named(self, name: str) -> TeacherConfig:
        """The teacher with this name, which must be one of `teachers`."""
        return next(teacher for teacher in self.teachers if teacher.name == name)

    @property
    def pseudo_boxes(self) -> PseudoBoxConfig | None:
        return None if self.data.unlabelled is None else self.data.unlabelled.pseudo

    @property
    def plumbing(self) -> str:
        """The mark of a run with teachers of random weights, which stands in all that it writes; "" without any."""
        return plumbing_mark([teacher.name for teacher in self.teachers if teacher.is_random])


def plumbing_mark(teachers: Sequence[str]) -> str:
    """teachers: the names of those with random weights."""
    return f"plumbing, not a measurement: random weights in {', '.join(teachers)}" if teachers else ""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The Config in a YAML file, after `section.key=value` overrides. UserError names the key and what was expected.

    An index addresses an item of a list: `terms.0.weight=2.0`. A value is parsed as YAML: `teachers=[]` removes all.
    """
    tree = read_tree(path, overrides)
    if "rows" in tree:
        rows = ", ".join(map(str, tree["rows"])) if isinstance(tree["rows"], dict) else tree["rows"]
        raise UserError(
            f"{path}: key 'rows': a study of several rows, expected one run; compare.py {path} trains them all, "
            f"train.py {path} --row NAME one of them: {rows}"
        )
    if "condense" in tree:
        raise UserError(f"{path}: key 'condense': condense.py {path} makes that set, expected a config without it")
    if "search" in tree:
        raise UserError(f"{path}: key 'search': python -m engine.search {path} trains its shapes, expected none")
    return from_tree(Config, tree, source=str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file after overrides, not yet checked."""
    if not Path(path).exists():
        raise UserError(f"{path}: found no such file, expected a config{_config_advice(path)}")
    tree = read_mapping(path)
    for override in overrides:
        apply_override(tree, override)
    return tree


def _config_advice(path: str | Path) -> str:
    """What to do where there is no config at a path: the file here or in configs/ with the nearest name, and --init."""
    folders = (Path(path).parent, *Path(__file__).parent.glob("configs/**/"))
    files = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    near = difflib.get_close_matches(Path(path).stem, files, n=1, cutoff=NEAR)
    advice = f" (did you mean {os.path.relpath(files[near[0]])}?)" if near else ""
    return f"{advice}; python train.py --init {path} --data FOLDER writes one for your own pictures"


def apply_override(tree: dict, override: str) -> None:
    """Set `a.b.0.c=value` in a tree of dicts and lists, in place. Missing dicts are added."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"argument {override!r}: expected key=value")
    value = parse_yaml(text, f"argument {override!r}") if text else ""
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        index = _index_in(node, part, override)
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[index]
    node[_index_in(node, last, override)] = value


def _index_in(node: Any, part: str, override: str) -> str | int:
    """Turn one part of a dotted key into a key of this dict or an index of this list."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UserError(f"argument {override!r}: {part!r} is inside a plain value")
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"argument {override!r}: found {part!r}, expected an index 0..{len(node) - 1}")
    return int(part)


def from_tree(cls: type, tree: Any, *, source: str, key: str = "") -> Any:
    """An instance of the dataclass `cls` from a dict of plain values. UserError for an unknown key or a wrong type."""
    if not isinstance(tree, dict):
        raise UserError(f"{source}: {key or 'top level'}: found {tree!r}, expected keys and values")
    own_fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in own_fields:
            near = difflib.get_close_matches(str(name), own_fields, n=1, cutoff=NEAR)
            advice = f"did you mean {_join(key, near[0])!r}?" if near else f"expected one of {', '.join(own_fields)}"
            raise UserError(f"{source}: unknown key {_join(key, name)!r}, {advice}")
    hints = typing.get_type_hints(cls)
    values = {name: _convert(hints[name], tree[name], source, _join(key, name)) for name in tree}
    for name, f in own_fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: key {_join(key, name)!r} is missing")
    return cls(**values)


def check_image_size(what: str, size: int) -> None:
    """UserError for the side of a square image, in pixels, that is not a positive multiple of 32."""
    expect(size > 0 and size % SIZE_MULTIPLE == 0, what, size, f"a multiple of {SIZE_MULTIPLE}")


def only_config(file: Config) -> Config:
    """The keys of a config in a file that has others beside them."""
    return Config(**{f.name: getattr(file, f.name) for f in dataclasses.fields(Config)})


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    """`value` as the annotated type, or a UserError. An int becomes a float where needed; nothing else is coerced."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def fail(expected: str) -> UserError:
        return UserError(f"{source}: key {key!r}: found {value!r}, expected {expected}")

    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        sections = [arg for arg in args if dataclasses.is_dataclass(arg)]
        plain = [arg for arg in args if arg is not type(None) and arg not in sections]
        for section in sections:
            if not plain or isinstance(value, dict | section):
                return _convert(section, to_tree(value), source, key)
        return _convert(plain[0], value, source, key)
    if origin is Literal:
        if value not in args:
            raise fail("one of " + ", ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise fail("a list")
        return tuple(_convert(args[0], item, source, f"{key}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise fail("keys and values")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_tree(hint, value, source=source, key=key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise fail({int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint])
    return value


def to_tree(config: Any) -> Any:
    """The plain dicts and lists of a dataclass: from_tree(Config, to_tree(c), source="") == c."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_tree(item) for item in config]
    if isinstance(config, dict):
        return {k: to_tree(v) for k, v in config.items()}
    return config
