"""From a folder of pictures to a trained model in two commands: VOC, COCO JSON and YOLO; and to a distilled one."""

import json

import pytest

import compare
import train
from datasets.convert import convert
from engine.runtime import run_folder
from engine.training import reporting
from tests.tiny_training import write_dataset

# Short runs of a small model: they would not find anything, but all of it is connected.
SMALL = (
    "student.arch=yolov8_narrow", "image_size=64", "batch_size=4", "epochs=1", "device=cpu", "precision=float32",
    "evaluation.every_epochs=0", "optimizer.warmup_epochs=0",
)  # fmt: skip


def write_raccoons(shared_data, folder):
    """Eight of the set's pictures, in its flat folders, with its lists in CSV."""
    for name in ("annotations", "images"):
        (folder / name).symlink_to(shared_data / "raccoon" / name)
    (folder / "data").mkdir()
    for split, count in (("train", 6), ("test", 2)):
        header, *rows = (shared_data / "raccoon" / "data" / f"{split}_labels.csv").read_text().splitlines()
        chosen = list(dict.fromkeys(row.split(",")[0] for row in rows))[:count]
        kept = [row for row in rows if row.split(",")[0] in chosen]
        (folder / "data" / f"{split}_labels.csv").write_text("\n".join([header, *kept]) + "\n")


def write_coco(shared_data, folder):
    """One JSON file for all pictures, that --init divides."""
    source = write_dataset(folder.parent / "source", train=8, test=1)
    convert("yolo", source, ("train",), "coco", folder)


def write_yolo(shared_data, folder):
    write_dataset(folder, train=6, test=2)


@pytest.mark.usefixtures("one_thread", "one_plot")
@pytest.mark.parametrize(
    ("write", "format"),
    [(write_raccoons, "voc"), (write_coco, "coco"), pytest.param(write_yolo, "yolo", marks=pytest.mark.slow)],
    ids=["voc", "coco", "yolo"],
)
def test_trained_and_distilled_in_two_commands_each(write, format, shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "draw", lambda *args: None)
    folder = tmp_path / "pictures"
    folder.mkdir()
    write(shared_data, folder)
    monkeypatch.chdir(tmp_path)

    train.main(["--init", "own.yaml", "--data", "pictures", *SMALL])
    assert f"pictures: {format}, " in capsys.readouterr().out
    train.main(["own.yaml"])
    report = json.loads((tmp_path / "runs" / "own" / "report.json").read_text())
    assert report["steps"] > 0 and (tmp_path / "runs" / "own" / "weights" / "last.pt").is_file()

    if format != "yolo":  # the second pair of commands reads the pictures as the first one does
        return
    train.main(["--init", "taught.yaml", "--data", "pictures", "--teacher", "yolov8_narrow", *SMALL])
    assert "next: python compare.py taught.yaml" in capsys.readouterr().out
    compare.main(["taught.yaml", "--rows", "distilled"])
    assert "| distilled |" in capsys.readouterr().out
    (row,) = run_folder.read_metrics(tmp_path / "runs" / "taught" / "distilled_seed0" / "metrics.csv")
    assert float(row["train/cwd_teacher"]) > 0
