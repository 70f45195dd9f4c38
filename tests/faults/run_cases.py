"""D3, D5, D9, E2, and some of D1: runs that are resumed, go wrong, lie in odd places, or are made again."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import models
import predict
import train
from config import Config
from datasets import scan
from engine.training import starting
from engine.training.optimization import Ema
from tests.conftest import ROOT
from tests.faults.matrix import Case, Outcome, refusal
from tests.tiny_training import environment, tiny_config, write_dataset
from yolo.yolov8 import AnchorFreeDetector

TERM = {"teacher": "t", "loss": "mse", "weight": 1, "student_maps": ["p3"], "adapter": "conv1x1"}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "weights" / "last.pt")["ema"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def write_teacher(path: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    state = {"arch": "yolov8_narrow", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(path, state | {"ema": models.build("yolov8_narrow", 2).state_dict()} | changes)
    return path


def stopped_run(folder: Path, config: Config) -> Path:
    """runs/tiny, stopped after its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish_epoch", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            train.run(config, quiet=True)
    return folder / "runs" / "tiny"


CHANGES: dict[str, dict[str, Any]] = {  # by the key that a resumed run must name
    "optimizer.learning_rate": {"optimizer": {"learning_rate": 0.5}}, "batch_size": {"batch_size": 2},
    "seed": {"seed": 1}, "view_seed": {"view_seed": 3}, "epochs": {"epochs": 3}, "image_size": {"image_size": 96},
    "student.arch": {"student": {"arch": "yolov8n"}}, "data.classes": {"data": {"classes": ["red"]}},
    "data.holdout_fraction": {"data": {"holdout_fraction": 0.3}}, "augment.mixup": {"augment": {"mixup": 0.5}},
    "optimizer.name": {"optimizer": {"name": "adamw"}}, "optimizer.accumulate": {"optimizer": {"accumulate": 2}},
    "evaluation.iou_threshold": {"evaluation": {"iou_threshold": 0.5}},
    "detection_weight": {"detection_weight": 2.0},
}  # fmt: skip


def resumed(folder: Path) -> Iterator[Case]:
    """D3: --resume with another config, other data, and checkpoints that are old, foreign, damaged or gone."""
    data = write_dataset(folder / "data", train=8, test=4)
    make = lambda **changes: tiny_config(data, folder / "runs", **{"batch_size": 4, "save_every_steps": 1} | changes)
    whole = stopped_run(folder, make())
    shutil.copytree(whole, folder / "kept")
    last = whole / "weights" / "last.pt"

    def again() -> None:
        shutil.rmtree(folder / "runs")
        shutil.copytree(folder / "kept", whole)

    def changed(changes: dict[str, Any], key: str) -> Outcome:
        again()
        resume = lambda: train.run(make(**changes), resume=True, quiet=True)
        return refusal(resume, whole, f"key '{key}': the run was started with .*, found (?!None).*--allow-change {key}")

    teacher = {"name": "t", "arch": "yolov8_narrow", "weights": str(write_teacher(folder / "t.pt"))}
    changes = CHANGES | {"teachers": {"teachers": [teacher], "terms": [TERM]}}
    for key, change in changes.items():
        yield Case("D3", key, lambda c=change, k=key: changed(c, k), 5)

    def with_file(write: Callable[[], object], words: str, place: Path) -> Outcome:
        again()
        for path in (last, checkpoint.previous_path(last)):
            write(path)
        return refusal(lambda: train.run(make(), resume=True, quiet=True), place, words)

    good = last.read_bytes()
    state = checkpoint.load(last)
    files = {
        "newer": (lambda path: checkpoint.save(path, state | {"format": 2}), "checkpoint format 2"),
        "foreign": (lambda path: torch.save({"model": {}}, path), "no key 'format'"),
        "of another command": (lambda path: write_teacher(path), "no key 'config'"),
        "without optimizer": (
            lambda path: checkpoint.save(path, {k: v for k, v in state.items() if k != "optimizer"}),
            "no key 'optimizer'",
        ),
        "cut": (lambda path: path.write_bytes(good[:-99]), "damaged"),
        "empty": (lambda path: path.write_bytes(b""), "damaged|the file is empty"),
        "text": (lambda path: path.write_text("<html>"), "damaged or not a checkpoint|web page"),
    }
    for name, (write, words) in files.items():
        yield Case("D3", f"checkpoint {name}", lambda w=write, t=words: with_file(w, t, whole / "weights"))
    yield Case("D3", "no checkpoint", lambda: with_file(lambda p: p.unlink(missing_ok=True), "no such file", last))

    def previous() -> Outcome:
        again()
        last.write_bytes(good[:-99])
        said: list[str] = []
        checkpoint.load_newest(last, said.append)
        assert len(said) == 1 and "going on from" in said[0] and str(last) in said[0]
        return "counted"

    def labels() -> Outcome:
        again()
        path = data / "labels" / "train" / "003.txt"
        before = path.read_text()
        path.write_text("0 0.5 0.5 0.25 0.25\n")
        try:
            return refusal(lambda: train.run(make(), resume=True, quiet=True), whole, "not those that the run started")
        finally:
            path.write_text(before)

    def allowed() -> Outcome:
        again()
        train.run(make(epochs=3), resume=True, quiet=True, allow_change=("epochs",))
        assert checkpoint.load(last)["epoch"] == 3
        return "correct"

    yield Case("D3", "the checkpoint before", previous)
    yield Case("D3", "other labels", labels)
    yield Case("D3", "--allow-change epochs", allowed, 10)


