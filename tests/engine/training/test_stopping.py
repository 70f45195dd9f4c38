"""How a run stops: numbers that are not finite, memory, the disk, signals; and what --resume accepts."""

import dataclasses
import errno
import json
import signal
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import train
from config import to_tree
from engine.runtime import claims, run_folder
from engine.runtime.interruption import StopSignals
from engine.training import reporting, starting, step
from engine.training.optimization import Ema
from engine.training.state import TrainingState, refuse_changes
from errors import UserError
from tests.tiny_training import write_dataset
from yolo.yolov8 import AnchorFreeDetector

pytestmark = pytest.mark.usefixtures("one_thread")


def fail_at(monkeypatch, calls, error):
    """Make the student's losses raise, or return a value, at the given call."""
    losses, count = AnchorFreeDetector.losses, [0]

    def patched(self, output, targets):
        terms = losses(self, output, targets)
        count[0] += 1
        if count[0] == calls:
            if isinstance(error, BaseException):
                raise error
            terms["cls"] = terms["cls"] * error
        return terms

    monkeypatch.setattr(AnchorFreeDetector, "losses", patched)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run(make_tiny, monkeypatch, value):
    config = make_tiny(save_every_steps=1)
    fail_at(monkeypatch, 5, value)
    with pytest.raises(UserError) as error:
        train.run(config, quiet=True)
    text = str(error.value)
    assert error.value.exit_code == 3 and "\n" not in text
    assert "step 4" in text and "cls is" in text and "box is" not in text and ".png" in text
    state = checkpoint.load(f"{config.runs}/tiny/weights/last.pt")
    assert state["step"] == 4 and all(torch.isfinite(v).all() for v in state["model"].values())
    details = json.loads((run_folder.Path(config.runs) / "tiny" / "nonfinite.json").read_text())
    assert len(details["pictures"]) == 8 and list(details["terms"]) == ["cls"]


