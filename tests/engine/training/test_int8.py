"""Fine-tuning for int8: ranges that move and stay, a resumed run, what a file of it is, and what is refused."""

import pytest
import torch

import checkpoint
import fine_tuning
import models
import train
from errors import UserError
from layers.int8 import has_int8, without_ranges
from tests.exporting import save_model
from tests.tiny_training import tiny_config, write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")
ARCH = "yolov8_narrow"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    data, weights = write_dataset(folder / "data", train=8, test=2), save_model(folder / "start.pt", ARCH)
    teachers = [{"name": "big", "arch": ARCH, "weights": str(weights)}]
    terms = [{"teacher": "big", "loss": "mse", "weight": 0.5, "student_maps": ["p3"]}]
    student = {"arch": ARCH, "weights": str(weights), "int8": {"pictures": 4, "percentile": 100.0}}

    def make(runs, **changes):
        changes = {"student": student, "teachers": teachers, "terms": terms, **changes}
        return tiny_config(
            data, folder / runs, epochs=3, optimizer={"warmup_epochs": 0.0, "learning_rate": 1e-3}, **changes
        )

    return make


class Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_and_a_resumed_one_end_with_the_same_bytes(make):
    whole, parts, ranges = make("whole"), make("parts"), []

    def look(row):
        state = checkpoint.load(f"{whole.runs}/tiny/weights/last.pt")["model"]
        others = without_ranges(state)
        ranges.append({name: value for name, value in state.items() if name not in others})

    def stop(row):
        if row["epoch"] == 1:
            raise Stop

    train.run(whole, quiet=True, on_epoch=look)
    with pytest.raises(Stop):
        train.run(parts, quiet=True, on_epoch=stop)
    train.run(parts, quiet=True, resume=True)
    saved = [checkpoint.load(f"{config.runs}/tiny/weights/last.pt") for config in (whole, parts)]
    for kind in ("model", "ema"):
        assert all(torch.equal(value, saved[1][kind][name]) for name, value in saved[0][kind].items())
    moved = lambda first, second: any(not torch.equal(first[name], second[name]) for name in first)
    assert moved(ranges[0], ranges[1]) and not moved(ranges[1], ranges[2])  # frozen_epochs: 1

    model, _ = checkpoint.load_model(f"{whole.runs}/tiny/weights/last.pt")
    assert has_int8(model)
    assert torch.equal(model.backbone.stem.int8.sum.high, saved[0]["ema"]["backbone.stem.int8.sum.high"])
    start = fine_tuning.start_model(ARCH, ("green", "red"), f"{whole.runs}/tiny/weights/last.pt", say=lambda line: None)
    assert not has_int8(start) and start.state_dict().keys() == models.build(ARCH, 2).state_dict().keys()
    norm = "backbone.stem.bn.running_mean"
    assert torch.equal(saved[0]["model"][norm], checkpoint.load_model(make("x").student.weights)[0].state_dict()[norm])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"arch": ARCH, "int8": {}}}, "'student.int8': needs a trained student"),
        ({"student": {"int8": {"percentile": 20.0}}}, "'student.int8.percentile': found 20.0, expected above 50"),
        ({"student": {"int8": {"frozen_epochs": -1}}}, "'student.int8.frozen_epochs': found -1, expected at least 0"),
        ({"compile": True}, "'compile': found true beside student.int8"),
        ({"precision": "bfloat16"}, "'precision': found bfloat16"),
    ],
)
def test_what_contradicts_int8_is_refused(make, changes, said):
    student = make("x").student
    if "weights" not in (own := changes.get("student", {})) and "arch" not in own and own:
        changes = {"student": {"arch": ARCH, "weights": student.weights, **own}}
    with pytest.raises(UserError, match=said):
        train.run(make("refused", **changes), quiet=True)
