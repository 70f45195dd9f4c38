"""KITTI object detection: one text file a frame, one object a line, boxes as left, top, right, bottom.

Boxes are 0-based floats and stay unchanged. `DontCare` is no class but a region that may hold unlabelled objects: it
becomes an ignored region of ANY_CLASS. The type and the box are read from the 15 columns (16 with a score); truncation,
occlusion and the 3D columns are not.

Geiger et al., "Are we ready for Autonomous Driving? The KITTI Vision Benchmark Suite", CVPR 2012.
"""

import unicodedata
from pathlib import Path

from datasets.folders import files_in, find_label, list_files
from datasets.images import SUFFIXES, UNREAD, find_picture
from datasets.index import ANY_CLASS, DatasetIndex, Effect, Sample
from datasets.rows import FaultLog, LabelRows, log_passed_over, log_unread, make_sample, read_frame, refuse_misread
from datasets.text_lines import read_lines, read_names
from datasets.values import read_number
from errors import UserError, counted, shortened

CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")


def read_kitti(root: str | Path, split: str, names: tuple[str, ...] | None = None) -> DatasetIndex:
    """A split of a folder in KITTI's layout: image_2 and label_2, in root or in root/training.

    split: a list ImageSets/<split>.txt (in root or root/training), or `all` for every frame. The benchmark's archives
        have no lists, and the labels of its test frames are not public. Without lists, `val` is every fifth frame by
        name, and `train` the others. Frames were published shuffled, so both have frames of the same drives; a list
        made by drives is a stricter test.
    class names: `names`, else the lines of classes.txt in root, else KITTI's 8. Objects of other classes are dropped,
        which is a fault unless `names` is given.
    UserError for a root or split that does not exist.
    """
    root = Path(root)
    base = next((folder for folder in (root / "training", root) if (folder / "label_2").is_dir()), None)
    if base is None or not (base / "image_2").is_dir():
        raise UserError(f"{root}: no folders image_2 and label_2, expected a KITTI dataset")
    given = names is not None
    if names is None:
        names = read_names(root / "classes.txt") if (root / "classes.txt").is_file() else CLASSES
    names = tuple(names)
    log, samples = FaultLog(), []
    of_others: Effect = "noted" if given else "object dropped"
    for stem in _read_list(root, base, split, log):
        sample = _read_sample(stem, base, names, of_others, log)
        if sample is not None:
            samples.append(sample)
    log_passed_over(base / "image_2", samples, log)
    refuse_misread(log, base / "label_2")
    return DatasetIndex(names, tuple(samples), tuple(log.faults), None, "kitti", str(base / "label_2"))


def _read_sample(stem: str, base: Path, names: tuple[str, ...], of_others: Effect, log: FaultLog) -> Sample | None:
    """The Sample of one frame; None, and a fault, for one that cannot be used. of_others: on objects not in `names`."""
    label_path, image_path = find_label(base / "label_2", stem), find_picture(base / "image_2", stem)
    unread = None if image_path is not None else find_picture(base / "image_2", stem, UNREAD)
    if unread is not None:
        log_unread([unread], log)
        return None
    if image_path is None:
        reason = f"no picture {stem} in {base / 'image_2'}"
        log.add(label_path, None, reason, "label without picture", "left out", stem)
        return None
    try:
        lines = read_lines(label_path)
    except UserError as error:
        kind = "unreadable label file" if label_path.is_file() else "picture without label file"
        log.add_error(label_path, error, kind, "picture dropped", stem)
        return None
    frame = read_frame(image_path, log)
    if frame is None:
        return None
    rows = LabelRows()
    for number, line in lines:
        fault = _add_line(line, number, names, rows)
        if fault is not None:
            reason, kind = fault
            effect = of_others if kind == "unknown class" else "object dropped"
            log.add(label_path, number, reason, kind, effect, image_path.name)
    return make_sample(rows, frame, log, image_path=image_path, image_id=stem, label_path=label_path)


def _read_list(root: Path, base: Path, split: str, log: FaultLog) -> list[str]:
    """The names of the frames in a split: see read_kitti."""
    choices = [folder / "ImageSets" / f"{split}.txt" for folder in dict.fromkeys((root, base))]
    source = next((path for path in choices if path.is_file()), None)
    if source is not None:
        listed = [line for _, line in read_lines(source)]
        for stem in listed:
            if "/" in stem or "\\" in stem:
                raise UserError(f"{source}: {stem!r}, expected the name of a frame")
        return log.once_each(listed, source, "frame")
    lists = sorted(path.stem for choice in choices for path in files_in(choice.parent, (".txt",)))
    if split != "all" and (lists or split not in ("train", "val")):
        raise UserError(f"{choices[0]}: no such list, found {shortened(lists) or 'none'} (`all` takes every frame)")
    stems: set[str] = set()
    for folder, suffixes in ((base / "label_2", (".txt",)), (base / "image_2", (*SUFFIXES, *UNREAD))):
        names = (path.relative_to(folder).with_suffix("").as_posix() for path in list_files(folder, suffixes))
        stems |= {unicodedata.normalize("NFC", name) for name in names}
    if split == "all":
        return sorted(stems)
    return [stem for number, stem in enumerate(sorted(stems)) if (number % 5 == 4) == (split == "val")]


def _add_line(line: str, number: int, names: tuple[str, ...], rows: LabelRows) -> tuple[str, str] | None:
    """Add a row and return None, or return (reason, kind) of the fault."""
    columns = line.split()
    if len(columns) not in (15, 16):
        return f"{counted(len(columns), 'column')}, expected 15 (16 with a score)", "malformed row"
    name = columns[0]
    try:
        box = list(map(read_number, columns[4:8]))
    except ValueError as error:
        return f"{error}", "malformed row"
    if name == "DontCare":
        rows.add(box, ANY_CLASS, crowd=True, line=number)
    elif name in names:
        rows.add(box, names.index(name), line=number)
    else:
        return f"class {name!r}, expected one of {shortened(names)}", "unknown class"
    return None
