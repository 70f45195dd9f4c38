"""A distilled run proves that it distils: terms act and are logged, adapters learn, the teacher stays what it is."""

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
import models
import train
from engine.runtime import run_folder
from engine.runtime.processes import Processes
from engine.runtime.progress import Progress
from engine.training import building, reporting, step, teaching
from engine.training.dry_run import losses_of_batch
from engine.training.state import TrainingState
from errors import UserError
from tests.tiny_training import SIZE, tiny_config, write_dataset

TERMS = [
    {"teacher": "big", "loss": "mse", "weight": 0.5, "student_maps": ["p3", "p4", "p5"], "adapter": "conv1x1"},
    {"teacher": "big", "loss": "cwd", "weight": 1.0, "student_maps": ["p3", "p4"], "adapter": "conv1x1_norm"},
    {"teacher": "big", "loss": "soft_class", "weight": 2.0, "student_maps": ["class_logits"]},
]
NAMES = ("mse_big", "cwd_big", "soft_class_big")


def save_teacher(path: Path, arch: str = "yolov8_narrow", names: tuple[str, ...] = ("green", "red")) -> Path:
    """A checkpoint of ours with fresh weights, of the arch that tiny_config trains: the maps are equally wide."""
    torch.manual_seed(1)
    model = models.build(arch, len(names))
    state = {"arch": arch, "names": list(names), "image_size": SIZE, "ema": model.state_dict()}
    checkpoint.save(path, state)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """One short distilled run, shared by the tests below."""
    root = tmp_path_factory.mktemp("distilled")
    write_dataset(root / "data")
    teacher = save_teacher(root / "teacher.pt")
    before = digest(teacher)
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(teacher)}]
    config = tiny_config(root / "data", root / "runs", teachers=teachers, terms=TERMS)
    model, _ = checkpoint.load_model(teacher)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    report = train.run(config, teachers={"big": model}, quiet=True)
    return config, report, model, kept, (before, digest(teacher))


def test_every_term_is_logged_and_above_zero(distilled):
    config, *_ = distilled
    rows = run_folder.read_metrics(Path(config.runs) / config.name / "metrics.csv")
    assert len(rows) == 2
    for row in rows:
        for name in ("box", "cls", "dfl", *NAMES):
            assert float(row[f"train/{name}"]) > 0, name


def test_the_teacher_is_unchanged(distilled):
    _, _, model, kept, digests = distilled
    state = model.state_dict()
    assert all(torch.equal(kept[name], state[name]) for name in kept)  # running statistics too
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert digests[0] == digests[1]


def test_adapters_learn_and_the_checkpoint_holds_no_teacher(distilled):
    config, *_ = distilled
    state = checkpoint.load(Path(config.runs) / config.name / "weights" / "last.pt")
    student = models.build("yolov8_narrow", 2)
    assert set(state["model"]) == set(state["ema"]) == set(student.state_dict())
    shapes = {name: tuple(value.shape) for name, value in state["criterion"].items() if name.endswith("weight")}
    assert len(shapes) == 5 and all(shape[2:] == (1, 1) for shape in shapes.values())
    optimizer_rows = state["optimizer"]["state"]
    assert len(optimizer_rows) == len(list(student.parameters())) + 5 + 3  # adapters: five weights, three biases
    total = sum(value.numel() for part in ("model", "ema", "criterion") for value in state[part].values())
    expected = 2 * sum(v.numel() for v in student.state_dict().values()) + sum(
        v.numel() for v in state["criterion"].values()
    )
    assert total == expected


