"""Rewrite a dataset in another format, pictures included.

    python -m datasets.convert SRC_FORMAT SRC_ROOT SRC_SPLIT[,SPLIT...] DST_FORMAT DST_ROOT [--classes A,B]

Reading the new set gives the same boxes (to 1e-8 pixel), classes and flags, as far as the format can hold them. The
formats cannot hold the following; the command counts the losses, except the order:

    voc     mask areas, numeric image ids, the difference between crowd and difficult, regions of no class, objects at
            most one pixel wide or high (VOC's readers drop such objects as points)
    coco    nothing; a region of no class becomes one crowd region a class, a difficult object has `ignore`: 1
    yolo    ignored objects (difficult, crowd, regions of no class), mask areas, numeric image ids, the pictures' order
    kitti   mask areas, numeric image ids, the class of ignored objects (they become DontCare), spaces in class names
    all     soft labels (yolo_txt.py): only the label is written

Labels always refer to upright pixels and state the upright size, so pictures keep their bytes, including EXIF.
Truncation, poses, masks and 3D columns are not read, so they are not written. The destination appears complete or not
at all.
"""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from datasets.index import ANY_CLASS, DatasetIndex, Sample
from datasets.open import READERS, open_dataset
from datasets.overlap import find_overlap
from datasets.scan import check, scan
from errors import ArgumentParser, UserError, counted, run_script, shortened
from yaml_files import dump_yaml

Indices = dict[str, DatasetIndex]  # by split
Names = tuple[str, ...]
Pictures = dict[Path, str]  # picture -> its new file name
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff\ud800-\udfff]")  # in text lines or in XML 1.0


def convert(
    src_format: str,
    src_root: str | Path,
    src_splits: list[str],
    dst_format: str,
    dst_root: str | Path,
    *,
    classes: tuple[str, ...] = (),
    max_bad_fraction: float = 0.01,
) -> tuple[dict[str, DatasetIndex], Counter]:
    """Convert splits of a dataset into one new dataset with the same splits.

    classes: write only these classes of the source, in this order; none: all.
    Returns new split -> its index, and the losses: description -> count.
    UserError for a destination that is not empty, names that the format cannot hold, too many bad samples, and, in VOC
    and KITTI, a picture with other objects in each of two splits.
    """
    dst_root = Path(dst_root)
    if dst_format not in WRITERS:
        raise UserError(f"format {dst_format!r}, expected one of {', '.join(WRITERS)}")
    if dst_root.exists() and (not dst_root.is_dir() or any(dst_root.iterdir())):
        raise UserError(f"{dst_root}: not empty, expected a new folder")
    indices = {}
    for split in src_splits:
        index = open_dataset(src_format, src_root, split, classes=classes)
        check(scan(index, title=f"{src_format} {src_root} {split}"), max_bad_fraction, flag="--max-bad-fraction")
        indices[re.sub(r"[^\w.-]+", "_", split)] = index
    names = {index.names for index in indices.values()}
    if len(names) > 1 or len(indices) < len(src_splits):
        raise UserError(f"{src_root}: splits {shortened(src_splits)} differ in their classes or share a name")

    losses: Counter = Counter()
    samples = [sample for index in indices.values() for sample in index.samples]
    losses["objects of other classes"] = sum(len(sample.left_out) for sample in samples)
    losses["soft labels"] = sum(len(sample) for sample in samples if sample.class_scores is not None)
    class_names = _class_names(next(iter(names)), dst_format, losses)
    pictures = _picture_names(indices)
    temporary = None
    try:
        dst_root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{dst_root.name}.", dir=dst_root.parent))
        os.chmod(temporary, 0o755)  # mkdtemp's folder is private
        WRITERS[dst_format](temporary, indices, class_names, pictures, losses)
        os.replace(temporary, dst_root)
    except OSError as error:
        raise UserError(f"{dst_root}: {error.strerror or error}", exit_code=5) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return indices, losses


