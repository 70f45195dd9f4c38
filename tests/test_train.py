"""The training loop: what a run writes, what it refuses, and how it stops."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import models
import train
from config import load_config
from engine.drawing.predictions import TILE
from engine.runtime import run_folder
from engine.runtime.processes import Processes, choose_device, use_bfloat16
from engine.training import building, reporting, run_pictures, starting, step
from engine.training.dry_run import losses_of_batch
from engine.training.optimization import Ema
from engine.training.state import TrainingState
from errors import UserError
from layers.fusion import fuse
from tests.tiny_training import open_splits, tiny_config
from weights import read_state_dict, to_half

pytestmark = pytest.mark.usefixtures("one_thread")


def teacher_file(folder, names=("green", "red")):
    torch.manual_seed(1)
    model = models.build("yolov8_narrow", len(names))
    path = folder / "teacher.pt"
    state = {"arch": "yolov8_narrow", "names": list(names), "image_size": 64}
    checkpoint.save(path, state | {"ema": model.state_dict()})
    return path, model


TERMS = [
    {"teacher": "t", "loss": "mse", "weight": 1, "student_maps": ["p3", "p5"], "adapter": "conv1x1"},
    {"teacher": "t", "loss": "soft_class", "weight": 0.5, "student_maps": ["class_logits"], "warmup_epochs": 1},
]


@pytest.fixture(scope="module")
def distilled(tiny_data, tmp_path_factory):
    """One run with everything on: teacher, terms, held-out pictures, evaluation each epoch, plots."""
    folder = tmp_path_factory.mktemp("distilled")
    path, teacher = teacher_file(folder)
    config = tiny_config(
        tiny_data,
        folder / "runs",
        teachers=[{"name": "t", "arch": "yolov8_narrow", "weights": str(path)}],
        terms=TERMS,
        data={"holdout_fraction": 0.25},
        evaluation={"every_epochs": 1},
    )
    given = {}
    build = building.build_teachers

    def keep(*args):
        teachers = build(*args)
        given.update(teachers.models)
        return teachers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "build_teachers", keep)
        patch.setattr(reporting, "draw", run_pictures.draw)
        report = train.run(config)
    return folder / "runs" / "tiny", config, report, teacher, given["t"]


def test_files_of_a_run(distilled):
    run, config, report, _, _ = distilled
    expected = {
        "config.yaml", "metrics.csv", "report.json", "weights/last.pt", "weights/student.safetensors",
        "weights/best.safetensors",
        "predictions.jpg", "distillation.jpg", "dataset/train/dataset_report.txt", "dataset/test/dataset_report.csv",
    }  # fmt: skip
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert expected <= written and not any(name.endswith((".tmp", ".prev.pt")) for name in written)
    assert sum((run / name).stat().st_size for name in written) <= 60_000_000
    assert load_config(run / "config.yaml") == building.with_published_settings(config)
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(report))
    with Image.open(run / "predictions.jpg") as picture:
        assert picture.width > 4 * TILE and picture.height > 4 * TILE  # eight pictures, each twice: two pairs to a line


def test_plots(distilled):
    pytest.importorskip("matplotlib")
    for name in ("results.png", "confusion_matrix.png", "pr_curve.png"):
        with Image.open(distilled[0] / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 5, name


def test_tensorboard(distilled):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(distilled[0]))
    events.Reload()
    rows = run_folder.read_metrics(distilled[0] / "metrics.csv")
    for name in ("train/box", "train/mse_t", "metrics/mAP50-95", "lr"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([float(row[name]) for row in rows], rel=1e-5)
    for name in ("predictions", "distillation/mse_t"):
        assert [event.step for event in events.Images(name)] == [1, 2]


def test_metrics_csv(distilled):
    text = (distilled[0] / "metrics.csv").read_text()
    assert text.splitlines()[0] == (
        "epoch,time,train/box,train/cls,train/dfl,train/mse_t,train/soft_class_t,"
        "metrics/precision,metrics/recall,metrics/mAP50,metrics/mAP50-95,"
        "metrics/AP50,metrics/AP55,metrics/AP60,metrics/AP65,metrics/AP70,"
        "metrics/AP75,metrics/AP80,metrics/AP85,metrics/AP90,metrics/AP95,lr"
    )
    rows = run_folder.read_metrics(distilled[0] / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:  # every term acts and is logged
        assert all(float(row[name]) > 0 for name in row if name.startswith("train/"))


def test_report(distilled):
    _, config, report, _, _ = distilled
    assert {"precision", "recall", "f1", "mAP50", "mAP50-95"} <= set(report["test"])
    per_iou = [report["test"][column.removeprefix("metrics/")] for column in run_folder.AP_COLUMNS]
    assert len(per_iou) == 10 and np.mean(per_iou) == pytest.approx(report["test"]["mAP50-95"])
    assert per_iou[0] == report["test"]["mAP50"] and per_iou == sorted(per_iou, reverse=True)
    assert report["steps"] == 6 and report["epochs"] == 2 and report["seed"] == config.seed
    assert report["parameters"] == sum(p.numel() for p in models.build("yolov8_narrow", 2).parameters())
    assert report["device"] == "cpu" and report["precision"] == "float32" and report["torch"] == torch.__version__
    assert report["seconds"] > 0 and report["images_per_second"] == pytest.approx(36 / report["seconds"])
    for name in ("mse_t", "soft_class_t"):
        found = report["distillation"][name]
        assert 0 < found["lowest"] <= found["highest"] and found["stayed"] == (
            0.01 <= found["lowest"] and found["highest"] <= 2
        )
    assert report["best_on_holdout"]["epoch"] in (1, 2) and "mAP50" in report["best_on_holdout"]["test"]


def test_teacher_is_untouched_and_not_saved(distilled):
    run, _, _, before, teacher = distilled
    before = fuse(before).state_dict()  # as a run folds it, to the last bit
    assert before.keys() == teacher.state_dict().keys()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not teacher.training and all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    state = checkpoint.load(run / "weights" / "last.pt")
    tensors = sum(t.numel() for t in state["model"].values())
    student = models.build("yolov8_narrow", 2).state_dict()
    assert tensors == sum(t.numel() for t in student.values())
    assert set(state["model"]) == set(state["ema"]) == set(student)
    assert all(name.startswith("adapters.") for name in state["criterion"])


def test_files_to_hand_on(distilled):
    run = distilled[0]
    last = checkpoint.load(run / "weights" / "last.pt")
    for name in ("student", "best"):
        state, info = read_state_dict(run / "weights" / f"{name}.safetensors")
        assert list(state) == list(last["ema"])
        assert {key: info.ours[key] for key in ("arch", "names", "image_size", "config", "versions")} == {
            key: json.loads(json.dumps(last[key])) for key in ("arch", "names", "image_size", "config", "versions")
        }
    assert info.dtypes["float32"] and "float16" not in info.dtypes
    student, info = read_state_dict(run / "weights" / "student.safetensors")
    assert (info.ours["epoch"], info.ours["step"]) == (2, 6)
    for name, value in to_half(last["ema"], "").items():
        assert torch.equal(student[name], value), name
    whole, handed_on = checkpoint.load_model(run)[1], checkpoint.load_model(run / "weights" / "student.safetensors")[1]
    assert whole == handed_on


def test_adapters_learn(distilled):
    run, config, _, _, _ = distilled
    state = checkpoint.load(run / "weights" / "last.pt")["criterion"]
    fresh = building.build(config, Processes("cpu"), None, lambda line: None).criterion.state_dict()
    assert set(state) == set(fresh) and len(state) >= 4
    assert all(not torch.equal(state[name], fresh[name]) for name in state if name.endswith("weight"))


def test_last_checkpoint_loads_as_a_model(distilled):
    run = distilled[0]
    model, info = checkpoint.load_model(run / "weights" / "last.pt")
    assert info.names == ("green", "red") and info.step == 6 and not model.training
    ema = checkpoint.load(run / "weights" / "last.pt")["ema"]
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())


def test_same_seed_same_bytes_and_next_name(make_tiny):
    config = make_tiny(epochs=1)
    states = []
    for name in ("tiny", "tiny2"):
        report = train.run(config, quiet=True)
        assert report["name"] == name
        states.append(checkpoint.load(f"{config.runs}/{name}/weights/last.pt"))
    other = train.run(dataclasses.replace(config, seed=1, name="other"), quiet=True)
    different = checkpoint.load(f"{config.runs}/{other['name']}/weights/last.pt")
    for part in ("model", "ema"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
        assert not all(torch.equal(value, different[part][name]) for name, value in states[0][part].items())


def test_accumulation_counts_steps(make_tiny):
    config = make_tiny(epochs=2, optimizer={"accumulate": 2})
    report = train.run(config, quiet=True)
    assert report["steps"] == 4  # 3 batches an epoch: groups of 2 and 1
    state = checkpoint.load(f"{config.runs}/tiny/weights/last.pt")
    assert state["position"]["images"] == 48 and state["position"]["epoch"] == 2


@pytest.mark.parametrize("sum_over_batch", [True, False])
def test_accumulated_gradient(make_tiny, monkeypatch, sum_over_batch):
    """What the optimizer sees after two batches is the sum of each batch's loss times its size, or the mean."""
    off = dict.fromkeys(("mosaic", "scale", "translate", "flip_horizontal", "hue", "saturation", "value"), 0.0)
    settings = {"accumulate": 2, "clip_norm": 0.0, "sum_over_batch": sum_over_batch, "warmup_epochs": 0}
    config = make_tiny(epochs=1, batch_size=16, optimizer=settings, augment=off)
    parts = building.build(config, Processes("cpu"), None, lambda line: None)
    expected = None
    for number, batch in enumerate(parts.loader.epoch(0)):
        images, targets, _ = step.augment_batch(parts, batch, 0, number)
        parts.learner.train()
        loss = sum(losses_of_batch(parts, images, targets, {}, 0.0).values())
        (loss * (len(batch) if sum_over_batch else 0.5)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in parts.student.named_parameters()}

    seen = {}
    build = starting.build

    def spy(*args):
        parts = build(*args)
        step = parts.optimizer.step

        def record():
            seen.update({name: p.grad.clone() for name, p in parts.student.named_parameters()})
            step()

        parts.optimizer.step = record
        return parts

    monkeypatch.setattr(starting, "build", spy)
    train.run(config, quiet=True)
    assert [len(batch) for batch in parts.loader.epoch(0)] == [16, 8]
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_is_clipped(make_tiny, monkeypatch):
    config = make_tiny(epochs=1, optimizer={"clip_norm": 0.5})
    norms = []
    update = Ema.update
    build = starting.build

    def spy(*args):
        parts = build(*args)
        step = parts.optimizer.step

        def record():
            norms.append(torch.stack([p.grad.norm() for p in parts.student.parameters()]).norm().item())
            step()

        parts.optimizer.step = record
        return parts

    monkeypatch.setattr(starting, "build", spy)
    monkeypatch.setattr(Ema, "update", update)
    train.run(config, quiet=True)
    assert norms == [pytest.approx(0.5, rel=1e-3)] * 3


