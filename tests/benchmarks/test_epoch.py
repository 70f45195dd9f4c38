"""benchmarks/epoch.py: an epoch is the difference of two runs, and its parts are those of a real one."""

import pytest

from benchmarks import epoch
from errors import UserError
from tests.tiny_training import write_dataset


@pytest.fixture
def yolo_set(tmp_path):
    root = write_dataset(tmp_path / "set", train=20, test=4)
    for kind in ("images", "labels"):
        (root / kind / "test").rename(root / kind / "val")
    text = (root / "data.yaml").read_text().replace("images/test", "images/val")
    (root / "data.yaml").write_text(text)
    return root


def test_the_table(yolo_set, tmp_path, capsys, monkeypatch):
    """Ours takes 10 s to start and 2 s an epoch, the peer 20 s and 3 s; the part of the set has as many pictures."""
    found = {}

    def cost_of(command, threads):
        if command[0] == "peer":
            folder = next(word for word in command if word.endswith("data.yaml")).removesuffix("/data.yaml")
            found["pictures"] = len(list(epoch.Path(folder).glob("images/train/*.png")))
            found["names"] = epoch.Path(folder, "data.yaml").read_text().splitlines()[-1]
            epochs = int(command[5])
            return 20 + 3.0 * epochs, 2 * (20 + 3.0 * epochs)
        return 10 + 2.0 * int(command[-1].removeprefix("epochs=")), 2 * (10 + 2.0 * int(command[-1][-1]))

    done = type("Done", (), {"returncode": 0, "stdout": '{"steps": 3.0, "saving": 1.0}'})
    monkeypatch.setattr(epoch, "cost_of", cost_of)
    monkeypatch.setattr(epoch.subprocess, "run", lambda *_, **__: done)
    epoch.main([str(yolo_set), "--pictures", "17", "--rounds", "2", "--peers-python", "peer"])
    rows = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert found == {"pictures": 17, "names": "names: [green, red]"}
    assert rows[2] == ["like for like", "2.0", "1.50", "4.0", "1.50"]
    assert rows[5] == ["Ultralytics", "3.0", "1.00", "6.0", "1.00"]
    assert rows[6][0].startswith("steps") and rows[6][-2:] == ["75", "%"]
    with pytest.raises(UserError, match=r"20 pictures in images/train, expected 21"):
        epoch.main([str(yolo_set), "--pictures", "21"])


def test_the_parts_of_an_epoch(yolo_set, tmp_path):
    own = epoch.our_overrides(yolo_set, 64, tmp_path / "runs")
    seconds = epoch.parts([*own, *epoch.SAME, "student.arch=yolov8_narrow"])
    assert list(seconds) == ["read and augment", "steps", "evaluation", "saving"] and min(seconds.values()) > 0
    assert (tmp_path / "runs" / "parts" / "weights" / "last.pt").is_file()


def test_a_process_that_fails_is_named():
    with pytest.raises(UserError, match="exit code 3: out of luck"):
        epoch.cost_of([epoch.sys.executable, "-c", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"], 1)