def test_adapters_move_during_training(tmp_path):
    """The same run stopped after one epoch and after two has different adapters."""
    write_dataset(tmp_path / "data", train=8, test=2)
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "teacher.pt"))}]
    found = []
    for epochs in (1, 2):
        config = tiny_config(
            tmp_path / "data", tmp_path / "runs", name=f"e{epochs}", epochs=epochs, teachers=teachers, terms=TERMS[:1],
            optimizer={"schedule": "linear", "final_fraction": 1.0, "warmup_epochs": 0.0},
        )  # fmt: skip
        train.run(config, quiet=True)
        found.append(checkpoint.load(tmp_path / "runs" / f"e{epochs}" / "weights" / "last.pt")["criterion"])
    assert found[0].keys() == found[1].keys()
    assert all(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_distilled_student_ships_like_any_other(distilled):
    config, *_ = distilled
    model, info = checkpoint.load_model(Path(config.runs) / config.name / "weights" / "last.pt")
    assert info.arch == "yolov8_narrow" and info.names == ("green", "red")
    model(torch.zeros(1, 3, SIZE, SIZE))


def test_a_teacher_without_a_term_is_refused(tmp_path):
    write_dataset(tmp_path / "data", train=8, test=2)
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "teacher.pt"))}]
    config = tiny_config(tmp_path / "data", tmp_path / "runs", teachers=teachers, terms=[])
    with pytest.raises(UserError, match="no term names the teacher 'big'"):
        train.run(config, quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_other_classes_is_refused_for_logits(tmp_path):
    write_dataset(tmp_path / "data", train=8, test=2)
    teacher = save_teacher(tmp_path / "teacher.pt", names=("cat", "dog"))
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(teacher)}]
    config = tiny_config(tmp_path / "data", tmp_path / "runs", teachers=teachers, terms=TERMS[2:])
    with pytest.raises(UserError, match="no class in common"):
        train.run(config, quiet=True)
    assert not (tmp_path / "runs").exists()


def test_several_teachers_of_other_sizes_and_classes_and_the_student_itself(tmp_path):
    """One run: a teacher that sees larger pictures and knows half of the classes, one of two, and the average."""
    write_dataset(tmp_path / "data", train=8, test=2)
    one = save_teacher(tmp_path / "one.pt", names=("blue", "rouge", "GREEN"))
    two = save_teacher(tmp_path / "two.pt", arch="yolov5n")
    teachers = [
        {"name": "large", "arch": "yolov8_narrow", "weights": str(one), "image_size": 96, "aliases": {"red": "rouge"}},
        {"name": "anchors", "arch": "yolov5n", "weights": str(two)},
        {"name": "mean", "arch": "ema"},
    ]
    terms = [
        {"teacher": "large", "loss": "cwd", "weight": 1.0, "student_maps": ["p4"]},
        {"teacher": "large", "loss": "box_classes", "weight": 1.0},
        {"teacher": "anchors", "loss": "box_classes", "weight": 1.0, "parameters": {"at": "assigned"}},
        {"teacher": "mean", "loss": "soft_class", "weight": 1.0, "student_maps": ["class_logits"]},
    ]
    changes = dict(teachers=teachers, terms=terms, teacher_weighting="confidence", epochs=2)
    config = tiny_config(tmp_path / "data", tmp_path / "runs", **changes)
    report = train.run(config, quiet=True)
    assert set(report["distillation"]) == {"cwd_large", "box_classes_large", "box_classes_anchors", "soft_class_mean"}
    rows = run_folder.read_metrics(tmp_path / "runs" / "tiny" / "metrics.csv")
    assert all(float(rows[-1][f"train/{name}"]) > 0 for name in report["distillation"])
    state = checkpoint.load(tmp_path / "runs" / "tiny" / "weights" / "last.pt")
    assert not state["criterion"]  # no adapter was asked for, and no teacher is inside


def test_the_average_teaches_what_it_is_at_each_step(tmp_path):
    """At the first step it is the student itself, later it lags behind."""
    write_dataset(tmp_path / "data", train=8, test=2)
    term = {"teacher": "mean", "loss": "mse", "weight": 1.0, "student_maps": ["p3"]}
    config = tiny_config(tmp_path / "data", tmp_path / "runs", teachers=[{"name": "mean", "arch": "ema"}], terms=[term])
    parts = building.build(config, Processes("cpu"), None, lambda text: None)
    images, targets, _ = step.augment_batch(parts, next(parts.loader.epoch(0)), 0, 0)
    parts.student.eval()
    value = lambda: losses_of_batch(parts, images, targets, parts.teachers(images), 0.0)["mse_mean"].item()
    assert value() == 0
    parts.student.neck.top_down3.merge.conv.weight.data += 0.1
    first = value()
    parts.ema.update(10_000)
    assert value() < first and first > 0


