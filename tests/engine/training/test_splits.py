"""data.max_samples: which pictures a run takes from a dataset."""

import dataclasses
import shutil

import numpy as np
import pytest

from datasets.convert import convert
from datasets.open import open_dataset
from engine.training.splits import hold_out, take
from errors import UserError
from tests.tiny_training import open_splits, tiny_config, write_dataset


@pytest.fixture
def make(tmp_path):
    """Splits and config of a run on 12 training pictures, with these keys under `data`."""
    write_dataset(tmp_path / "set", train=12, test=3)

    def splits(seed=0, **data):
        config = tiny_config(tmp_path / "set", tmp_path / "runs", data=data, seed=seed)
        return open_splits(config, lambda text: None)

    return splits


def names(index):
    return [sample.image_path.name for sample in index.samples]


def test_max_samples_takes_the_same_pictures_for_every_seed(make):
    whole, splits = make(), make(max_samples=7)
    assert len(splits.train) == 7 and names(splits.train) == sorted(set(names(splits.train)))
    assert set(names(splits.train)) < set(names(whole.train)) and names(splits.train) != names(whole.train)[:7]
    assert names(splits.test) == names(whole.test)
    assert names(make(seed=1, max_samples=7).train) == names(splits.train)
    assert names(make(max_samples=12).train) == names(make(max_samples=99).train) == names(whole.train)


def test_pictures_are_held_out_of_those_that_are_taken(make):
    held = make(max_samples=7, holdout_fraction=0.3)
    assert len(held.holdout) == 2 and sorted(names(held.train) + names(held.holdout)) == names(
        make(max_samples=7).train
    )


@pytest.mark.parametrize("part", ["holdout", "train"])
def test_a_part_without_an_object_is_refused(make, tmp_path, part):
    """Held-out pictures without one give every epoch the same score: the first would be the best."""
    splits = make(holdout_fraction=0.3)
    for name in names(getattr(splits, part)):
        (tmp_path / "set" / "labels" / "train" / name).with_suffix(".txt").write_text("")
    with pytest.raises(
        UserError, match=r"^key 'data.holdout_fraction': 0.3 of 12 .* part: \d pictures and not one obj"
    ):
        make(holdout_fraction=0.3)
    assert make().train.names  # without a part, the other objects are enough


def test_a_part_to_train_on_with_difficult_objects_alone_is_refused(make, tmp_path):
    """Training ignores them: nothing would be learnt."""
    splits, config = make(), tiny_config(tmp_path / "set", tmp_path / "runs", data={"holdout_fraction": 0.3})
    samples = tuple(dataclasses.replace(s, ignore=np.ones(len(s.labels), bool)) for s in splits.train.samples)
    difficult = dataclasses.replace(splits, train=dataclasses.replace(splits.train, samples=samples))
    with pytest.raises(UserError, match=r"0.3 of 12 pictures leaves a part: 8 pictures and not one object"):
        hold_out(difficult, config, lambda text: None)


def test_a_negative_number_is_refused(make):
    with pytest.raises(UserError, match=r"data.max_samples': found -2, expected a number, or -1 for all"):
        make(max_samples=-2)


def test_only_the_faults_of_taken_pictures_count(make, tmp_path):
    label = tmp_path / "set" / "labels" / "train" / "000.txt"
    label.write_text(label.read_text() + "0 0.5 0.5 0.2 nonsense\n")
    index = open_dataset("yolo", tmp_path / "set", "train")
    assert [fault.picture for fault in index.faults] == ["000.png"]
    counts = []
    for count in range(1, 13):
        taken = take(index, count)
        counts.append(len(taken.faults))
        assert counts[-1] == ("000.png" in names(taken)), count
    assert set(counts) == {0, 1}
    of_the_file = dataclasses.replace(index.faults[0], picture="")
    assert take(dataclasses.replace(index, faults=(of_the_file,)), 1).faults == (of_the_file,)


def test_training_pictures_of_another_root_and_format_with_the_test_split_of_the_first(make, tmp_path):
    write_dataset(tmp_path / "other", train=4, test=1)
    convert("yolo", tmp_path / "other", ["train"], "voc", tmp_path / "voc")
    whole = make()
    for data in ({"train_root": str(tmp_path / "other")}, {"train_root": str(tmp_path / "voc"), "train_format": "voc"}):
        splits = make(**data)
        assert len(splits.train) == 4 and names(splits.test) == names(whole.test)
        assert str(splits.train.samples[0].image_path).startswith(data["train_root"])
        assert splits.test.samples[0].image_path == whole.test.samples[0].image_path