# Each of these puts `value` into a number of a step, after the first steps have been saved.


def spoil_images(patch: pytest.MonkeyPatch, value: float) -> None:
    original = train.augment_batch

    def spoiled(setup: Any, batch: Any, epoch: int, number: int) -> Any:
        images, targets, content = original(setup, batch, epoch, number)
        images[0, 0, 0, 0] = value if epoch else images[0, 0, 0, 0]
        return images, targets, content

    patch.setattr(train, "augment_batch", spoiled)


def spoil_term(name: str) -> Callable[[pytest.MonkeyPatch, float], None]:
    def spoil(patch: pytest.MonkeyPatch, value: float) -> None:
        original, calls = AnchorFreeDetector.losses, [0]

        def losses(self: Any, output: Any, targets: Any) -> Any:
            terms = original(self, output, targets)
            calls[0] += 1
            return terms | {name: terms[name] * value} if calls[0] == 3 else terms

        patch.setattr(AnchorFreeDetector, "losses", losses)

    return spoil


def spoil_setup(change: Callable[[Any, float], None]) -> Callable[[pytest.MonkeyPatch, float], None]:
    def spoil(patch: pytest.MonkeyPatch, value: float) -> None:
        build = starting.build

        def built(*args: Any) -> Any:
            setup = build(*args)
            change(setup, value)
            return setup

        patch.setattr(starting, "build", built)

    return spoil


def spoil_teacher(setup: Any, value: float) -> None:
    with torch.no_grad():
        next(setup.teachers.models["t"].parameters()).fill_(value)


def spoil_gradient(setup: Any, value: float) -> None:
    next(setup.student.parameters()).register_hook(lambda gradient: gradient * value)


def spoil_weights(patch: pytest.MonkeyPatch, value: float) -> None:
    update = Ema.update

    def spoiled(self: Any, step: int) -> None:
        update(self, step)
        if step == 2:
            with torch.no_grad():
                next(setups[-1].student.parameters()).fill_(value)

    build, setups = starting.build, []
    patch.setattr(starting, "build", lambda *args: setups.append(build(*args)) or setups[-1])
    patch.setattr(Ema, "update", spoiled)