def test_an_average_with_a_file_is_refused(tmp_path):
    write_dataset(tmp_path / "data", train=8, test=2)
    teacher = {"name": "mean", "arch": "ema", "weights": str(save_teacher(tmp_path / "teacher.pt"))}
    config = tiny_config(
        tmp_path / "data", tmp_path / "runs", teachers=[teacher], terms=[TERMS[0] | {"teacher": "mean"}]
    )
    with pytest.raises(UserError, match=r"teachers\.0\.weights'.*has no file"):
        train.run(config, quiet=True)


def test_a_teacher_of_much_larger_pictures_is_warned_about(tmp_path, capsys):
    write_dataset(tmp_path / "data", train=8, test=2)
    teacher = {"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "t.pt"))}
    config = tiny_config(
        tmp_path / "data", tmp_path / "runs", teachers=[teacher | {"image_size": 160}], terms=TERMS[:1]
    )
    train.dry_run(config)
    assert "enlarged to 160 px, by a factor of 2.5" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_run_computes_the_same_losses(tmp_path, monkeypatch):
    """Student and teacher traced whole, as `compile: true` does; without the code generator, which needs a compiler."""
    write_dataset(tmp_path / "data", train=8, test=2)
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "teacher.pt"))}]
    found = []
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager", fullgraph=True))
    for name, is_compiled in (("plain", False), ("compiled", True)):
        config = tiny_config(
            tmp_path / "data", tmp_path / "runs", name=name, epochs=1, teachers=teachers, compile=is_compiled,
            terms=[*TERMS, {"teacher": "big", "loss": "box_classes", "weight": 1.0}],
        )  # fmt: skip
        train.run(config, quiet=True)
        (row,) = run_folder.read_metrics(tmp_path / "runs" / name / "metrics.csv")
        found.append([float(row[f"train/{term}"]) for term in ("box", "cls", "dfl", *NAMES, "box_classes_big")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_teacher_is_asked_once_about_a_view(tmp_path, monkeypatch):
    """Augmented, two epochs: by the next run, another seed with the same views, and terms that read one part more.

    What is found has the bits of what was computed, so that the runs end with the same bytes.
    """
    write_dataset(tmp_path / "data", train=8, test=2)
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "teacher.pt"))}]
    changes = dict(teachers=teachers, terms=TERMS[:2], teacher_cache_gigabytes=0.1, batch_size=4, view_seed=3)
    asked, original = [], teaching.Teachers._forward
    monkeypatch.setattr(teaching.Teachers, "_forward", lambda *args: asked.append(len(args[2])) or original(*args))

    def outputs(**more):
        """Of the teacher for each batch of two epochs, and what the cache counted."""
        config = tiny_config(tmp_path / "data", tmp_path / "runs", **changes | more)
        setup = building.build(config, Processes("cpu"), None, lambda line: None)
        numbered = [(epoch, *pair) for epoch in (0, 1) for pair in enumerate(setup.loader.epoch(epoch))]
        images = [step.augment_batch(setup, batch, epoch, number)[0] for epoch, number, batch in numbered]
        found = [setup.teachers(batch)["big"] for batch in images]
        return images, found, setup.teachers.counts().get("big")

    images, first, counts = outputs()
    assert asked == [4] * 4 and counts["written"] == counts["absent"] == 16 * 4  # p3, p4, p5, what is the same for all
    for more in ({}, {"seed": 1}):
        _, again, counts = outputs(**more)
        assert asked == [4] * 4 and counts["found"] == 16 * 4
        for one, other in zip(first, again):
            assert list(one.features) == list(other.features) == ["p3", "p4", "p5"]
            assert all(torch.equal(one.features[name], other.features[name]) for name in one.features)
    logits = outputs(terms=TERMS[2:])
    assert asked == [4] * 8 and logits[2]["written"] == 16 and logits[1][0].class_logits is not None
    others, exact, counts = outputs(view_seed=None, seed=3, teacher_cache_gigabytes=0)
    assert counts is None and all(torch.equal(one, other) for one, other in zip(images, others))
    for one, other in zip(first, exact):
        torch.testing.assert_close(one.features["p4"], other.features["p4"], atol=1e-3, rtol=1e-3)  # float16 on disk
    assert not torch.equal(images[0], outputs(view_seed=None, seed=4)[0][0])