def test_training_pictures_of_other_classes_or_of_no_root_are_refused(make, tmp_path):
    write_dataset(tmp_path / "other", train=2, test=1)
    text = (tmp_path / "other" / "data.yaml").read_text()
    (tmp_path / "other" / "data.yaml").write_text(text.replace("[green, red]", "[red, green]"))
    with pytest.raises(UserError, match=r"other: the classes of 'train' are red, green; expected those of 'test' in"):
        make(train_root=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"data.train_format': found voc without data.train_root"):
        make(train_format="voc")
    with pytest.raises(UserError, match=r"data.pictures_per_epoch': found -1"):
        make(pictures_per_epoch=-1)


def copy_to_test(root, names):
    """Training pictures under other names among the test pictures, with their labels."""
    for name in names:
        for kind, suffix in (("images", "png"), ("labels", "txt")):
            shutil.copy(root / kind / "train" / f"{name}.{suffix}", root / kind / "test" / f"copy_{name}.{suffix}")


def test_pictures_of_both_splits_are_named(make, tmp_path):
    copy_to_test(tmp_path / "set", ["003", "007"])
    splits = make()
    note = "2 of 5 pictures of test are also in train (2 the same bytes), such as "
    assert note in splits.reports["test"].table() and "copy_003.png" in splits.reports["test"].table()
    assert [len(overlap.shared) for overlap in splits.overlaps] == [2]
    used = make(max_samples=6)
    expected = sum(f"{name}.png" in names(used.train) for name in ("003", "007"))
    assert len(used.overlaps[0].shared) == expected  # of the pictures that are trained on


def test_a_test_split_of_training_pictures_is_refused(make, tmp_path):
    with pytest.raises(UserError, match=r"12 of 12 pictures of test are also in train .* data.allow_overlap=true"):
        make(test="train")
    with pytest.raises(UserError, match=r"12 of 12"):
        make(test="train", max_samples=3)  # the split is the same, whatever is taken of it
    splits = make(test="train", allow_overlap=True, max_samples=3)
    assert len(splits.overlaps[0].shared) == 3
    for path in (tmp_path / "set" / "images" / "test").iterdir():
        path.unlink()
    copy_to_test(tmp_path / "set", ["001"])
    with pytest.raises(UserError, match=r"1 of 1 pictures of test are also in train \(1 the same bytes\)"):
        make()


def test_a_held_out_picture_that_is_trained_on_under_another_name_is_named(make, tmp_path):
    root = tmp_path / "set"
    for number in range(12):  # each picture twice
        for kind, suffix in (("images", "png"), ("labels", "txt")):
            source = root / kind / "train" / f"{number:03}.{suffix}"
            shutil.copy(source, source.with_name(f"{number:03}_again.{suffix}"))
    splits = make(holdout_fraction=0.25)
    test, held = splits.overlaps
    kept, out = ({name[:3] for name in names(index)} for index in (splits.train, splits.holdout))
    assert not test.shared and len(held.shared) == sum(name[:3] in kept for name in names(splits.holdout)) > 0
    assert kept & out


def test_a_test_split_of_difficult_objects_alone_is_refused_where_they_do_not_count(make, tmp_path):
    make()
    convert("yolo", tmp_path / "set", ["train", "test"], "voc", tmp_path / "voc")
    for stem in (tmp_path / "voc" / "ImageSets" / "Main" / "test.txt").read_text().split():
        path = tmp_path / "voc" / "Annotations" / f"{stem}.xml"
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))
    data = {"format": "voc"}
    for evaluation in ({}, {"protocol": "voc12", "ignore_difficult": False}):
        config = tiny_config(tmp_path / "voc", tmp_path / "runs", data=data, evaluation=evaluation)
        with pytest.raises(UserError, match=r"voc test: 3 pictures and not one object.* to be ignored, and no others"):
            open_splits(config, lambda text: None)
    config = tiny_config(tmp_path / "voc", tmp_path / "runs", data=data, evaluation={"ignore_difficult": False})
    assert len(open_splits(config, lambda text: None).test) == 3