def test_early_stopping(make_tiny, monkeypatch):
    scores = iter([0.3, 0.5, 0.4, 0.45, 0.9, 0.9])
    numbers = lambda value: {"mAP50-95": value, "mAP50": value, "precision": value, "recall": value, "f1": value}
    monkeypatch.setattr(reporting, "evaluate", lambda *args, **kwargs: (numbers(next(scores)), None))
    config = make_tiny(epochs=10, patience=2, data={"holdout_fraction": 0.25}, evaluation={"every_epochs": 1})
    rows: list[dict] = []
    report = train.run(config, quiet=True, on_epoch=rows.append)
    assert report["epochs"] == 4  # best at 2, then two without a better one
    written = run_folder.read_metrics(run_folder.Path(config.runs) / "tiny" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and rows[1]["metrics/mAP50-95"] == 0.5
    for row, text in zip(rows, written, strict=True):
        assert {name: run_folder._cell(value) for name, value in row.items()} == text
    assert report["best_on_holdout"]["epoch"] == 2 and report["best_on_holdout"]["holdout mAP50-95"] == 0.5
    assert checkpoint.load_model(f"{config.runs}/tiny/weights/best.safetensors")[1].epoch == 2
    with pytest.raises(UserError, match="patience"):
        train.run(make_tiny(patience=2), quiet=True)


def test_position_is_over():
    config = dataclasses.replace(tiny_config(".", "."), epochs=5, patience=2)
    assert not TrainingState(epoch=4).is_over(config) and TrainingState(epoch=5).is_over(config)
    assert TrainingState(epoch=4, best=0.1, best_epoch=2).is_over(config)
    assert not TrainingState(epoch=3, best=0.1, best_epoch=2).is_over(config)


def test_holdout_is_a_partition_and_the_same_for_every_seed(make_tiny):
    quiet = lambda line: None
    config = make_tiny(data={"holdout_fraction": 0.25})
    splits = open_splits(config, quiet)
    names = lambda index: [sample.image_path.name for sample in index.samples]
    kept, held = names(splits.train), names(splits.holdout)
    assert len(held) == 6 and len(kept) == 18 and not set(kept) & set(held) and kept == sorted(kept)
    other = open_splits(dataclasses.replace(config, seed=5), quiet)
    assert names(other.holdout) == held
    for fraction in (0.001, 1.0, -0.1):
        with pytest.raises(UserError, match="holdout_fraction"):
            open_splits(make_tiny(data={"holdout_fraction": fraction}), quiet)


def test_mosaic_closes(make_tiny):
    config = make_tiny(epochs=12, augment={"mixup": 0.3, "close_mosaic_epochs": 4})
    closed = [step.augmentation_at(config, epoch).mosaic == 0 for epoch in range(12)]
    assert closed == [False] * 8 + [True] * 4
    assert step.augmentation_at(config, 11).scale == config.augment.scale


def test_dry_run(make_tiny, tmp_path, capsys):
    path, _ = teacher_file(tmp_path)
    teachers = [{"name": "t", "arch": "yolov8_narrow", "weights": str(path)}]
    train.dry_run(make_tiny(teachers=teachers, terms=TERMS, teacher_cache_gigabytes=1))
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 5 and "%" in line}
    assert set(rows) == {"box", "cls", "dfl", "mse_t", "soft_class_t"}
    for value, share, neck, student in rows.values():
        assert float(value) > 0 and 0 <= float(share.rstrip("%")) < 100 and float(neck) > 0 and float(student) > 0
    assert "887,022 parameters" in out and "learning rates at step 0 of 6" in out
    assert "objects after augmentation; terms weighted as at epoch 1\n" in out
    assert "adapters.mse_t.0.weight (32, 32, 1, 1)" in out
    assert not (tmp_path / "runs").exists()