SPOILERS: dict[str, Callable[[pytest.MonkeyPatch, float], None]] = {
    "an image": spoil_images, "the teacher": spoil_setup(spoil_teacher),
    "the gradient": spoil_setup(spoil_gradient), "the weights": spoil_weights,
    "the box loss": spoil_term("box"), "the class loss": spoil_term("cls"), "the distance loss": spoil_term("dfl"),
}  # fmt: skip


def not_finite(folder: Path) -> Iterator[Case]:
    """D5: nan and inf in every number of a step: the run stops there, names it, and keeps a finite checkpoint."""
    data = write_dataset(folder / "data", train=8, test=4)
    teacher = [{"name": "t", "arch": "yolov8_narrow", "weights": str(write_teacher(folder / "t.pt"))}]
    config = tiny_config(
        data, folder / "runs", batch_size=4, save_every_steps=1, teachers=teacher, terms=[TERM], epochs=2
    )

    def run(spoil: Callable[[pytest.MonkeyPatch, float], None], value: float) -> Outcome:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, value)
            call = lambda: train.run(config, quiet=True)
            found = refusal(call, ".png", r"step \d.* is (nan|-?inf), expected finite numbers", exit_code=3)
        run_folder = folder / "runs" / "tiny"
        assert json.loads((run_folder / "nonfinite.json").read_text())["pictures"]
        if (run_folder / "weights" / "last.pt").exists():
            assert all(value.isfinite().all() for value in weights_of(run_folder).values())
        return found

    for name, spoil in SPOILERS.items():
        for value in (float("nan"), float("inf")):
            yield Case("D5", f"{value} in {name}", lambda s=spoil, v=value: run(s, v), 10)


ODD_PLACES = ("with space", "line\nbreak", "\u0130\u0131\u011f \u7ec6\u80de", "[0-9]*?", "-flag", "100%d {x}",
              "a#b;c&d'e", "\N{SNOWMAN}" * 60)  # fmt: skip