def test_a_gradient_that_is_not_finite_stops_the_run(make_tiny, monkeypatch):
    config = make_tiny(save_every_steps=1)
    build = starting.build

    def spoil(*args):
        parts = build(*args)
        next(parts.student.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        return parts

    monkeypatch.setattr(starting, "build", spoil)
    with pytest.raises(UserError, match="the gradient's norm is") as error:
        train.run(config, quiet=True)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory(make_tiny, monkeypatch, failure):
    config = make_tiny(save_every_steps=1)
    fail_at(monkeypatch, 3, failure)
    with pytest.raises(UserError, match="batch_size") as error:
        train.run(config, quiet=True)
    assert error.value.exit_code == 4
    assert checkpoint.load(f"{config.runs}/tiny/weights/last.pt")["step"] == 2


def test_other_errors_are_not_hidden(make_tiny, monkeypatch):
    fail_at(monkeypatch, 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train.run(make_tiny(), quiet=True)


def test_full_disk_and_resume(make_tiny, monkeypatch):
    """The third save fails: the checkpoint of the second stays, and the run ends as if nothing had happened."""
    config = make_tiny(save_every_steps=1)
    write, count = checkpoint.write_durably, [0]

    def full(path, data):
        count[0] += path.name.startswith("last.pt")
        if count[0] == 3 and path.name.startswith("last.pt"):
            path.write_bytes(bytes(data)[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_durably", full)
        with pytest.raises(UserError, match="No space left") as error:
            train.run(config, quiet=True)
    assert error.value.exit_code == 5
    assert checkpoint.load(f"{config.runs}/tiny/weights/last.pt")["step"] == 2
    train.run(config, resume=True, quiet=True)
    train.run(dataclasses.replace(config, name="whole"), quiet=True)
    ends = [checkpoint.load(f"{config.runs}/{name}/weights/last.pt") for name in ("tiny", "whole")]
    for part in ("model", "ema"):
        assert all(torch.equal(value, ends[1][part][name]) for name, value in ends[0][part].items())


def interrupt_after(monkeypatch, step, number=signal.SIGINT):
    update = Ema.update

    def patched(self, done):
        update(self, done)
        if done == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Ema, "update", patched)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(make_tiny, monkeypatch, capsys, number, code):
    config = make_tiny()
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, number)
        with pytest.raises(SystemExit) as stop:
            train.run(config, quiet=True)
    assert stop.value.code == code and signal.getsignal(number) == before
    assert (
        capsys.readouterr().out
        == f"stopped, saved at step 2; go on with: python train.py --resume {config.runs}/tiny\n"
    )
    assert checkpoint.load(f"{config.runs}/tiny/weights/last.pt")["step"] == 2
    assert train.run(config, resume=True, quiet=True)["steps"] == 6


def test_a_second_signal_is_left_to_the_system():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT and stop.exit_code == 130
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_during_evaluation_stops_at_once(make_tiny, monkeypatch, capsys):
    config = make_tiny(evaluation={"every_epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(reporting, "evaluate", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train.run(config, quiet=True)
    assert stop.value.code == 143 and "saved at step 3" in capsys.readouterr().out
    assert train.run(config, resume=True, quiet=True)["steps"] == 6
    rows = run_folder.read_metrics(run_folder.Path(config.runs) / "tiny" / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(row["metrics/mAP50"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate"),
        ({"epochs": 3}, "epochs"),
        ({"student": {"arch": "yolov8s"}}, "student.arch"),
        ({"seed": 1}, "seed"),
        ({"terms": [{"teacher": "t", "loss": "mse", "weight": 1, "student_maps": ["p3"]}]}, "terms"),
    ],
)
def test_resume_refuses_another_config(make_tiny, monkeypatch, changes, key):
    config = make_tiny(epochs=1)
    if not (run_folder.Path(config.runs) / "tiny").exists():
        with monkeypatch.context() as patch:
            patch.setattr(train, "finish", lambda *args: {})
            train.run(config, quiet=True)
    with pytest.raises(UserError, match=f"key '{key}") as error:
        train.run(make_tiny(**{"epochs": 1} | changes), resume=True, quiet=True)
    assert "--allow-change" in str(error.value)


def test_an_allowed_change_counts_or_is_refused_before_anything_is_written(make_tiny, monkeypatch):
    config = make_tiny(epochs=1, optimizer={"backbone_factor": 0.5})
    train.run(config, quiet=True)
    folder = run_folder.Path(config.runs) / "tiny"
    contents = lambda: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before = contents()
    for changes, words in (({"backbone_factor": 1.0}, "has groups of"), ({"name": "adamw"}, "holds momentum")):
        changed = make_tiny(epochs=2, optimizer={"backbone_factor": 0.5} | changes)
        with pytest.raises(UserError, match=f"tiny: the saved optimizer {words}"):
            train.run(changed, resume=True, quiet=True, allow_change=("epochs", "optimizer"))
        assert contents() == before
    used = []
    monkeypatch.setattr(train, "train", lambda setup, *rest: used.append(setup.optimizer.param_groups))
    monkeypatch.setattr(train, "finish", lambda *rest: {})
    changed = make_tiny(epochs=2, optimizer={"backbone_factor": 0.2, "weight_decay": 0.25})
    train.run(changed, resume=True, quiet=True, allow_change=("epochs", "optimizer"))
    (groups,) = used
    assert [group["factor"] for group in groups] == [1, 1, 1, 0.2, 0.2, 0.2]
    assert [group["weight_decay"] for group in groups] == [0.25, 0, 0] * 2


@pytest.mark.parametrize("size", [24, 4])
def test_a_run_that_goes_on_with_other_batches_keeps_its_schedule(make_tiny, monkeypatch, size):
    """By its number of steps alone, that of larger batches would be over, and its rates negative."""
    config = make_tiny(epochs=3, optimizer={"warmup_epochs": 1, "learning_rate": 0.01, "final_fraction": 0.1})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)  # of 9: in the last epoch, after 16 of 24 pictures
        with pytest.raises(SystemExit):
            train.run(config, quiet=True)
    rates, numbers = [], []
    apply = step.apply_schedule

    def spy(optimizer, number, *rest, **options):
        rate = apply(optimizer, number, *rest, **options)
        numbers.append(number), rates.append(optimizer.param_groups[0]["lr"])
        return rate

    monkeypatch.setattr(step, "apply_schedule", spy)
    changed = dataclasses.replace(config, batch_size=size)
    train.run(changed, resume=True, quiet=True, allow_change=("batch_size",))
    expected = {24: [2, 2], 4: [16, 17, 17]}[size]  # of 3 and of 18; the last is that of the table
    assert numbers == expected
    assert rates == pytest.approx([0.01 * (1 - 0.9 * number / (3 * 24 / size)) for number in expected])
    row = run_folder.read_metrics(run_folder.Path(config.runs) / "tiny" / "metrics.csv")[-1]
    assert float(row["lr"]) == pytest.approx(rates[-1])


def test_the_schedule_counts_steps_of_several_batches():
    config = SimpleNamespace(optimizer=SimpleNamespace(accumulate=2))
    setup = SimpleNamespace(config=config, steps_per_epoch=2)  # of 3 batches
    states = [TrainingState(epoch=epoch, batch=batch) for epoch in (0, 1) for batch in (0, 2)]
    assert [step.scheduled_step(setup, state) for state in states] == [0, 1, 2, 3]


def test_an_epoch_counted_in_other_batches_has_the_same_means():
    state = TrainingState(batch=2, sums={"box": 3.0})
    state.count_in(4)
    assert state.batch == 4 and state.means() == {"box": 1.5}


def test_what_a_resumed_run_may_change(make_tiny):
    config = make_tiny()
    tree = to_tree(config)
    free = make_tiny(data={"workers": 2, "cache": False}, save_every_steps=7)
    refuse_changes(tree, dataclasses.replace(free, runs="elsewhere"), (), "x")
    longer = make_tiny(epochs=5)
    refuse_changes(tree, longer, ("epochs",), "x")
    with pytest.raises(UserError, match="started with 2, found 5"):
        refuse_changes(tree, longer, ("optimizer",), "x")


def test_resume_refuses_other_pictures(make_tiny, tmp_path):
    data = write_dataset(tmp_path / "other")
    config = make_tiny(epochs=2, data={"root": str(data)})
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit):
            train.run(config, quiet=True)
    label = data / "labels" / "train" / "003.txt"
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    with pytest.raises(UserError, match="not those that the run started with"):
        train.run(config, resume=True, quiet=True)


def test_resume_finds_the_run(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        run_folder.find(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="before its first checkpoint"):
        run_folder.find(tmp_path / "empty")


def test_a_resumed_run_holds_its_claim_and_removes_what_a_killed_process_left(make_tiny, monkeypatch):
    config, held = make_tiny(epochs=1), []
    train.run(config, quiet=True)
    folder = run_folder.find(f"{config.runs}/{config.name}")
    (folder.path / "weights" / "last.pt.tmp").write_bytes(b"")
    monkeypatch.setattr(train, "finish", lambda setup, *_: held.append(setup.claim))
    train.run(config, quiet=True, resume=True)
    assert held[0] is not None and not list(folder.path.rglob("*.tmp"))


def test_a_new_run_releases_its_claim(make_tiny):
    config = make_tiny(epochs=1)
    train.run(config, quiet=True)
    claims.take(run_folder.find(f"{config.runs}/{config.name}").path).release()  # refused while another one holds it


def test_a_finished_run_says_that_no_epoch_is_left(make_tiny, capsys):
    config = make_tiny(epochs=1)
    done = train.run(config, quiet=True)
    assert train.run(config, resume=True)["test"] == done["test"]
    assert "epoch 1/1 was the last: only the test is left" in capsys.readouterr().out