def _class_names(names: tuple[str, ...], dst_format: str, losses: Counter) -> tuple[str, ...]:
    """The names in a form that the format can hold. UserError for a name without such a form, or two with the same."""
    if dst_format == "kitti":
        written = tuple(re.sub(r"\s+", "_", name) for name in names)
        losses["class names with spaces, written with _"] += sum(a != b for a, b in zip(names, written))
        if "DontCare" in written:
            raise UserError("class 'DontCare' means no class in KITTI files, expected another name")
    else:
        written = names
    for name in written:
        if dst_format != "coco" and (name != name.strip() or not name or UNWRITABLE.search(name)):
            raise UserError(f"class {name!r}: spaces around it or control characters cannot be written as {dst_format}")
    if len(set(written)) < len(written):
        raise UserError(f"two classes would have the name {Counter(written).most_common(1)[0][0]!r}")
    return written


def _picture_names(indices: dict[str, DatasetIndex]) -> dict[Path, str]:
    """A file name for every picture: its own, with a number if the stem is taken (label files share a folder)."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for sample in (sample for index in indices.values() for sample in index.samples):
        path = sample.image_path
        if path in names:
            continue
        if path.stem != path.stem.strip() or UNWRITABLE.search(path.name):
            raise UserError(f"{path}: spaces around the name or control characters in it cannot be written")
        stem, number = path.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.casefold())
        names[path] = stem + path.suffix
    return names


def _copy(sample: Sample, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():  # a picture in two splits
        shutil.copyfile(sample.image_path, folder / name)


def _count_common_losses(sample: Sample, losses: Counter) -> None:
    size = sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2]
    losses["mask areas"] += int((~np.isclose(sample.area, size.prod(1), rtol=1e-9)).sum())
    losses["numeric image ids"] += isinstance(sample.image_id, int)


def write_voc(folder: Path, indices: Indices, class_names: Names, picture_names: Pictures, losses: Counter) -> None:
    """Annotations/*.xml, JPEGImages, ImageSets/Main/<split>.txt and classes.txt."""
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    _write(folder / "classes.txt", "".join(f"{name}\n" for name in class_names))
    for split, index in indices.items():
        stems = []
        for sample in index.samples:
            name = picture_names[sample.image_path]
            stems.append(Path(name).stem)
            _copy(sample, folder / "JPEGImages", name)
            _write_labels(
                folder / "Annotations" / f"{stems[-1]}.xml", _voc_xml(sample, name, class_names), sample, split
            )
            _count_common_losses(sample, losses)
            losses["crowd flags (written as difficult)"] += int((sample.crowd & (sample.labels != ANY_CLASS)).sum())
            losses["regions of no class (left out)"] += int((sample.labels == ANY_CLASS).sum())
            losses["objects at most one pixel wide or high (left out)"] += int((~_is_wide(sample)).sum())
        _write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))


def _voc_xml(sample: Sample, name: str, class_names: tuple[str, ...]) -> str:
    lines = [
        "<annotation>",
        f"\t<filename>{escape(name)}</filename>",
        f"\t<size><width>{sample.width}</width><height>{sample.height}</height><depth>3</depth></size>",
    ]
    rows = zip(sample.boxes_xyxy.tolist(), sample.labels, sample.ignore, _is_wide(sample))
    for (x1, y1, x2, y2), label, ignore, is_wide in rows:
        if label == ANY_CLASS or not is_wide:
            continue
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2))
        box = "".join(f"<{key}>{_number(value)}</{key}>" for key, value in corners)
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(class_names[label])}</name>",
            f"\t\t<difficult>{int(ignore)}</difficult>",
            f"\t\t<bndbox>{box}</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _is_wide(sample: Sample) -> np.ndarray:
    """(N,) bool: wider and higher than one pixel, by more than rounding."""
    return (sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2] > 1 + 1e-6).all(axis=1)


def write_coco(folder: Path, indices: Indices, class_names: Names, picture_names: Pictures, losses: Counter) -> None:
    """annotations/instances_<split>.json and images/<split>."""
    (folder / "annotations").mkdir()
    for split, index in indices.items():
        category_ids = index.category_ids or ()
        numbers = [category for category in category_ids if isinstance(category, int)]
        is_sorted = len(numbers) < len(category_ids) or numbers == sorted(numbers)  # readers sort numbers, no others
        if not is_sorted or not category_ids:
            category_ids = tuple(range(1, len(class_names) + 1))
        ids = [sample.image_id for sample in index.samples]
        if not all(isinstance(image_id, int) for image_id in ids):
            ids = list(range(1, len(ids) + 1))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, sample in zip(ids, index.samples):
            name = picture_names[sample.image_path]
            _copy(sample, folder / "images" / split, name)
            images.append({"id": image_id, "file_name": name, "width": sample.width, "height": sample.height})
            rows = zip(sample.boxes_xyxy.tolist(), sample.labels, sample.ignore, sample.crowd, sample.area.tolist())
            for (x1, y1, x2, y2), label, ignore, crowd, area in rows:
                for category in category_ids if label == ANY_CLASS else (category_ids[label],):
                    row: dict[str, Any] = {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                    annotations.append(row | ({"ignore": 1} if ignore and not crowd else {}))
        categories = [{"id": category, "name": name} for category, name in zip(category_ids, class_names)]
        tree = {"images": images, "annotations": annotations, "categories": categories}
        _write(folder / "annotations" / f"instances_{split}.json", json.dumps(tree, allow_nan=False) + "\n")


def write_yolo(folder: Path, indices: Indices, class_names: Names, picture_names: Pictures, losses: Counter) -> None:
    """data.yaml, images/<split> and labels/<split>."""
    if set(indices) & {"path", "names", "nc", "download"}:
        raise UserError(f"split {', '.join(indices)}: expected names other than the keys of data.yaml")
    _write(folder / "data.yaml", data_yaml({split: f"images/{split}" for split in indices}, class_names))
    for split, index in indices.items():
        (folder / "labels" / split).mkdir(parents=True)
        for sample in index.samples:
            name = picture_names[sample.image_path]
            _copy(sample, folder / "images" / split, name)
            _count_common_losses(sample, losses)
            losses["ignored objects (left out)"] += int(sample.ignore.sum())
            boxes, labels = sample.boxes_xyxy[~sample.ignore], sample.labels[~sample.ignore]
            text = yolo_labels(boxes, labels, sample.width, sample.height)
            _write(folder / "labels" / split / f"{Path(name).stem}.txt", text)


def data_yaml(entries: dict[str, str], class_names: Sequence[str]) -> str:
    """The text of a data.yaml: `entries` (split -> folder or list, relative to the file), and the class names.

    There is no key `path`, because readers disagree on it: relative to the file, to the working directory or to their
    own folder. Other trainers need train, val and test. If `entries` lacks one, it gets the splits whose names contain
    it (trainval counts as train, valid as val). A single split with another name becomes train. Without any val, val is
    the test split.
    """
    usual = {
        "train": [entry for split, entry in entries.items() if "train" in split.lower()],
        "val": [entry for split, entry in entries.items() if "val" in split.lower() and "train" not in split.lower()],
        "test": [entry for split, entry in entries.items() if "test" in split.lower()],
    }
    if len(entries) == 1 and not any(usual.values()):
        usual["train"] = list(entries.values())
    usual["val"] = usual["val"] or usual["test"]
    tree: dict = {}
    for key, found in usual.items():
        if key in entries or found:
            tree[key] = entries.get(key) or (found[0] if len(found) == 1 else found)
    tree |= entries
    return dump_yaml(tree | {"nc": len(class_names), "names": dict(enumerate(class_names))})


def yolo_labels(boxes_xyxy: np.ndarray, labels: np.ndarray, width: int, height: int) -> str:
    """The label file of a picture of width x height pixels: a row for each box (N, 4), in pixels, and class (N,)."""
    lines = []
    for (x1, y1, x2, y2), label in zip(boxes_xyxy, labels):
        row = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        lines.append(f"{label} " + " ".join(_number(float(value), 12) for value in row))
    return "".join(f"{line}\n" for line in lines)


def write_kitti(folder: Path, indices: Indices, class_names: Names, picture_names: Pictures, losses: Counter) -> None:
    """training/image_2, training/label_2, ImageSets/<split>.txt, classes.txt; unknown columns have KITTI's marks."""
    (folder / "training" / "label_2").mkdir(parents=True)
    (folder / "ImageSets").mkdir()
    _write(folder / "classes.txt", "".join(f"{name}\n" for name in class_names))
    for split, index in indices.items():
        stems = []
        for sample in index.samples:
            name = picture_names[sample.image_path]
            stems.append(Path(name).stem)
            _copy(sample, folder / "training" / "image_2", name)
            _count_common_losses(sample, losses)
            losses["classes of ignored objects (DontCare)"] += int((sample.ignore & (sample.labels >= 0)).sum())
            lines, regions = [], set()
            for box, label, ignore in zip(sample.boxes_xyxy.tolist(), sample.labels, sample.ignore):
                kind = "DontCare" if ignore else class_names[label]
                corners = " ".join(map(_number, box))
                if ignore and corners in regions:
                    continue  # COCO files repeat such a region for each class
                regions.update([corners] if ignore else [])
                lines.append(f"{kind} -1 -1 -10 {corners} -1 -1 -1 -1000 -1000 -1000 -10\n")
            _write_labels(folder / "training" / "label_2" / f"{stems[-1]}.txt", "".join(lines), sample, split)
        _write(folder / "ImageSets" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))


WRITERS = {"voc": write_voc, "coco": write_coco, "yolo": write_yolo, "kitti": write_kitti}


def _number(value: float, digits: int = 9) -> str:
    """The shortest text of a rounded number, without a point if it is whole."""
    value = round(value, digits)
    return str(int(value)) if value.is_integer() else repr(value)


def _write_labels(path: Path, text: str, sample: Sample, split: str) -> None:
    """Write the only label file of a picture. UserError where another split has written it with other objects."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        found = f"{sample.image_path}: has other objects in split {split!r} than in one before it"
        raise UserError(
            f"{found}, and the format has one label file a picture; expected the splits in sets of their own"
        )
    _write(path, text)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        "python -m datasets.convert",
        __doc__,
        epilog="Example: python -m datasets.convert voc data/bccd trainval,test coco data/bccd_coco\n"
        "Exit codes: 0 written, 2 a mistake in the arguments or the data, 5 a file that could not be written, "
        "130 after Ctrl-C.",
    )
    parser.add_argument("src_format", choices=tuple(READERS), help="how the labels are stored")
    parser.add_argument("src_root", help="folder of the dataset (yolo: or its data.yaml)")
    parser.add_argument("src_split", help="a split, or several joined by commas")
    parser.add_argument("dst_format", choices=tuple(WRITERS), help="how to store them")
    parser.add_argument("dst_root", help="a folder that does not exist, or is empty")
    parser.add_argument("--classes", help="class names joined by commas: write only these, in this order (all)")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="bad share of pictures or objects to allow (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    indices, losses = convert(
        arguments.src_format,
        arguments.src_root,
        arguments.src_split.split(","),
        arguments.dst_format,
        arguments.dst_root,
        classes=tuple(arguments.classes.split(",")) if arguments.classes else (),
        max_bad_fraction=arguments.max_bad_fraction,
    )
    for split, index in indices.items():
        objects = counted(sum(map(len, index.samples)), "object")
        print(f"{split}: {counted(len(index), 'picture')}, {objects}")
        for fault in index.faults:
            print(f"  {fault}")
    for first, second in itertools.combinations(indices, 2):
        overlap = find_overlap(indices[second], indices[first], (second, first))
        if overlap.shared:
            print(overlap)
    for what, count in losses.items():
        if count:
            print(f"not kept: {count} {what}")
    return 0


if __name__ == "__main__":
    run_script(main)
