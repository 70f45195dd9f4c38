"""student.inherit: the narrower student computes what the wider model computes without the channels left behind."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
import compare
import fine_tuning
import models
import train
from config import to_tree
from engine.comparison.study import load_study
from engine.training.checks import check_config
from engine.training.student import build_student
from errors import UserError
from layers.channel_groups import find_groups
from tests.layers.test_fusion import random_statistics
from yaml_files import dump_yaml

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("green", "red")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of wide models with the classes red, blue and green; no channel is like another."""
    folder = tmp_path_factory.mktemp("wide")
    paths = {}
    for arch in ("yolov8n", "yolov8s"):
        torch.manual_seed(0)
        model = models.build(arch, 3)
        random_statistics(model)
        paths[arch] = folder / f"{arch}.pt"
        about = {"arch": arch, "names": ["red", "blue", "green"], "image_size": 64}
        checkpoint.save(paths[arch], about | {"ema": model.state_dict()})
    return paths


def start(config, **more) -> tuple[nn.Module, list[str]]:
    said: list[str] = []
    check_config(config, more.get("given", ()))
    return build_student(config, NAMES, say=said.append, **more), said


def outputs_of(model: nn.Module) -> list[Tensor]:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = model.eval()(images)
    return [output.box_logits, output.class_logits]


def kept_channels(student: nn.Module, wide: nn.Module, groups) -> Tensor:
    """(C,) bool: the channels of the wide model that the student has, told by the mean of their first BatchNorm."""
    is_kept = torch.zeros(groups.count, dtype=torch.bool)
    mine, theirs = student.state_dict(), wide.state_dict()
    for name, channels in groups.groups.items():
        entry = name.split("/")[0].removesuffix("conv") + "bn.running_mean"
        rows = torch.isin(groups.axes[entry, 0], channels)
        is_kept[channels] = torch.isin(theirs[entry][rows], mine[entry])
    return is_kept


