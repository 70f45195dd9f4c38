"""A detector as an ONNX graph: network and decoding, optionally followed by the selection of detections.

    images (B, 3, H, W) ── network ── decoding ── boxes_xyxy (B, A, 4), scores (B, A, K)
                                                     └── selection ── boxes_xyxy (N, 4), scores, labels, image (N)

torch.onnx translates the PyTorch model; the selection is written here in ONNX's text form. The metadata of a file holds
architecture, classes, image size and commit, so that it needs no other file.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError, require
from structures import SIZE_MULTIPLE, DenseDetector, DetectionSettings

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

FORMAT = "1"  # of the metadata
PREFIX = "retort."  # of the metadata's keys
OPSET = 20
DETECTIONS = ("boxes_xyxy", "scores", "labels", "image")  # outputs of a graph with selection
PREDICTIONS = ("boxes_xyxy", "scores")  # outputs of a graph without selection

# kernels.nms.select_detections for B images of A locations. Suppression yields triples (image, class, location). They
# are sorted by image, then best first, then by location and class: TopK is stable, so the sorts run from the last key
# to the first. The first max_detections of each image remain. All candidates enter suppression.
SELECTION = f"""
<ir_version: 10, opset_import: ["" : {OPSET}]>
selection (float[batch, locations, 4] all_boxes_xyxy, float[batch, locations, classes] all_scores,
           float score_threshold, float iou_threshold, int64 max_detections)
    => (float[detections, 4] boxes_xyxy, float[detections] scores, int64[detections] labels, int64[detections] image)
    <int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64[1] first = {{0}}, int64[1] last = {{-1}},
     int64[2] image_and_location = {{0, 2}}>
{{
    scores_by_class = Transpose <perm = [0, 2, 1]> (all_scores)
    survivors = NonMaxSuppression (all_boxes_xyxy, scores_by_class, max_detections, iou_threshold, score_threshold)
    survivors_shape = Shape (survivors)
    count = Gather (survivors_shape, first)

    all_scores_shape = Shape (all_scores)
    num_classes = Gather (all_scores_shape, two)
    location = Gather <axis = 1> (survivors, two)
    class = Gather <axis = 1> (survivors, one)
    before_location = Mul (location, num_classes)
    pair = Add (before_location, class)
    pair_sorted, by_pair = TopK <largest = 0> (pair, count)
    survivors1 = Gather (survivors, by_pair)
    scores1 = GatherND (scores_by_class, survivors1)
    scores2, by_score = TopK (scores1, count)
    survivors2 = Gather (survivors1, by_score)
    image2 = Gather <axis = 1> (survivors2, zero)
    image3, by_image = TopK <largest = 0> (image2, count)
    survivors3 = Gather (survivors2, by_image)
    scores3 = Gather (scores2, by_image)

    batch = Gather (all_scores_shape, zero)
    rows = Range (zero, batch, one)
    rows_column = Unsqueeze (rows, last)
    is_of_row = Equal (rows_column, image3)
    is_of_row_number = Cast <to = 7> (is_of_row)
    per_row = ReduceSum <keepdims = 0> (is_of_row_number, last)
    starts = CumSum <exclusive = 1> (per_row, zero)
    start = Gather (starts, image3)
    count_number = Squeeze (count)
    position = Range (zero, count_number, one)
    rank = Sub (position, start)
    is_kept = Less (rank, max_detections)

    kept = Compress <axis = 0> (survivors3, is_kept)
    scores = Compress <axis = 0> (scores3, is_kept)
    image = Gather <axis = 1> (kept, zero)
    labels = Gather <axis = 1> (kept, one)
    place = Gather <axis = 1> (kept, image_and_location)
    boxes_xyxy = GatherND (all_boxes_xyxy, place)
}}
"""


@dataclass(frozen=True)
class GraphInfo:
    """The metadata of a file, stored as text.

    names: of the K classes. image_size: in pixels, as trained, or the only size that the file accepts.
    suppresses: whether the detector's boxes need suppression; RT-DETR's do not.
    precision: float32 or int8. source: "ours" or "public", from its checkpoint.
    evaluation: plain values of the EvaluationConfig that the checkpoint was measured with; empty in older files.
    random_teachers: of the checkpoint's run, which was then no measurement; not in older files.
    classes: of the dataset, those that the checkpoint's run was limited to (data.classes); not in older files.
    """

    arch: str
    names: tuple[str, ...]
    image_size: int
    suppresses: bool
    precision: str
    source: Literal["ours", "public"]
    commit: str | None
    evaluation: dict[str, Any] = field(default_factory=dict)
    random_teachers: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


LISTS = ("names", "random_teachers", "classes")  # fields that are lists of texts
LATER = ("evaluation", "random_teachers", "classes")  # fields that older files lack


class Decoded(nn.Module):
    """A detector followed by its `decode`."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        detector = cast(DenseDetector, self.detector)  # PyTorch types every submodule as Tensor | Module
        return detector.decode(detector(images))


