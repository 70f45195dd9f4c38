"""A second run on an unchanged COCO set does not read it: a new one, a resumed one, a dry run."""

import dataclasses
import os
import time

import pytest

import train
from datasets import open as opening
from datasets.convert import convert
from engine.runtime import claims, run_folder
from engine.training.dry_run import dry_run
from engine.training.splits import keep_indexes, kept_sets, open_indexes
from errors import UserError
from tests.engine.training.distributed_worker import train_quietly
from tests.forked_processes import run_group
from tests.tiny_training import tiny_config, write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    convert("yolo", write_dataset(tmp_path / "yolo"), ["train", "test"], "coco", tmp_path / "set")
    ago = time.time() - 1000
    for path in (tmp_path / "set", *(tmp_path / "set").rglob("*")):
        os.utime(path, (ago, ago))
    return tiny_config(tmp_path / "set", tmp_path / "runs", data={"format": "coco"}, epochs=1)


@pytest.fixture
def reads(monkeypatch):
    """The splits that are read, in their order."""
    splits, read = [], opening.read_coco

    def note(root, split, *rest):
        splits.append(split)
        return read(root, split, *rest)

    monkeypatch.setattr(opening, "read_coco", note)
    return splits


def kept_files(tmp_path):
    return sorted((tmp_path / "runs" / "opened_sets").glob("*"))


def test_runs_and_resumed_runs_share_what_the_first_one_read(config, reads, tmp_path):
    dry_run(config)
    assert reads == ["test", "train"] and not (tmp_path / "runs").exists()
    first = train.run(config, quiet=True)
    files = [path.name for path in kept_files(tmp_path)]
    assert reads == ["test", "train"] * 2 and len(files) == 3 and files[0] == claims.FOLDER
    second = train.run(config, quiet=True)
    longer = dataclasses.replace(config, epochs=2)
    train.run(longer, resume=True, quiet=True, allow_change=("epochs",))
    dry_run(config)
    assert len(reads) == 4 and second["test"] == first["test"]
    scans = [(tmp_path / "runs" / name / "dataset" / "train" / "dataset_report.txt") for name in ("tiny", "tiny2")]
    assert scans[0].read_text() == scans[1].read_text()
    label = next((tmp_path / "set").rglob("*train*.json"))
    label.write_text(label.read_text().replace('"iscrowd"', '"is_crowd"'))
    train.run(config, quiet=True)
    assert reads[4:] == ["train"]


def test_a_write_that_fails_leaves_nothing_that_counts(config, reads, tmp_path, monkeypatch):
    def fail(error):
        def replace(source, target):
            raise error

        return replace

    for error, raised in (
        (OSError(28, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        kept = kept_sets(config)
        open_indexes(config, kept)
        with monkeypatch.context() as patch, pytest.raises(raised) as caught:
            patch.setattr(run_folder.os, "replace", fail(error))
            keep_indexes(kept)
        assert not list((tmp_path / "runs").rglob("*.index"))
    assert len(reads) == 4 and caught.type is KeyboardInterrupt  # its half file, as after a kill, is never read
    keep_indexes(kept)
    assert [path.suffix for path in kept_files(tmp_path)] == ["", ".index", ".index"]
    open_indexes(config)
    assert len(reads) == 4


def test_two_runs_do_not_write_the_same_file_at_once(config, reads, tmp_path):
    kept = kept_sets(config)
    open_indexes(config, kept)
    (test, _), _ = files = list(kept.new_files())
    with claims.take(test):
        keep_indexes(kept)  # in one process a claim counts as another's
    assert [path.name for path in kept_files(tmp_path)][1:] == [files[1][0].name]


def train_without_reading(*arguments) -> None:
    """In a child process: whoever reads the set fails."""

    def refuse(*_):
        raise UserError("the set is read")

    opening.read_coco = refuse
    train_quietly(*arguments)


@pytest.mark.slow
def test_every_process_of_a_run_takes_it(config, tmp_path):
    def start(name, run=train_without_reading):
        arguments = [(dataclasses.replace(config, name=name), False, None)] * 2
        return [child.code for child in run_group(run, arguments, folder=tmp_path)]

    assert start("first", train_quietly) == [0, 0] and len(kept_files(tmp_path)) == 3
    assert start("second") == [0, 0]
    for path in (tmp_path / "runs" / "opened_sets").glob("*.index"):
        path.unlink()
    assert start("third") == [2, 2]