@pytest.mark.parametrize(
    ("wide", "narrow", "by"),
    [
        ("yolov8n", "yolov8_half", "bn_gamma"),
        ("yolov8n", "yolov8_half", "l2"),
        ("yolov8s", "yolov8n", "random"),
    ],
)
def test_the_student_computes_what_the_wide_model_does_without_the_others(files, make_tiny, wide, narrow, by):
    config = make_tiny(student={"arch": narrow, "inherit": {"weights": str(files[wide]), "by": by}}, seed=5)
    student, said = start(config)
    torch.manual_seed(5)
    model = fine_tuning.start_model(wide, NAMES, files[wide])  # with the classes joined by name
    groups = find_groups(model)
    assert "taken over by name: green, red" in said[0]
    assert said[1] == f"{files[wide]}: {narrow} begins with a part of its channels, chosen by {by}"
    is_kept = kept_channels(student, model, groups)
    assert {n: int(is_kept[c].sum()) for n, c in groups.groups.items()} == find_groups(student).widths()
    state = model.state_dict()
    for (entry, dim), channels in groups.axes.items():  # whoever reads one of the others reads silu(0) = 0
        if dim == 0 and not entry.endswith("running_var"):
            state[entry][(channels >= 0) & ~is_kept[channels]] = 0
    for found, expected in zip(outputs_of(student), outputs_of(model)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_best_channels_by_hand(files, make_tiny):
    """In numpy: the stem, which one layer reads; and the residual stream, which two BatchNorms write."""
    state = {name: value.numpy() for name, value in checkpoint.load(files["yolov8n"])["ema"].items()}
    stem, down = state["backbone.stem.conv.weight"], state["backbone.down2.conv.weight"]
    split, conv2 = (
        np.abs(state[f"backbone.stage2.{n}.bn.weight"][-16:]).astype(float) for n in ("split", "blocks.0.conv2")
    )
    size = np.sqrt((stem.astype(float) ** 2).sum((1, 2, 3)) + (down.astype(float) ** 2).sum((0, 2, 3)))
    expected = {
        ("bn_gamma", "stem"): np.sort(np.argsort(-np.abs(state["backbone.stem.bn.weight"]))[:8]),
        ("l2", "stem"): np.sort(np.argsort(-size)[:8]),
        ("bn_gamma", "stage2.blocks.0.conv2"): np.sort(np.argsort(-(split + conv2))[:8]),
    }
    assert len({tuple(rows) for rows in expected.values()}) == 3
    for (by, layer), rows in expected.items():
        inherit = {"weights": str(files["yolov8n"]), "by": by}
        student, _ = start(make_tiny(student={"arch": "yolov8_half", "inherit": inherit}))
        entry = f"backbone.{layer}.bn.running_mean"
        np.testing.assert_array_equal(student.state_dict()[entry].numpy(), state[entry][rows])


def test_a_student_of_the_same_widths_is_a_copy_and_random_follows_the_seed(files, make_tiny):
    def state(arch: str, **changes) -> dict[str, Tensor]:
        inherit = {"weights": str(files["yolov8n"]), "by": "random"}
        return start(make_tiny(student={"arch": arch, "inherit": inherit}, **changes))[0].state_dict()

    copy, theirs = state("yolov8n"), checkpoint.load(files["yolov8n"])["ema"]
    assert all(torch.equal(copy[name], theirs[name]) for name in copy if not name.startswith("head.cls."))
    a, b, c = (state("yolov8_half", seed=seed)["backbone.stem.conv.weight"] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_class_rows_follow_the_aliases_of_the_teacher(files, make_tiny):
    """The dataset's red is the teacher's blue: its rows are those of blue."""
    teacher = {"name": "big", "arch": "yolov8n", "weights": str(files["yolov8n"])}
    student = {"arch": "yolov8_half", "inherit": {"teacher": "big"}}
    aliased, said = start(make_tiny(student=student, teachers=[teacher | {"aliases": {"Red": "blue"}}]))
    assert "taken over by name: green, red from blue; start fresh: none" in said[0]
    plain, _ = start(make_tiny(student=student, teachers=[teacher]))
    theirs, state = checkpoint.load(files["yolov8n"])["ema"], aliased.state_dict()
    for level in range(3):
        name = f"head.cls.{level}.2.bias"
        assert torch.equal(state[name], theirs[name][[2, 1]])
        assert torch.equal(plain.state_dict()[name], theirs[name][[2, 0]])
    for wrong in ({"red": "rouge"}, {"rouge": "red"}):
        with pytest.raises(
            UserError, match=r"yolov8n\.pt: alias .*rouge.* must lead from a class of the dataset to one"
        ):
            start(make_tiny(student=student, teachers=[teacher | {"aliases": wrong}]))


def test_new_head_starts_the_class_head_fresh(files, make_tiny):
    inherit = {"weights": str(files["yolov8n"])}
    plain, fresh = (
        start(make_tiny(student={"arch": "yolov8_half", "inherit": inherit, "new_head": new}))[0].state_dict()
        for new in (False, True)
    )
    for name in plain:
        if not name.startswith("head.cls.") or name.endswith("conv.weight"):
            assert torch.equal(plain[name], fresh[name]) == (not name.startswith("head.cls.")), name


TEACHER = {"name": "big", "arch": "yolov8s"}


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"inherit": {}}, "found teacher None and weights None, expected one of them"),
        ({"inherit": {"teacher": "big", "weights": "FILE"}}, "expected one of them"),
        ({"inherit": {"weights": "FILE"}, "weights": "FILE"}, r"'student\.weights': found .* beside student\.inherit"),
        ({"inherit": {"teacher": "huge"}}, r"inherit\.teacher': found 'huge', expected big"),
        ({"inherit": {"teacher": "big", "arch": "yolov8s"}}, r"inherit\.arch': found yolov8s beside a teacher"),
        ({"inherit": {"weights": "FILE", "arch": "yolov8m"}}, r"yolov8_half and yolov8m are of different .* depths"),
        ({"inherit": {"weights": "FILE", "arch": "yolov5n"}}, "different families or depths: only one of them has"),
        ({"inherit": {"weights": "FILE", "arch": "dinov2_vits14"}}, "expected a wider model of the family"),
        ({"inherit": {"weights": "FILE"}, "arch": "yolov8_narrow"}, "yolov8_narrow and yolov8n are of different"),
        ({"inherit": {"weights": "FILE"}, "arch": "yolov8s"}, "yolov8s is wider than yolov8n"),
        ({"inherit": {"weights": "absent.pt"}}, r"absent\.pt: no such file"),
        ({"inherit": {"weights": "TEXT"}}, r"released weights need student\.inherit\.arch"),
        ({"inherit": {"weights": "FILE", "by": "luck"}}, "expected one of bn_gamma, l2, random"),
    ],
)
def test_mistakes_are_one_line(files, make_tiny, tmp_path, student, message):
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    put = {"FILE": str(files["yolov8n"]), "TEXT": str(text)}
    student = {key: put.get(value, value) if isinstance(value, str) else value for key, value in student.items()}
    student["inherit"] = {key: put.get(value, value) for key, value in student["inherit"].items()}
    teachers = [TEACHER] if student["inherit"].get("teacher") else []
    with pytest.raises(UserError, match=message) as caught:
        start(make_tiny(**{"student": {"arch": "yolov8_half"} | student, "teachers": teachers}))
    assert "\n" not in str(caught.value)


def test_a_run_inherits_and_is_resumed_without_the_file(files, make_tiny, tmp_path):
    path = tmp_path / "coco.pt"
    path.write_bytes(files["yolov8n"].read_bytes())
    student = {"arch": "yolov8_half", "inherit": {"weights": str(path)}}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        report = train.run(make_tiny(student=student, epochs=1))
    assert "yolov8_half begins with" in output.getvalue()
    path.unlink()
    again = train.run(make_tiny(student=student, epochs=2), resume=True, quiet=True, allow_change=("epochs",))
    assert again["start"] == report["start"] is not None  # measured once, before the first step
    assert checkpoint.load(tmp_path / "runs" / "tiny" / "weights" / "last.pt")["epoch"] == 2


def test_a_row_inherits_from_a_teacher_that_is_trained_in_place(make_tiny, tmp_path):
    """The teacher is trained first, teaches nothing, and is refused where nobody names it."""
    tree = to_tree(make_tiny(name="study", teachers=[{"name": "big", "arch": "yolov8n", "epochs": 1}], epochs=1))
    inherit = {"student": {"arch": "yolov8_half", "inherit": {"teacher": "big"}}}
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(tree | {"rows": {"alone": {}, "begun": inherit | {"differs": ["student"]}}}))
    study = load_study(path)
    assert [row.name for row in study.rows] == ["alone", "teacher_big", "begun"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        compare.check_rows(list(study.rows), study)  # before the teacher is trained
        train.run(study.rows[1].run(0))
        train.run(study.rows[2].run(0))
    assert "teacher_big_seed0/weights/last.pt: yolov8_half begins with" in output.getvalue()
    path.write_text(dump_yaml(tree | {"rows": {"alone": {}}}))
    with pytest.raises(UserError, match="could never act"):
        load_study(path)