def test_teachers_must_fit(make_tiny, tmp_path):
    path, module = teacher_file(tmp_path)
    entry = {"name": "t", "arch": "yolov8_narrow"}
    with pytest.raises(UserError, match=r"teachers\.0\.weights"):
        train.run(make_tiny(teachers=[entry], terms=TERMS), quiet=True)
    with pytest.raises(UserError, match="used twice"):
        train.run(make_tiny(teachers=[entry | {"weights": str(path)}] * 2, terms=TERMS), quiet=True)
    with pytest.raises(UserError, match="not among"):
        train.run(make_tiny(), teachers={"x": module}, quiet=True)
    other, _ = teacher_file(tmp_path, names=("cat", "dog"))
    with pytest.raises(UserError, match="no class in common"):
        train.run(make_tiny(teachers=[entry | {"weights": str(other)}], terms=TERMS), quiet=True)


def test_given_teacher(make_tiny):
    torch.manual_seed(3)
    teacher = models.build("yolov8_narrow", 2).train()
    config = make_tiny(epochs=1, teachers=[{"name": "t", "arch": "yolov8_narrow"}], terms=TERMS)
    train.run(config, teachers={"t": teacher}, quiet=True)
    assert not teacher.training
    rows = run_folder.read_metrics(run_folder.Path(config.runs) / "tiny" / "metrics.csv")
    assert float(rows[0]["train/mse_t"]) > 0


