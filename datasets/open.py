"""open_dataset: read a split of a dataset in any of the formats."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from datasets import class_names
from datasets.coco import read_coco
from datasets.folders import list_files
from datasets.index import ANY_CLASS, NO_LABEL_FILE, DatasetIndex, Fault
from datasets.kept_index import KeptSets
from datasets.kitti import read_kitti
from datasets.subset import keep_classes
from datasets.voc import read_voc
from datasets.yolo_txt import read_yolo
from errors import UserError, counted

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
    needs_objects: bool = True,
    kept: KeptSets | None = None,
) -> DatasetIndex:
    """Read a split of a dataset on disk: labels and picture headers, no pixels.

    format: voc, coco, yolo, kitti or shapes.
    root, split: see the reader of the format: read_voc, read_coco, read_yolo, read_kitti.
    names: class names in the order of the labels. VOC and KITTI then leave other classes out; COCO and YOLO files must
        have the same names.
    classes: use only these classes of the set, in this order (subset.keep_classes); none: all.
    needs_objects: refuse a split without any object.
    kept: take the index of a COCO set from there, where it still counts.
    Bad pictures and objects are left out and listed in `faults`: see scan.check.
    UserError for a root, split or class list that cannot be used, and for a split without any picture.
    """
    if format not in READERS:
        raise UserError(f"dataset format {format!r}, expected one of {', '.join(READERS)}")
    if not Path(root).exists():
        from datasets.download import how_to_fetch_set  # here: `python -m datasets.download` imports this first

        raise UserError(f"{root}: no such file or folder, expected a {format} dataset{how_to_fetch_set(root, format)}")
    if kept is not None and format == "coco":
        settings = {"format": format, "root": [str(root), os.path.abspath(root)], "split": split, "names": names}
        index = kept.open(settings, lambda sources: read_coco(root, split, names, sources))
    else:
        index = READERS[format](root, split, names)
    alike = [Fault(str(root), None, line, "classes of alike names") for line in class_names.alike(index.names)]
    index = replace(index, faults=(*index.faults, *alike)) if alike else index
    if classes:
        index = keep_classes(index, tuple(classes), f"{root}: split {split!r}")
    if not index.samples:
        kinds = Counter(fault.kind for fault in index.faults).most_common()
        found = "; ".join(
            [f"{count} x {kind}" for kind, count in kinds] + [f"first fault: {f}" for f in index.faults[:1]]
        )
        where = f"; labels were looked for in {index.label_source}" if index.label_source else ""
        raise UserError(f"{root}: split {split!r} has no usable picture{where}{'; ' if found else ''}{found}")
    if needs_objects:
        require_objects(index, f"{root}: split {split!r}", root)
    return index


def require_objects(index: DatasetIndex, title: str, root: str | Path, *, with_difficult: bool = True) -> None:
    """UserError for an index without any object of a class: it can neither train nor measure a model.

    The message names the place of the labels, the number of missing label files, and the place below `root` of a file
    with the right name. with_difficult: count objects that are marked difficult.
    """
    for sample in index.samples:
        if (sample.labels[~(sample.crowd if with_difficult else sample.ignore)] != ANY_CLASS).any():
            return
    missing = [fault for fault in index.faults if fault.kind == NO_LABEL_FILE]
    effects = ("object dropped", "left out", "picture dropped")
    dropped = [fault for fault in index.faults if fault.effect in effects]
    regions = sum(map(len, index.samples))
    found = f"{title}: {counted(len(index), 'picture')} and not one object"
    found += f"; labels were looked for in {index.label_source}, {len(missing)} of {len(index)} label files are missing"
    if missing:
        found += f" (the first: {missing[0].path}){_found_elsewhere(missing[0].path, root)}"
    others = sum(len(sample.left_out) for sample in index.samples)
    if others:
        found += f"; left out: {counted(others, 'object')} of other classes"
    if regions:
        found += f"; {counted(regions, 'box')} to be ignored, and no others"
    if dropped:
        found += f"; objects, labels or pictures that cannot be used: {len(dropped)}, the first: {dropped[0]}"
    raise UserError(found)


def _found_elsewhere(path: str, root: str | Path) -> str:
    """A hint at a file below the root that has the name of the missing label file, up to case; "" for none."""
    name, root = Path(path).name.lower(), Path(root)
    try:
        files = list_files(root if root.is_dir() else root.parent, (".txt",))
    except UserError:
        return ""
    found = next((file for file in files if file.name.lower() == name), None)
    return "" if found is None else f"; found {found} instead, which is not read"
