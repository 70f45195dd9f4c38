"""engine/training/inputs.py: a path whose contents changed is another input."""

import dataclasses

import numpy as np
import pytest

import train
from datasets.index import DatasetIndex
from engine.training.inputs import KnownInputs, digest_of_labels, inputs_of_resumed, labels_of, weights_of
from errors import UserError
from tests.datasets.test_unlabelled import index_of
from tests.tiny_training import tiny_config, write_dataset


def test_a_resumed_run_notices_other_test_labels(tmp_path):
    config = tiny_config(write_dataset(tmp_path / "data", train=8, test=4), tmp_path / "runs", epochs=1)
    report = train.run(config, quiet=True)
    name = labels_of(config.data.test_place, config.data)
    assert set(report["inputs"]) == {name, labels_of(config.data.train_place, config.data)}
    path = tmp_path / "data" / "labels" / "test" / "000.txt"
    before = path.read_text()
    path.write_text("0 0.5 0.5 0.2 0.2\n")
    longer = dataclasses.replace(config, epochs=2)
    with pytest.raises(UserError, match=rf"the {name} are not those that the run started with \(--allow-change data"):
        train.run(longer, resume=True, allow_change=("epochs",), quiet=True)
    path.write_text(before)
    assert train.run(longer, resume=True, allow_change=("epochs",), quiet=True)["inputs"] == report["inputs"]


def test_weights_that_a_run_learns_from(tmp_path):
    (tmp_path / "run" / "weights").mkdir(parents=True)
    for file in ("start.pt", "big.pt", "run/weights/last.pt"):
        (tmp_path / file).write_bytes(file.encode())
    teachers = [
        {"name": name, "arch": "yolov8n", "weights": weights and str(tmp_path / weights)}
        for name, weights in {"big": "big.pt", "of_run": "run", "absent": "absent.pt", "in_place": None}.items()
    ]
    student = {"weights": str(tmp_path / "start.pt")}
    config = tiny_config(tmp_path, tmp_path / "runs", teachers=teachers, student=student)
    found = weights_of(config)
    assert [name.removeprefix(f"weights {tmp_path}/") for name in found] == ["big.pt", "run", "start.pt"]
    assert set(weights_of(config, is_resumed=True)) == set(found) - {f"weights {tmp_path / 'start.pt'}"}
    first, *rest = found
    assert list(weights_of(config, known={first: ""})) == rest
    (tmp_path / "run" / "weights" / "last.pt").write_bytes(b"trained anew")
    now = weights_of(config)
    assert [name for name in found if now[name] != found[name]] == [f"weights {tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"^runs/a: the weights .*run are not those that the run started with"):
        inputs_of_resumed(found, now, config.data, ("data",), "runs/a")
    assert inputs_of_resumed(found, now, config.data, ("teachers",), "runs/a") == now
    assert inputs_of_resumed({}, now, config.data, (), "runs/a") == now  # a checkpoint from before inputs were saved
    known = KnownInputs()
    known.add("runs/a", found)
    known.add("runs/a", found)
    with pytest.raises(UserError, match=r"^runs/b: the weights .*run are not those of runs/a: changed in between"):
        known.add("runs/b", now)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_of_a_split_are_covered_by_its_own_key(split, tmp_path):
    data = tiny_config(tmp_path, tmp_path / "runs").data
    name = labels_of(getattr(data, f"{split}_place"), data)
    before, now = {name: "a", "labels of another": "c"}, {name: "b"}
    for allowed in ((), ("teachers",), ("data.test" if split == "train" else "data.train",)):
        with pytest.raises(UserError, match=rf"the {name} are not those .* \(--allow-change data\.{split} if"):
            inputs_of_resumed(before, now, data, allowed, "runs/a")
    assert inputs_of_resumed(before, now, data, (f"data.{split}",), "runs/a") == before | now


def test_labels_differ_by_what_only_the_evaluation_reads():
    index = index_of([[0], [1]])
    sample = index.samples[0]
    changes = ({"crowd": ~sample.crowd}, {"area": sample.area + 1}, {"labels": 1 - sample.labels})
    others = [DatasetIndex(index.names, (dataclasses.replace(sample, **c), *index.samples[1:])) for c in changes]
    assert len({digest_of_labels(one) for one in (index, *others)}) == 4
    again = DatasetIndex(index.names, tuple(dataclasses.replace(s, area=np.array(s.area)) for s in index.samples))
    assert digest_of_labels(again) == digest_of_labels(index)