def test_starts_from_weights(make_tiny, distilled):
    file = distilled[0] / "weights" / "best.safetensors"
    config = make_tiny(student={"weights": str(file)})
    splits = open_splits(config, lambda line: None)
    student = building.build_student(config, splits.names)
    ema = read_state_dict(file)[0]
    assert all(torch.equal(value, ema[name]) for name, value in student.state_dict().items())


def test_bfloat16_and_contiguous(make_tiny):
    """The other precision and layout give the same loss to bfloat16's rounding."""
    losses = []
    for changes in ({"precision": "bfloat16"}, {"channels_last": False}, {}):
        parts = building.build(make_tiny(**changes), Processes("cpu"), None, lambda line: None)
        images, targets, _ = step.augment_batch(parts, next(parts.loader.epoch(0)), 0, 0)
        assert images.is_contiguous(memory_format=torch.channels_last) == parts.config.channels_last
        terms = losses_of_batch(parts, images, targets, {}, 0.0)
        assert all(term.dtype == torch.float32 for term in terms.values())
        losses.append(sum(terms.values()).item())
    assert losses[0] == pytest.approx(losses[2], rel=0.05) and losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_without_optional_libraries(tiny_data, tmp_path, monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] in ("matplotlib", "tqdm", "tensorboard") or name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(reporting, "draw", run_pictures.draw)
    train.run(tiny_config(tiny_data, tmp_path / "runs", epochs=1))
    out = capsys.readouterr().out
    assert "tensorboard is not installed" in out and "matplotlib is not installed" in out
    assert (tmp_path / "runs" / "tiny" / "report.json").is_file()
    assert (tmp_path / "runs" / "tiny" / "predictions.jpg").is_file()


