"""The published project of a Faster R-CNN taught by DINOv2 and CLIP: its config, its grid, and its users' mistakes.

From released files to a trained student, with small teachers of random weights in files that look like the released
ones: that shows what is connected to what, not that it helps.
"""

import json
import re
from functools import cache, partial

import pytest
import torch

import checkpoint
import compare
import models
import train
from config import load_config
from engine.comparison.study import load_study
from engine.runtime import run_folder
from engine.training import building, checks, reporting, teaching
from engine.training.dry_run import losses_of_batch
from engine.training.step import augment_batch
from errors import UserError
from teachers.clip import CLIP
from teachers.clip_tokenizer import ClipTokenizer
from teachers.dinov2 import DINOv2
from tests.conftest import ROOT
from tests.engine.training.test_two_stage_training import public_state
from tests.tiny_training import tiny_config

CONFIG = str(ROOT / "configs" / "voc_fasterrcnn_resnet18_dinov2_clip.yaml")
GRID, WEIGHTS, CHOSEN = (
    str(ROOT / "configs" / "studies" / f"voc_fasterrcnn_{name}.yaml") for name in ("grid", "weights", "chosen")
)
STUDENTS = ("fasterrcnn_resnet18", "fasterrcnn_mobilenet_v3_small", "fasterrcnn_vit_tiny")
KINDS = ("baseline", "feature", "logit", "full")
TERMS = ("cosine_dinov2", "image_kl_clip")
SMALL = (
    "image_size=64", "epochs=1", "batch_size=2", "evaluation.every_epochs=0", "evaluation.batch_size=2",
    "data.workers=0", "device=cpu", "precision=float32", "student.backbone_weights=null", "student.frozen_norms=false",
)  # fmt: skip
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread", "small_second_stage")
small_clip = partial(CLIP, patch=32, image_width=64, text_width=64, embedding_width=32, depth=1)
small_dinov2 = partial(DINOv2, width=384, depth=1, heads=6)
WHOLE = dict(models.TEACHERS)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """CLIP's vocabulary is read once: it takes a fifth of a second, twice in each run. A missing one is not kept."""
    once = cache(ClipTokenizer)
    with pytest.MonkeyPatch.context() as patch:
        for module in (checks, teaching):
            patch.setattr(module, "ClipTokenizer", once)
        yield


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with weights under the released names, of small teachers, which models.TEACHERS then builds."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    dinov2 = public_state(small_dinov2()) | {"mask_token": torch.zeros(1, 384)}
    torch.save(dinov2, folder / "dinov2.pth")
    torch.save(public_state(small_clip()), folder / "clip.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.TEACHERS, "dinov2_vits14", small_dinov2)
        patch.setitem(models.TEACHERS, "clip_vit_b32", small_clip)
        yield folder


@pytest.fixture(scope="module")
def photos(shared_data, tmp_path_factory):
    """Four pictures to train on and two to test on, of VOC 2012."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).symlink_to(shared_data / "voc2012_100" / folder)
    names = (shared_data / "voc2012_100" / "ImageSets" / "Main" / "default.txt").read_text().split()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(VOC_CLASSES) + "\n")
    for split, chosen in (("train", names[:4]), ("test", names[4:6])):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    return root


@pytest.fixture
def overrides(photos, released, shared_data, tmp_path):
    """Of either file, for a run of two steps."""
    vocabulary = shared_data / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz"
    return [
        *SMALL, f"data.root={photos}", "data.train=train", "data.test=test", f"runs={tmp_path}",
        f"teachers.0.weights={released / 'dinov2.pth'}", f"teachers.1.weights={released / 'clip.pt'}",
        f"teachers.1.vocabulary={vocabulary}",
    ]  # fmt: skip


@pytest.fixture
def no_pictures(monkeypatch):
    """They are left to the tests that look at them."""
    monkeypatch.setattr(reporting, "evaluation_pictures", lambda *args: {})


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("arch", STUDENTS)
def test_each_student_learns_by_one_override(arch, overrides, tmp_path, capsys):
    train.main([CONFIG, *overrides, f"student.arch={arch}"])
    run = tmp_path / "voc_fasterrcnn_resnet18_dinov2_clip"
    (row,) = run_folder.read_metrics(run / "metrics.csv")
    assert all(float(row[f"train/{name}"]) > 0 for name in (*TERMS, "rpn_objectness", "rpn_box", "roi_class"))
    report = json.loads((run / "report.json").read_text())
    assert report["arch"] == arch and set(report["distillation"]) == set(TERMS)
    printed = capsys.readouterr().out
    for percent in range(50, 100, 5):
        assert f"AP{percent}" in report["test"] and f"AP{percent} " in printed
    model, info = checkpoint.load_model(run / "weights" / "last.pt")
    assert info.arch == arch and info.names == VOC_CLASSES and model.num_classes == 20
    state = checkpoint.load(run / "weights" / "last.pt")
    assert sum("adapters." in name for name in state["criterion"]) == 2  # 1x1 convolution: weight and bias
    assert not any("teacher" in name or "clip." in name for name in (*state["model"], *state["ema"]))


def test_clip_is_asked_for_words_of_every_day(overrides):
    config = load_config(CONFIG, overrides)
    (clip,) = (t for t in config.teachers if t.name == "clip")
    assert set(clip.aliases) <= set(VOC_CLASSES)
    spoken = [clip.aliases.get(name, name) for name in VOC_CLASSES]
    assert len(set(spoken)) == 20 and {"airplane", "dining table", "tv monitor"} <= set(spoken)
    parts = building.build(config, train.Processes("cpu"), None, lambda line: None)
    assert parts.teachers.models["clip"].class_names == tuple(spoken)
    assert parts.criterion.classes["image_kl_clip"] is None  # the same 20 classes in the same order
    assert parts.teachers.facts["dinov2"].image_size == 70 and parts.teachers.facts["clip"].image_size == 224


def test_alpha_beta_and_gamma_scale_their_terms(overrides, tmp_path):
    rows = []
    for name, changes in (("one", []), ("other", ["detection_weight=2", "terms.0.weight=3", "terms.1.weight=0.25"])):
        config = load_config(CONFIG, [*overrides, f"name={name}", f"student.arch={STUDENTS[1]}", *changes])
        parts = building.build(config, train.Processes("cpu"), None, lambda line: None)
        images, targets, _ = augment_batch(parts, next(parts.loader.epoch(0)), 0, 0)
        torch.manual_seed(0)
        parts.learner.eval()
        rows.append(losses_of_batch(parts, images, targets, parts.teachers(images), 0.0))
    for name, ratio in (("roi_class", 2), ("rpn_box", 2), ("cosine_dinov2", 3), ("image_kl_clip", 0.5)):
        torch.testing.assert_close(rows[1][name], ratio * rows[0][name], rtol=1e-5, atol=0)


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_run_goes_on_to_the_same_bytes(overrides, tmp_path, monkeypatch):
    both = [*overrides, f"student.arch={STUDENTS[1]}", "epochs=2"]
    train.main([CONFIG, *both, "name=whole"])
    original = train.finish_epoch

    def stop(parts, position, *rest):
        original(parts, position, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "finish_epoch", stop)
        train.main([CONFIG, *both, "name=parts"])
    train.main(["--resume", str(tmp_path / "parts")])
    whole, parts = (checkpoint.load(tmp_path / name / "weights" / "last.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for part in ("model", "ema", "criterion"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())


def test_the_dry_run_shows_what_is_compared(overrides, tmp_path, capsys):
    train.main([CONFIG, *overrides, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    maps = [" ".join(line.split()) for line in lines if line.startswith(TERMS)][:2]
    assert maps == [
        "cosine_dinov2 p5 (2, 256, 2, 2) conv1x1, 98,688 parameters dinov2 patches (2, 384, 5, 5)",
        "image_kl_clip p5 (2, 256, 2, 2) image head, 5,140 parameters clip image_logits (2, 20)",
    ]
    assert sum(line.startswith(TERMS) for line in lines) == 4  # and each one's value and gradient
    assert not list(tmp_path.iterdir())


def test_the_grid_is_four_rows_for_each_of_three_students():
    rows = load_study(GRID, seeds=3).rows
    short = [arch.removeprefix("fasterrcnn_") for arch in STUDENTS]
    assert [row.name for row in rows] == [f"{student}_{kind}" for student in short for kind in KINDS]
    by_name = {row.name: row for row in rows}
    single = load_config(CONFIG)
    for row in rows:
        arch, kind = row.config.student.arch, row.name.rsplit("_", 1)[1]
        baseline = f"{arch.removeprefix('fasterrcnn_')}_baseline"
        assert row.baseline == baseline and row.seeds == (0, 1, 2)
        assert row.against == (() if kind == "baseline" else (baseline,))
        assert row.config.optimizer == by_name[baseline].config.optimizer
        assert row.config.terms == {"baseline": (), "feature": single.terms[:1], "logit": single.terms[1:]}.get(
            kind, single.terms
        )


def test_weights_are_chosen_on_val_and_measured_on_test():
    """One term at a time at each weight; the chosen ones go into one row, whose term of weight 0 is left out."""
    study = load_study(WEIGHTS)
    assert (study.config.data.train, study.config.data.test) == ("2007/train+2012/train", "2007/val")
    found = {row.name: [(term.loss, term.weight) for term in row.config.terms] for row in study.rows}
    assert found.pop("baseline") == []
    assert found == {f"beta_{beta}": [("cosine", beta)] for beta in (1, 5, 10, 20)} | {
        f"gamma_{str(gamma).replace('.', '_')}": [("image_kl", gamma)] for gamma in (0.5, 1, 2, 5)
    }
    single = load_config(CONFIG)
    for terms in [row.config.terms for row in study.rows if row.config.terms]:
        (same,) = [term for term in single.terms if term.loss == terms[0].loss]
        assert train.dataclasses.replace(terms[0], weight=same.weight) == same
    chosen = load_study(CHOSEN)
    assert (chosen.config.data.train, chosen.config.data.test) == (single.data.train, single.data.test)
    assert chosen.rows[1].config.terms == single.terms and chosen.rows[1].against == ("baseline", "longer")
    (line,) = [line for line in open(CHOSEN).read().splitlines() if line.startswith("#     rows.")]
    given = load_study(CHOSEN, line[1:].split()).rows[1]
    assert [(term.loss, term.weight) for term in given.config.terms] == [("cosine", 5.0)]
    assert [teacher.name for teacher in given.config.teachers] == ["dinov2"]


@pytest.mark.usefixtures("no_pictures")
def test_a_part_of_the_grid_from_start_to_table(overrides, tmp_path, capsys, monkeypatch, one_plot):
    names = [f"mobilenet_v3_small_{kind}" for kind in KINDS]
    command = [GRID, *overrides, "data.max_samples=2", "--rows", ",".join(names)]
    compare.main(command)
    folder = tmp_path / "voc_fasterrcnn_grid"
    table = (folder / "comparison.md").read_text()
    written = {row["name"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}
    assert (folder / "comparison.png").stat().st_size > 10_000
    for name, terms in zip(names, ((), TERMS[:1], TERMS[1:], TERMS)):
        assert len(written[name]["mAP"]) == 1 and name in table
        logged = run_folder.read_metrics(folder / f"{name}_seed0" / "metrics.csv")[0]
        assert tuple(term for term in TERMS if f"train/{term}" in logged) == terms
        assert all(float(logged[f"train/{term}"]) > 0 for term in terms)
    capsys.readouterr()
    monkeypatch.setattr(train, "run", None)  # given again, nothing is trained twice
    monkeypatch.setattr(compare.plot, "write", lambda *args, **options: None)  # of the same rows as before
    compare.main(command)
    assert capsys.readouterr().out.count("finished before") == 4


def test_teachers_of_the_released_sizes(tiny_data, tmp_path):
    """Whole models with random weights, given in place of files: one step at the sizes of pictures they see."""
    given = {"dinov2": WHOLE["dinov2_vits14"](), "clip": WHOLE["clip_vit_b32"]()}
    assert [sum(p.numel() for p in model.parameters()) for model in given.values()] == [22_056_192, 151_277_313]
    torch.manual_seed(0)
    given["clip"].set_class_embeddings(("a green box", "a red box"), torch.randn(2, 512), torch.randn(1, 512))
    single = load_config(CONFIG, ["teachers.1.aliases={green: a green box, red: a red box}"])
    config = tiny_config(
        tiny_data, tmp_path, epochs=1, batch_size=2, data={"max_samples": 2}, student={"arch": STUDENTS[1]},
        optimizer={"learning_rate": 0.001, "sum_over_batch": False},
    )  # fmt: skip
    config = train.dataclasses.replace(config, teachers=single.teachers, terms=single.terms)
    report = train.run(config, teachers=given, quiet=True)
    assert all(found["lowest"] > 0 for found in report["distillation"].values())


# Mistakes: each is one line that names the key, before anything is written.


def refused(command, tmp_path, pattern, main=train.main):
    with pytest.raises(UserError) as error:
        main(command)
    assert re.search(pattern, str(error.value)), error.value
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_missing_weights_say_how_to_fetch_them(overrides, tmp_path):
    for teacher, name in ((0, "dinov2_vits14"), (1, "clip_vit_b32")):
        expected = rf"key 'teachers.{teacher}.weights': gone.pth: no such file, expected weights of {name} "
        expected += rf"\(released: data/weights/{name}/.*, after python -m datasets.download {name} --root data\)"
        refused([CONFIG, *overrides, f"teachers.{teacher}.weights=gone.pth"], tmp_path, expected)
    command = [CONFIG, *overrides, "student.backbone_weights=nowhere", f"student.arch={STUDENTS[2]}"]
    refused(command, tmp_path, r"backbone_weights': nowhere: no such file or folder \(.*download deit_tiny --root")
    refused([GRID, *overrides, "teachers.0.weights=gone.pth"], tmp_path, "row .*gone.pth: no such file", compare.main)


def test_a_folder_of_backbones_serves_every_student(overrides, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("backbones")
    for arch, name in zip(STUDENTS, ("resnet18-abc.pth", "mobilenet_v3_small-def.pth", "deit_tiny_patch16.pth")):
        (folder / name.split(".")[0]).mkdir()
        torch.manual_seed(3)
        backbone = models.build(arch, 20).backbone
        torch.save(public_state(backbone), folder / name.split(".")[0] / name)
        config = load_config(CONFIG, [*overrides, f"student.arch={arch}", f"student.backbone_weights={folder}"])
        started = building.build(config, train.Processes("cpu"), None, lambda line: None).student.backbone.state_dict()
        kept = [n for n in started if n.endswith(("running_mean", "norm2.weight", "qkv.weight", "conv1.weight"))]
        expected = backbone.state_dict()
        assert kept and all(torch.equal(started[name], expected[name]) for name in kept)
    command = [CONFIG, *overrides, f"student.backbone_weights={folder}", "student.arch=fasterrcnn_resnet50"]
    refused(command, tmp_path, r"found none, expected one resnet50-\*\.pth")
    (folder / "resnet18-xyz.pth").write_bytes(b"")
    command = [CONFIG, *overrides, f"student.backbone_weights={folder}"]
    refused(command, tmp_path, "found resnet18-abc.pth, resnet18-xyz.pth, expected one")


def test_weights_of_another_model(overrides, released, tmp_path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    width = {"cls_token": (1, 1, 768), "pos_embed": (1, 1370, 768), "blocks.0.ls1.gamma": (768,)}
    torch.save({name: torch.zeros(shape) for name, shape in width.items()}, other / "larger.pth")
    resnet = public_state(models.build("fasterrcnn_resnet18", 2).backbone)
    torch.save(resnet, other / "resnet.pth")
    command = [CONFIG, *overrides]
    refused([*command, f"teachers.0.weights={other / 'larger.pth'}"], tmp_path, "larger.pth: .*dinov2_vitb14 weights")
    refused([*command, f"teachers.0.weights={other / 'resnet.pth'}"], tmp_path, "resnet.pth: .*resnet18 weights")
    refused([*command, f"teachers.0.weights={released / 'clip.pt'}"], tmp_path, "clip.pt: .*clip_vit_b32 weights")
    refused(
        [*command, f"teachers.1.weights={released / 'dinov2.pth'}"], tmp_path, "dinov2.pth: .*dinov2_vits14 weights"
    )
    command += [f"student.backbone_weights={other / 'resnet.pth'}", f"student.arch={STUDENTS[1]}"]
    refused(command, tmp_path, "resnet.pth: .*resnet18 weights")


def test_classes_that_clip_cannot_be_asked_for(overrides, tmp_path):
    command = [CONFIG, *overrides]
    for change, expected in (
        ("teachers.1.aliases={cat: 'class_7'}", "'teachers.1.aliases': class names: found 'class_7', expected a word"),
        (
            "teachers.1.aliases={cat: dog}",
            "'teachers.1.aliases': class names: found 'dog' and 'dog', expected names th",
        ),
        ("teachers.1.aliases={airship: zeppelin}", "terms.1: teacher 'clip': alias airship: zeppelin must lead from"),
        ("teachers.1.vocabulary=gone.txt.gz", "gone.txt.gz.*datasets.download clip_vocabulary"),
    ):
        refused([*command, change], tmp_path, expected)


def test_sizes_of_pictures(overrides, tmp_path, capsys):
    command = [CONFIG, *overrides]
    refused([*command, "teachers.0.image_size=100"], tmp_path, r"'teachers.0.image_size': found 100, .* multiple of 14")
    refused([*command, "image_size=100"], tmp_path, "key 'image_size': found 100, expected a multiple of 32")
    capsys.readouterr()
    config = load_config(CONFIG, [*overrides, "teachers.0.image_size=140"])
    building.build(config, train.Processes("cpu"), None, print)
    printed = capsys.readouterr().out
    assert "teacher 'dinov2' gets images of 64 px enlarged to 140 px, by a factor of 2.2" in printed
    assert "teacher 'clip' gets images of 64 px enlarged to 224 px, by a factor of 3.5" in printed


def test_a_term_that_could_never_act(overrides, tmp_path):
    command = [CONFIG, *overrides]
    refused(
        [*command, "terms.0.student_maps=[p4]", f"student.arch={STUDENTS[1]}"], tmp_path, "terms.0: map 'p4' is not"
    )
    refused([*command, "terms.0.adapter=none"], tmp_path, "terms.0: p5 and patches: widths differ .256 and 384")
    refused([*command, "terms.1.weight=-1"], tmp_path, "terms.1.weight: found -1.*could never act")
    refused([*command, "terms.1.loss=box_classes"], tmp_path, "terms.1.student_maps: .* expected no names of maps")