def test_a_measured_weight_is_fixed_after_the_warm_up(tmp_path, capsys):
    """Measured in the ten steps after the warm-up of one; then the run tells it, saves it, and goes on with it."""
    write_dataset(tmp_path / "data", train=24, test=2)
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "teacher.pt"))}]
    terms = [TERMS[1] | {"weight": {"share": 0.25}}]
    changes = {"teachers": teachers, "terms": terms, "batch_size": 4, "optimizer": {"warmup_epochs": 0.2}}
    config = tiny_config(tmp_path / "data", tmp_path / "runs", **changes)
    train.dry_run(config)
    assert re.search(
        r"cwd_big: weight [\d.e-]+, 0.25 of the .* gradient on p3, p4, p5, on this", capsys.readouterr().out
    )
    report = train.run(config)
    found = report["gradient_shares"]["cwd_big"]
    assert found["measured_batches"] == 10 and found["share"] == 0.25 and found["weight"] > 0
    line = f"cwd_big: weight {found['weight']:.4g}, 0.25 of the detection loss's gradient on p3, p4, p5, from here on"
    said = capsys.readouterr().out
    assert said.count(line) == 1 and "reconsider its weight" not in said
    state = checkpoint.load(tmp_path / "runs" / "tiny" / "weights" / "last.pt")
    count, detection, term = state["criterion"]["shares.measured"][0].tolist()
    assert count == 10 and found["weight"] == 0.25 * detection / term

    with pytest.raises(UserError, match=r"terms\.0\.weight\.share': a share of the detection loss's gradient, whose"):
        train.run(tiny_config(tmp_path / "data", tmp_path / "runs", **changes, detection_weight=0.0), quiet=True)
    terms[0]["weight"] = {"share": -0.1}
    with pytest.raises(UserError, match=r"terms\.0\.weight\.share: found -0\.1, expected a number above 0"):
        train.run(tiny_config(tmp_path / "data", tmp_path / "runs", **changes), quiet=True)


def test_a_start_at_weights_is_measured_before_it_learns(tmp_path, monkeypatch):
    """The weights of the file on the test split; not of a fresh student, and not where nobody asks."""
    write_dataset(tmp_path / "data", train=8, test=4)
    file, measured = save_teacher(tmp_path / "start.pt"), []
    numbers = dict.fromkeys(("precision", "recall", "mAP50", "mAP50-95"), 0.5)
    evaluate = lambda setup, model, index: (measured.append((model, index)), (numbers, None))[1]
    monkeypatch.setattr(reporting, "evaluate", evaluate)
    config = tiny_config(tmp_path / "data", tmp_path / "runs", student={"arch": "yolov8_narrow", "weights": str(file)})
    parts = building.build(config, Processes("cpu"), None, lambda line: None)
    for section, changes, start in (
        ("student", {}, numbers),
        ("student", {"weights": None}, None),
        ("evaluation", {"of_start": False}, None),
    ):
        changed = dataclasses.replace(getattr(config, section), **changes)
        parts.config, state = dataclasses.replace(config, **{section: changed}), TrainingState()
        reporting.measure_start(parts, state, Progress(quiet=True))
        assert state.start == start
    ((model, index),) = measured
    assert index is parts.splits.test
    expected = checkpoint.load(file)["ema"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