def test_command_line(tiny_data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "run", lambda config, **options: calls.append((config, options)))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: x\ndata: {{format: yolo, root: '{tiny_data}'}}\nstudent: {{arch: yolov8n}}\nruns: {tmp_path}/runs\n"
    )
    train.main([str(path), "epochs=3", "optimizer.momentum=0.5"])
    assert calls[-1][0].epochs == 3 and calls[-1][1] == {"resume": False, "allow_change": ()}
    folder, *_ = run_folder.create(calls[-1][0])
    checkpoint.save(folder.last, {"step": 1})
    train.main(["--resume", str(folder.path), "epochs=4", "--allow-change", "epochs"])
    assert calls[-1][0].epochs == 4 and calls[-1][1] == {"resume": True, "allow_change": ("epochs",)}
    train.main(["--resume", str(folder.last)])
    assert calls[-1][0].epochs == 3 and calls[-1][0].name == "x"
    with pytest.raises(UserError, match="no config given"):
        train.main([])
    with pytest.raises(UserError, match="absent"):
        train.main(["absent.yaml"])


def test_metrics_are_replaced_not_duplicated(tmp_path):
    path = tmp_path / "metrics.csv"
    for epoch, value in ((1, 0.5), (2, 0.4), (3, 0.3)):
        run_folder.append_metrics(path, {"epoch": epoch, "time": 1.0, "train/box": value, "lr": 0.1})
    run_folder.append_metrics(path, {"epoch": 2, "time": 1.0, "train/box": 0.9, "train/kd": 1.0, "lr": 0.1})
    rows = run_folder.read_metrics(path)
    assert [(row["epoch"], row["train/box"], row["train/kd"]) for row in rows] == [("1", "0.5", ""), ("2", "0.9", "1")]


def test_names_of_runs(make_tiny):
    with pytest.raises(UserError, match="name of a folder"):
        run_folder.create(make_tiny(name="a/b"))
    with pytest.raises(UserError, match="name of a folder"):
        run_folder.create(make_tiny(name=".."))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="key 'device'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            choose_device("cuda:0")
    assert use_bfloat16("bfloat16", torch.device("cpu")) and not use_bfloat16("float32", torch.device("cpu"))
