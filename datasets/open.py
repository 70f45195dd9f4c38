"""One door to every format: open_dataset."""

from pathlib import Path

from datasets.coco import read_coco
from datasets.index import DatasetIndex
from datasets.kitti import read_kitti
from datasets.subset import keep_classes
from datasets.voc import read_voc
from datasets.yolo_txt import read_yolo
from errors import UserError

READERS = {
    "voc": read_voc,
    "coco": read_coco,
    "yolo": read_yolo,
    "kitti": read_kitti,
    "shapes": read_yolo,  # datasets.shapes writes YOLO text labels
}


def open_dataset(
    format: str,
    root: str | Path,
    split: str,
    *,
    names: tuple[str, ...] | None = None,
    classes: tuple[str, ...] = (),
) -> DatasetIndex:
    """Read a split of a dataset on disk: labels and picture headers, no pixels.

    format: voc, coco, yolo, kitti or shapes; root and split as the reader of the format says (read_voc, read_coco,
    read_yolo, read_kitti). names: class names in the order of the labels; VOC and KITTI then leave other classes out,
    COCO and YOLO files must agree with them. classes: those of the set's classes that count, in their order
    (subset.keep_classes); none: all. Bad pictures and objects are left out and listed in `faults`: see
    scan.check. UserError for a root, split or class list that cannot be used, and for a split without any picture.
    """
    if format not in READERS:
        raise UserError(f"dataset format {format!r}, expected one of {', '.join(READERS)}")
    index = READERS[format](root, split, names)
    if classes:
        index = keep_classes(index, tuple(classes), f"{root}: split {split!r}")
    if not index.samples:
        first = f"; first fault: {index.faults[0]}" if index.faults else ""
        raise UserError(f"{root}: split {split!r} has no usable picture{first}")
    return index
