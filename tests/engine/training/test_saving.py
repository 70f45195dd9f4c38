"""What the end of a run leaves in weights/: a small file to hand on, and one whole checkpoint."""

from types import SimpleNamespace

import pytest
import torch

import checkpoint
import models
from engine.runtime.run_folder import RunFolder
from engine.training import saving
from engine.training.state import TrainingState
from errors import UserError
from tests.tiny_training import tiny_config
from weights import file_of_run, read_state_dict


@pytest.fixture
def finished(tmp_path):
    """A run of which all but the end is done: (setup, folder, lines that were said)."""
    torch.manual_seed(0)
    config = tiny_config(tmp_path, tmp_path, student={"arch": "yolov8_narrow"})
    ema = SimpleNamespace(model=models.build("yolov8_narrow", 2))
    setup = SimpleNamespace(config=config, ema=ema, splits=SimpleNamespace(names=("green", "red")))
    folder = RunFolder(tmp_path / "tiny")
    for step in (1, 2):
        checkpoint.save(folder.last, {"step": step}, keep_previous=True)
    return setup, folder, []


def finish(setup, folder, said) -> None:
    state = TrainingState(step=2, epoch=1)
    saving.finish_weights(setup, state, folder, SimpleNamespace(say=said.append))


def test_one_whole_checkpoint_and_a_file_to_hand_on_stay(finished):
    setup, folder, said = finished
    finish(*finished)
    assert sorted(path.name for path in folder.last.parent.iterdir()) == ["last.pt", "student.safetensors"] and not said
    model, info = checkpoint.load_model(folder.student)
    assert (info.arch, info.names, info.epoch, info.step) == ("yolov8_narrow", ("green", "red"), 1, 2)
    written = model.state_dict()
    for name, value in setup.ema.model.named_parameters():
        assert torch.equal(written[name], value.half().float()), name


def test_a_damaged_checkpoint_keeps_the_one_before(finished):
    _, folder, said = finished
    whole = bytearray(folder.last.read_bytes())
    whole[len(whole) // 2] ^= 1
    folder.last.write_bytes(whole)
    finish(*finished)
    assert checkpoint.load(checkpoint.previous_path(folder.last))["step"] == 1
    assert len(said) == 1 and "last.pt: damaged" in said[0] and "kept: " in said[0] and "last.prev.pt" in said[0]


def test_numbers_beyond_float16_stay_float32(finished):
    setup, folder, said = finished
    with torch.no_grad():
        next(setup.ema.model.parameters()).view(-1)[0] = 1e5
    finish(*finished)
    assert len(said) == 1 and "has 100000, float16 ends at 65504; written as float32" in said[0]
    state, info = read_state_dict(folder.student)
    assert "float16" not in info.dtypes
    assert all(torch.equal(value, state[name]) for name, value in setup.ema.model.state_dict().items())


def test_a_full_disk_is_no_reason_for_float32(finished, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", refuse)
    with pytest.raises(UserError, match="could not be written: No space left") as error:
        finish(*finished)
    assert error.value.exit_code == 5 and not finished[2]
    assert checkpoint.previous_path(finished[1].last).is_file()


def test_the_file_that_stands_for_a_run(tmp_path):
    run = tmp_path / "runs.of" / "one"
    assert file_of_run(run) == run and file_of_run("a.pt") == file_of_run("./a.pt")
    for name in ("student.safetensors", "last.pt"):  # the whole one wins
        (run / "weights").mkdir(parents=True, exist_ok=True)
        (run / "weights" / name).touch()
        assert file_of_run(str(run)) == run / "weights" / name