def places(folder: Path) -> Iterator[Case]:
    """D9: folders with odd names, a clock that jumps, no home, other locales, and a reader that goes away."""

    def everything(name: str) -> Outcome:
        root = folder / name
        root.mkdir()
        data = write_dataset(root / "data", train=4, test=4)
        config = tiny_config(data, root / "runs", batch_size=4, epochs=1)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert scan.main(["yolo", str(data), "train,test", "--decode", "--out", str(root / "report")]) == 0
            report = train.run(config)
            model, picture = root / "runs" / "tiny", data / "images" / "train" / "000.png"
            assert predict.main([str(model), str(picture), "--output", str(root / "found"), "--json"]) == 0
        found = json.loads((root / "found" / "predictions.json").read_text())
        assert report["steps"] == 1 and all(row["file_name"].endswith("000.png") for row in found)
        return "correct"

    def clock(jump: float) -> Outcome:
        data = folder / "clock"
        if not data.exists():
            write_dataset(data, train=4, test=4)
        now, calls = time.time, [0]

        def jumping() -> float:
            calls[0] += 1
            return now() + jump * (calls[0] % 2)

        ends = []
        for name in ("straight", "jumping"):
            with pytest.MonkeyPatch.context() as patch:
                if name == "jumping":
                    patch.setattr(time, "time", jumping)
                train.run(tiny_config(data, folder / f"runs {jump}", name=name, batch_size=4, epochs=1), quiet=True)
            ends.append(weights_of(folder / f"runs {jump}" / name))
        assert same(*ends)
        return "correct"

    def process(variables: dict[str, str], *, closed: bool = False) -> Outcome:
        root = folder / "\u0130\u0131\u011f \u7ec6"
        if not root.exists():
            write_dataset(root, train=4, test=4)
        command = [sys.executable, "-m", "datasets.scan", "yolo", str(root), "train"]
        reading, writing = os.pipe()
        if closed:
            os.close(reading)  # as `| head -0` does
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment() | variables, stdout=writing, stderr=subprocess.PIPE, text=True
        )
        os.close(writing)
        text = "" if closed else os.fdopen(reading, "rb").read().decode(errors="replace")
        complaint = child.communicate(timeout=60)[1]
        assert "Traceback" not in complaint, complaint
        assert child.returncode == (141 if closed else 0) and ("bad: 0" in text or closed)
        return "correct"

    for number, name in enumerate(ODD_PLACES):
        yield Case("D9", f"folder {number}", lambda n=name: everything(n), 20)
    for jump in (-1e9, 1e9):
        yield Case("D9", f"clock {jump:+g} s", lambda j=jump: clock(j), 20)
    settings = {
        "no home": {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"},
        "C, not UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "POSIX, ASCII output": {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
        "Turkish": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
        "optimized Python": {"PYTHONOPTIMIZE": "2"},
    }
    for name, variables in settings.items():
        yield Case("D9", name, lambda v=variables: process(v), 30)
    yield Case("D9", "closed output", lambda: process({}, closed=True), 30)


def same_seed(folder: Path) -> Iterator[Case]:
    """E2: the same command again, with other numbers of loader workers, cached, stopped and resumed: the same bytes."""
    data = write_dataset(folder / "data", train=8, test=4)
    make = lambda name, **changes: tiny_config(data, folder / "runs", name=name, batch_size=4, **changes)
    train.run(make("first"), quiet=True)
    expected = weights_of(folder / "runs" / "first")

    def run(name: str, **changes: Any) -> Outcome:
        train.run(make(name, **changes), quiet=True)
        assert same(weights_of(folder / "runs" / name), expected), "ends with other weights"
        reports = [json.loads((folder / "runs" / n / "report.json").read_text())["test"] for n in ("first", name)]
        assert reports[0] == reports[1]
        return "correct"

    def stopped() -> Outcome:
        config = make("tiny", save_every_steps=1)
        stopped_run(folder, config)
        train.run(config, resume=True, quiet=True)
        assert same(weights_of(folder / "runs" / "tiny"), expected), "ends with other weights"
        return "correct"

    yield Case("E2", "again", lambda: run("again"), 20)
    for workers in (1, 2, 4):
        yield Case("E2", f"{workers} workers", lambda w=workers: run(f"workers{w}", data={"workers": w}), 60)
    for workers in (0, 2):
        changes = {"workers": workers, "cache": True}
        yield Case("E2", f"cached, {workers} workers", lambda c=changes: run(f"cached{c['workers']}", data=c), 60)
    yield Case("E2", "saved at every step", lambda: run("saved", save_every_steps=1), 20)
    yield Case("E2", "stopped and resumed", stopped, 20)


def kills(folder: Path) -> Iterator[Case]:
    """D1: a run that was killed at random points, resumed each time, ends with the bytes of one left alone."""
    from tests.engine.training import resume_driver
    from tests.engine.training.test_resume import assert_same_bytes
    from tests.forked_processes import run_forked

    def run(workers: int, seed: int) -> Outcome:
        root = folder / f"kills_{workers}_{seed}"
        root.mkdir()
        child = run_forked(resume_driver.main, root, workers, 4, seed, folder=root)
        assert child.code == 0, child.text[-2000:]
        result = json.loads((root / "result.json").read_text())
        assert result["codes"][-1] == 0 and set(result["codes"]) <= {0, -9, 130, 143}, result
        ends = [checkpoint.load(root / name / "tiny" / "weights" / "last.pt") for name in ("whole", "runs")]
        for key in ("model", "ema", "optimizer", "criterion", "step", "epoch"):
            assert_same_bytes(ends[0][key], ends[1][key], key)
        assert not list((root / "runs" / "tiny").rglob("*.tmp"))
        return "correct"

    for workers in (0, 2):
        for seed in (1, 2):
            name = f"4 kills and more, {workers} workers, seed {seed}"
            yield Case("D1", name, lambda w=workers, s=seed: run(w, s), 300)
