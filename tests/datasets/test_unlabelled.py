"""Which pictures keep their labels, pictures of which no label is opened, and batches of both in a fixed ratio."""

import builtins
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from datasets import unlabelled as U
from datasets.index import DatasetIndex, Sample
from datasets.loader import Loader, epoch_order, mixed_order
from errors import UserError
from random_streams import Stream
from tests.datasets.small_sets import picture, text
from tests.distill.losses.mutants.machinery import Edit, apply_edit

NAMES = ("a", "b", "c")


def index_of(labels: list[list[int]], ignored: tuple[int, ...] = ()) -> DatasetIndex:
    """One picture for each list of labels; those in `ignored` are ignored objects alone."""
    samples = []
    for row, own in enumerate(labels):
        count = len(own)
        boxes, ignore = np.tile([1.0, 2.0, 5.0, 8.0], (count, 1)), np.full(count, row in ignored)
        samples.append(Sample(Path(f"{row}.png"), row, 10, 10, boxes, np.array(own, int), ignore, np.full(count, 24.0)))
    return DatasetIndex(NAMES, tuple(samples))


def reference_draw(index: DatasetIndex, count: int, order: list[int]) -> set[int]:
    """The rule of draw_per_class, one picture at a time."""
    shows = lambda row, label: any(
        own == label and not ignore for own, ignore in zip(index.samples[row].labels, index.samples[row].ignore)
    )
    frequency = Counter(label for row in order for label in range(3) if shows(row, label))
    drawn: list[int] = []
    for label in sorted(range(3), key=lambda label: frequency[label]):
        left = count
        for row in order:
            if left and shows(row, label) and row not in drawn:
                drawn.append(row)
                left -= 1
    return set(drawn)


def test_a_draw_has_so_many_pictures_of_each_class():
    rng = np.random.default_rng(0)
    labels = [sorted(set(rng.choice(3, rng.integers(0, 4), p=[0.6, 0.3, 0.1]).tolist())) for _ in range(80)]
    index = index_of(labels, ignored=(3, 7, 11))
    draws = [U.draw_per_class(index, 4, seed) for seed in range(4)]
    for rows in draws:
        assert rows == sorted(set(rows)) and len(rows) == 12
        shown = Counter(label for row in rows if row not in (3, 7, 11) for label in set(labels[row]))
        assert min(shown[label] for label in range(3)) >= 4
    assert len({tuple(rows) for rows in draws}) == 4 and draws[0] == U.draw_per_class(index, 4, 0)
    generator = U.seeded_generator(Stream.LABELLED, 2)
    assert set(draws[2]) == reference_draw(index, 4, U.torch.randperm(80, generator=generator).tolist())
    with pytest.raises(UserError, match=r"'data.per_class': found 30, expected at most \d+: .* show a c"):
        U.draw_per_class(index, 30, 0)


def refuse_labels(monkeypatch, *suffixes: str) -> None:
    """Whoever opens a label file fails."""
    real = builtins.open

    def watched(path, *args, **options):
        assert not str(path).endswith(suffixes), f"{path} was opened"
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", watched)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (watched(path, "rb").close(), read(path))[1])


def write_voc(root: Path, garbage: bool) -> tuple[str, str]:
    for stem in ("x", "y", "z"):
        picture(root / "JPEGImages" / f"{stem}.png")
        if garbage:
            text(root / "Annotations" / f"{stem}.xml", "<not an annotation")
    text(root / "ImageSets" / "Main" / "some.txt", "x\nz.png\nabsent\n")
    return "voc", "some"


def write_kitti(root: Path, garbage: bool) -> tuple[str, str]:
    for stem in ("x", "y", "z"):
        picture(root / "training" / "image_2" / f"{stem}.png")
        if garbage:
            text(root / "training" / "label_2" / f"{stem}.txt", "no row of KITTI")
    text(root / "ImageSets" / "some.txt", "x\nz\nabsent\n")
    return "kitti", "some"


def write_yolo(root: Path, garbage: bool) -> tuple[str, str]:
    for stem in ("x", "z"):
        picture(root / "images" / "some" / f"{stem}.png")
        if garbage:
            text(root / "labels" / "some" / f"{stem}.txt", "0 one two")
    text(root / "data.yaml", "some: images/some\nnames: [a, b, c]\n")
    return "yolo", "some"


def write_coco(root: Path, garbage: bool) -> tuple[str, str]:
    for stem in ("x", "z"):
        picture(root / "some" / f"{stem}.png")
    images = [{"id": number, "file_name": f"{stem}.png"} for number, stem in enumerate(("x", "z", "absent"))]
    tree = {"images": images} | ({"annotations": "none", "categories": 3} if garbage else {})
    text(root / "annotations" / "instances_some.json", json.dumps(tree))
    return "coco", "some"