def trace(detector: nn.Module, image_size: int, *, dynamic: bool) -> "ModelProto":
    """The graph from `images` to PREDICTIONS of a detector that has `decode`, in eval mode and on the CPU.

    detector: a model from fusion.fuse, so that no BatchNorm is left.
    dynamic: B, H and W are free, H and W multiples of 32; otherwise they are 1, image_size and image_size.
    The graph contains no paths of the machine that made it.
    """
    require("onnxscript", "export", "exporting")
    images, shapes = example_images(image_size, dynamic=dynamic)
    with without_warnings(), torch.no_grad():
        program = torch.onnx.export(
            Decoded(detector),
            (images,),
            input_names=["images"],
            output_names=list(PREDICTIONS),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the old exporter (dynamo=False) returns None
    graph = program.model_proto
    _forget_the_machine(graph)
    if dynamic:
        set_shape(graph.graph.input[0], ["batch", 3, "height", "width"])
        for output, last in zip(graph.graph.output, (4, cast(int, detector.num_classes))):
            set_shape(output, ["batch", "locations", last])
    return graph


def example_images(image_size: int, *, dynamic: bool) -> tuple[Tensor, dict[str, dict[int, Any]] | None]:
    """The images to trace a model with, and their free dimensions, if there are any."""
    if not dynamic:
        return torch.zeros(1, 3, image_size, image_size), None
    # The sizes differ from one another and from 1: otherwise the tracer would treat them as constants.
    return torch.zeros(2, 3, 10 * SIZE_MULTIPLE, 8 * SIZE_MULTIPLE), free_sizes()


def free_sizes() -> dict[str, dict[int, Any]]:
    """The free dimensions of `images` for torch.export: any batch, any multiples of 32 for height and width."""
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    return {"images": {0: batch, 2: SIZE_MULTIPLE * rows, 3: SIZE_MULTIPLE * columns}}


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the ONNX libraries: they warn of packages that are not needed and of their own deprecated calls."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _forget_the_machine(model: "ModelProto") -> None:
    """Remove the stack traces of all nodes, which contain paths, and the tracer's names of sizes."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:], model.functions[:]
    model.graph.doc_string = model.doc_string = ""
    model.graph.name = "detector"


def set_shape(value: "ValueInfoProto", sizes: list[int | str]) -> None:
    """Set the shape of a value: numbers for fixed sizes, names for free ones."""
    del value.type.tensor_type.shape.dim[:]
    for size in sizes:
        dimension = value.type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dimension.dim_param = size
        else:
            dimension.dim_value = size


def selection_inputs(detection: DetectionSettings) -> dict[str, np.ndarray]:
    """The scalar inputs of a graph with selection."""
    return {
        "score_threshold": np.array(detection.score_threshold, np.float32),
        "iou_threshold": np.array(float32_at_most(detection.iou_threshold)),
        "max_detections": np.array(detection.max_detections, np.int64),
    }


def append_selection(model: "ModelProto", detection: DetectionSettings) -> "ModelProto":
    """A graph that ends in PREDICTIONS -> one that ends in DETECTIONS: rows sorted by image, then best first.

    boxes_xyxy (N, 4) float32, scores (N,) float32, labels (N,) int64, image (N,) int64: the row of the batch. The
    settings become scalar inputs of the graph with these values as defaults, so that a caller may leave them out.
    """
    import onnx
    from onnx import compose, numpy_helper, parser

    network = onnx.ModelProto()
    network.CopyFrom(model)
    selection = parser.parse_model(SELECTION)
    for name in PREDICTIONS:
        _rename(network.graph, name, f"all_{name}")
    graph = compose.merge_graphs(
        network.graph, selection.graph, io_map=[(f"all_{name}", f"all_{name}") for name in PREDICTIONS]
    )
    graph.name = "detector"
    defaults = selection_inputs(detection)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in defaults.items())
    network.graph.CopyFrom(graph)
    onnx.checker.check_model(network)
    return network


def _rename(graph: "GraphProto", old: str, new: str) -> None:
    """Rename an output of a graph and its value."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for output in graph.output:
        output.name = new if output.name == old else output.name


def float32_at_most(value: float) -> np.float32:
    """The largest float32 <= value: a float32 IoU is above `value` if and only if it is above this."""
    rounded = np.float32(value)
    return rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf))


def write_info(model: "ModelProto", info: GraphInfo) -> None:
    """Add the metadata that read_info reads: the format, and an entry for each field."""
    from onnx import helper

    entries = {f"{PREFIX}format": FORMAT}
    entries |= {PREFIX + name: json.dumps(value, ensure_ascii=False) for name, value in asdict(info).items()}
    helper.set_model_props(model, entries)
    model.producer_name = "retort"


def read_info(entries: dict[str, str], path: object) -> GraphInfo:
    """The info in a file's metadata. UserError if export.py did not write it."""
    found = entries.get(f"{PREFIX}format")
    if found is None:
        raise UserError(f"{path}: its metadata has no entry '{PREFIX}format', expected a file that export.py wrote")
    if found != FORMAT:
        raise UserError(f"{path}: found metadata of format {found!r}, this code reads {FORMAT!r}")
    try:
        names = [name for name in GraphInfo.__dataclass_fields__ if name not in LATER or PREFIX + name in entries]
        fields = {name: json.loads(entries[PREFIX + name]) for name in names}
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is damaged: {error}") from None
    lists = [fields.setdefault(name, []) for name in LISTS]
    are_texts = all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists)
    if not are_texts or type(fields["image_size"]) is not int or not isinstance(fields["arch"], str):
        keys = "'arch', 'names', 'image_size', 'random_teachers' or 'classes'"
        raise UserError(f"{path}: its metadata is damaged: {keys} is not what export.py writes")
    return GraphInfo(**fields | {name: tuple(fields[name]) for name in LISTS})
