"""benchmarks/epoch.py: contestants take turns, their parts become a table, and ours are those of real epochs."""

import io
import json
import subprocess
import sys

import pytest
import torch

import train
from benchmarks import epoch
from engine.training import reporting
from errors import UserError
from tests.tiny_training import write_dataset

# A contestant that writes down its turns: argv[1] its name, argv[2] the file, argv[3] the seconds of its epochs.
TURNS = f"""
import json, sys
for seconds in json.loads(sys.argv[3]):
    print(sys.argv[1], file=open(sys.argv[2], "a"))
    print("a line of progress\\n{epoch.MARK}" + json.dumps(dict.fromkeys({epoch.PARTS}, seconds)), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def yolo_set(tmp_path):
    root = write_dataset(tmp_path / "set", train=20, test=4)
    for kind in ("images", "labels"):
        (root / kind / "test").rename(root / kind / "val")
    text = (root / "data.yaml").read_text().replace("images/test", "images/val")
    (root / "data.yaml").write_text(text)
    return root


def popen(*arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def test_turns_and_table(yolo_set, tmp_path, capsys, monkeypatch):
    """Each part of our epoch takes 1 s, then 3 s, and of the peer's 2 s, then 4 s."""
    turns, seen = tmp_path / "turns", set()

    def start(side, variant, data, args):
        seen.add((len(list(data.glob("images/train/*.png"))), (data / "data.yaml").read_text().splitlines()[-1]))
        return popen(TURNS, f"{variant} {side}", str(turns), json.dumps([1, 3] if side == "ours" else [2, 4]))

    monkeypatch.setattr(epoch, "start", start)
    monkeypatch.setattr(epoch.importlib.util, "find_spec", lambda name: name == "ultralytics")
    epoch.main([str(yolo_set), "--pictures", "17", "--rounds", "2"])
    assert seen == {(17, "names: [green, red]")}
    contestants = [f"{variant} {side}" for variant in epoch.VARIANTS for side in epoch.CONTESTANTS]
    assert turns.read_text().splitlines() == 2 * contestants
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].split() == ["like", "for", "like,", "ours", "8.0", *["2.0", "(", "25", "%)"] * 4]
    assert rows[5].split()[:3] == ["default,", "Ultralytics", "12.0"]
    assert rows[6].startswith("like for like: 1.50 times") and rows[6].endswith("(by round: 2.00, 1.33)")
    with pytest.raises(UserError, match=r"20 pictures in images/train, expected 21"):
        epoch.main([str(yolo_set), "--pictures", "21"])


@pytest.mark.parametrize("variant", epoch.VARIANTS)
def test_ours_of_two_epochs(yolo_set, tmp_path, capsys, monkeypatch, variant):
    for module, names in ((train, ("train", "train_step", "augment_batch")), (reporting, ("evaluate",))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    with pytest.raises(SystemExit):  # no second "go"
        epoch.run_ours(yolo_set, variant, 64, torch.get_num_threads(), "student.arch=yolov8_narrow")
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith(epoch.MARK)]
    assert len(found) == 2
    assert all(min(json.loads(line.removeprefix(epoch.MARK)).values()) > 0 for line in found)
    assert (yolo_set / variant / "ours" / "weights" / "last.pt").is_file()


def test_the_parts_of_an_epoch(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 101.0, 103.0, 107.0, 0.0])
    monkeypatch.setattr(epoch.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    parts = epoch.PartsOfEpoch()
    parts.begin()  # at 100
    assert parts.around(lambda x: x + 1, "read and augment", "steps")(1) == 2  # from 101 to 103
    parts.end_epoch()  # at 107
    assert json.loads(capsys.readouterr().out.strip().removeprefix(epoch.MARK)) == {
        "read and augment": 1, "steps": 2, "evaluation": 0, "saving": 4,
    }  # fmt: skip
    assert set(parts.seconds.values()) == {0}


def test_a_contestant_that_fails_is_named():
    with (
        popen("print('out of luck'); raise SystemExit(3)") as process,
        pytest.raises(UserError, match="3: out of luck"),
    ):
        epoch.parts_of_epoch(process)