@pytest.mark.parametrize("garbage", [True, False], ids=["garbage", "no labels"])
@pytest.mark.parametrize("write", [write_voc, write_kitti, write_yolo, write_coco])
def test_no_label_is_opened(tmp_path, monkeypatch, write, garbage):
    format, split = write(tmp_path, garbage)
    refuse_labels(monkeypatch, ".xml", *(f"{stem}.txt" for stem in "xyz"))
    index = U.open_pictures(format, tmp_path, split, NAMES)
    assert [sample.image_path.stem for sample in index.samples] == ["x", "z"] and index.names == NAMES
    for sample in index.samples:
        assert not sample.is_labelled and len(sample) == 0 and (sample.width, sample.height) == (100, 80)
    missing = [fault.effect for fault in index.faults]
    assert missing == ([] if format == "yolo" else ["left out"])
    with pytest.raises(UserError, match="other"):
        U.open_pictures(format, tmp_path, "other", NAMES)


def test_a_plain_folder(tmp_path):
    for name in ("b.png", "deep/er/a.jpg", ".hidden/c.png"):
        picture(tmp_path / name)
    text(tmp_path / "d.png", "no picture")
    index = U.open_pictures(None, tmp_path, None, NAMES)
    assert [sample.image_id for sample in index.samples] == ["b.png", "deep/er/a.jpg"]
    assert [fault.effect for fault in index.faults] == ["picture dropped"]
    for root, expected in ((tmp_path / "absent", "no such file or folder"), (tmp_path / ".hidden" / "d", "no such")):
        with pytest.raises(UserError, match=expected):
            U.open_pictures(None, root, None, NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable picture"):
        U.open_pictures(None, tmp_path / "empty", None, NAMES)


def test_a_list_that_leaves_the_folder(tmp_path):
    write_voc(tmp_path, False)
    text(tmp_path / "ImageSets" / "Main" / "bad.txt", "x\n../x\n")
    with pytest.raises(UserError, match=r"bad.txt:2: '../x' leaves"):
        U.open_pictures("voc", tmp_path, "bad", NAMES)
    assert len(U.open_pictures("voc", tmp_path, "all", NAMES)) == 3
    assert len(U.open_pictures("voc", tmp_path, "some+all", NAMES)) == 3


def test_joined_with_labelled_pictures():
    labelled, forgotten = index_of([[0], [1, 2]]), U.without_labels(index_of([[0, 1], [2]]))
    assert all(len(sample) == 0 and not sample.is_labelled for sample in forgotten.samples)
    joined = U.join(labelled, forgotten)
    assert [sample.is_labelled for sample in joined.samples] == [True, True, False, False]
    soft = [U.replace(s, class_scores=np.full((len(s), 3), 1 / 3)) for s in labelled.samples]
    found = U.replace(index_of([[2, 0]]).samples[0], is_labelled=False)
    joined = U.join(U.replace(labelled, samples=tuple(soft)), U.replace(forgotten, samples=(found,)))
    assert joined.samples[2].class_scores.tolist() == [[0, 0, 1], [1, 0, 0]]


# ---------------------------------------------------------------- the order of both kinds


def reference_stream(kinds, share: float, seed: int, length: int) -> list[int]:
    """Place by place: a labelled row wherever the labelled rows so far are fewer than the share of places."""
    used, stream = [0, 0], []
    for place in range(length):
        kind = 0 if math.floor((place + 1) * share + 1e-9) > used[0] else 1
        rows, number = kinds[kind], used[kind]
        order = epoch_order(len(rows), seed, number // len(rows), (Stream.ORDER, Stream.UNLABELLED_ORDER)[kind])
        stream.append(rows[order[number % len(rows)]])
        used[kind] += 1
    return stream


@pytest.mark.parametrize("share, per_epoch, batch", [(0.25, 16, 8), (0.1, 20, 10), (1 / 3, 12, 6), (0.7, 23, 10)])
def test_mixed_order_is_one_endless_stream(share, per_epoch, batch):
    kinds = ([0, 3, 5], [1, 2, 4, 6, 7, 8, 9])
    epochs = [
        mixed_order(kinds, share, seed=4, epoch=epoch, per_epoch=per_epoch, batch_size=batch) for epoch in range(5)
    ]
    expected = reference_stream(kinds, share, 4, 5 * per_epoch)
    for epoch, rows in enumerate(epochs):
        for start in range(0, per_epoch, batch):
            found = rows[start : start + batch]
            wanted = expected[epoch * per_epoch :][start : min(start + batch, per_epoch)]
            labelled = [row for row in wanted if row in kinds[0]]
            assert found == labelled + [row for row in wanted if row not in kinds[0]]
            if len(found) == batch and per_epoch % batch == 0:
                assert len(labelled) == round(batch * share)
    counts = Counter(row for rows in epochs for row in rows)
    for rows in kinds:
        assert max(counts[row] for row in rows) - min(counts[row] for row in rows) <= 1


def test_processes_share_a_batch_and_get_equally_many_labelled(tmp_path):
    samples = []
    for row in range(20):
        path = tmp_path / f"{row}.png"
        picture(path, (8, 8))
        samples.append(U.unlabelled_sample(path, row, 8, 8))
        if row % 5 == 0:
            object.__setattr__(samples[-1], "is_labelled", True)
    index = SimpleNamespace(samples=tuple(samples))
    options = dict(image_size=8, seed=1, pictures_per_epoch=24, labelled_share=0.25)
    one = Loader(index, batch_size=8, **options)
    two = [Loader(index, batch_size=4, rank=rank, world_size=2, **options) for rank in range(2)]
    for epoch in range(3):
        assert len(one.batches(epoch)) == 3
        for whole, *parts in zip(one.batches(epoch), *(loader.batches(epoch) for loader in two)):
            assert sorted(whole) == sorted(row for part in parts for row in part)
            assert [sum(row % 5 == 0 for row in part) for part in parts] == [1, 1]
    for workers in (0, 2):
        batches = list(Loader(index, batch_size=8, workers=workers, **options).epoch(1, start=1))
        assert [batch.indices.tolist() for batch in batches] == one.batches(1)[1:]
        for batch in batches:
            assert batch.is_labelled.tolist() == [row % 5 == 0 for row in batch.indices.tolist()]


# ---------------------------------------------------------------- wrong variants of both rules


def check_draw(draw):
    """Eight pictures, three classes, a rule that a hand can follow: b is the rarest, then c, then a."""
    index = index_of([[0], [0, 1], [0, 2], [1, 2], [0], [2], [0, 2], [0]], ignored=(3,))
    for seed in range(6):
        generator = U.seeded_generator(Stream.LABELLED, seed)
        order = U.torch.randperm(8, generator=generator).tolist()
        rows = draw(index, 1, seed)
        assert set(rows) == reference_draw(index, 1, order) and rows == sorted(rows)


def check_order(order):
    """Two epochs of two batches, place by place; with a share of 0.3 the batches differ by one."""
    kinds = ([10, 11], [20, 21, 22])
    for share in (0.25, 0.3):
        stream = reference_stream(kinds, share, 0, 16)
        for epoch in range(2):
            rows = order(kinds, share, seed=0, epoch=epoch, per_epoch=8, batch_size=4)
            for start in (0, 4):
                wanted = stream[8 * epoch + start :][:4]
                assert rows[start : start + 4] == sorted(wanted, key=lambda row: row >= 20)


WRONG = {
    "the rarest class chooses last": (U.draw_per_class, Edit("(total[label], label)", "(-total[label], label)")),
    "a picture counts for two classes": (U.draw_per_class, Edit("if row not in drawn and label", "if label")),
    "ignored objects count": (U.draw_per_class, Edit("sample.labels[~sample.ignore]", "sample.labels")),
    "every seed draws the same": (U.draw_per_class, Edit("Stream.LABELLED, seed", "Stream.LABELLED, 0")),
    "one picture too many": (U.draw_per_class, Edit("[:count]\n", "[: count + 1]\n")),
    "an epoch begins anew": (mixed_order, Edit("epoch * per_epoch, (epoch + 1) * per_epoch", "0, per_epoch")),
    "a share of the others": (mixed_order, Edit("math.floor(place * exact)", "math.floor(place * (1 - exact))")),
    "rounded up": (mixed_order, Edit("math.floor(place", "math.ceil(place")),
    "both in one order": (mixed_order, Edit(", Stream.UNLABELLED_ORDER)", ")")),
    "the others come first": (
        mixed_order,
        Edit("labelled[a:b] + others[start - a : end - b]", "others[start - a : end - b] + labelled[a:b]"),
    ),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_wrong_variants_are_told(wrong):
    for function, check in ((U.draw_per_class, check_draw), (mixed_order, check_order)):
        if wrong is None:
            check(function)
        elif WRONG[wrong][0] is function:
            with pytest.raises(AssertionError):
                check(apply_edit(*WRONG[wrong]))
