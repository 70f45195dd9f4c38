"""condense.py: every method writes a set that train.py reads, the same bytes each time; what it refuses."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import condense
import models
import train
from config import DataConfig, from_tree, to_tree
from datasets.open import open_dataset
from distill.condense import coresets
from distill.condense.head_matching import HeadSettings, head_gradient_rows
from distill.condense.network_pool import set_statistics
from distill.losses.relations import pool_boxes
from engine.condensing.config import WITHOUT_DRAWS, Method
from engine.condensing.frozen_backbone import FrozenBackbone
from engine.condensing.methods import region_features_of
from engine.condensing.real_pictures import RealPictures
from errors import UserError
from tests.tiny_training import tiny_config
from yaml_files import dump_yaml

WIDTH, HEIGHT = 64, 48
NAMES = ("green", "red")
POOL = {"networks": 1, "first_steps": 0, "steps_between": 1}
QUICK = {
    "arch": "yolov8_narrow",
    "matching": {"steps": 2, "pool": POOL},
    "head": {"steps": 2},
    "real_batch": 2,
}


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    pass


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Twelve oblong pictures with one to four rectangles of two classes, and four to test on; one has no object."""
    root, rng = tmp_path_factory.mktemp("real") / "set", np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            picture, rows = rng.integers(0, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8), []
            for _ in range(0 if number == 3 else int(rng.integers(1, 5))):
                label, (w, h) = int(rng.random() < 0.2), rng.integers(8, 24, 2).tolist()
                x, y = int(rng.integers(WIDTH - w)), int(rng.integers(HEIGHT - h))
                picture[y : y + h, x : x + w] = (230, 40, 40) if label else (40, 220, 60)
                row = ((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT)
                rows.append(f"{label} " + " ".join(f"{value:.8f}" for value in row))
            if number == 5:  # a box that ends 0.6 px past the edge, as rounding leaves some
                picture[20:40, 50:] = (40, 220, 60)
                rows.append(f"0 {57.3 / WIDTH:.8f} {30 / HEIGHT:.8f} {14.6 / WIDTH:.8f} {20 / HEIGHT:.8f}")
            Image.fromarray(picture).save(root / "images" / split / f"r{number:02}.png")
            (root / "labels" / split / f"r{number:02}.txt").write_text("".join(f"{row}\n" for row in rows))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\ntest: images/test\nnames: [green, red]\n")
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A detector of the two classes, as training leaves it: fresh weights, and the statistics of some images."""
    path = tmp_path_factory.mktemp("network") / "last.pt"
    torch.manual_seed(0)
    state = {"arch": "yolov8_narrow", "names": list(NAMES), "image_size": 64, "epoch": 1, "step": 1}
    model = models.build("yolov8_narrow", 2)
    set_statistics(model, torch.rand(8, 3, 64, 64))
    checkpoint.save(path, state | {"ema": model.state_dict()})
    return path


@pytest.fixture
def make(real, network, tmp_path):
    """make(method, pictures, **section): the folder of the set, made by the command."""

    def run(method, pictures=3, output="out", *arguments, **section):
        tree = to_tree(tiny_config(real, tmp_path / "runs"))
        needs = {"network": {"weights": str(network)}, **QUICK}
        tree["condense"] = {**needs, "method": method, "pictures": pictures, **section}
        (tmp_path / "config.yaml").write_text(dump_yaml(tree))
        condense.main([str(tmp_path / "config.yaml"), "--output", str(tmp_path / output), *arguments])
        return tmp_path / output

    return run


def files(folder):
    """The bytes of a set, but for its manifest, which has times in it."""
    found = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {str(name): data for name, data in found.items() if name.name != "manifest.json"}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


EXTRA = {
    "mosaic": {"formation": [2, 2]},
    "gradient_matching": {"formation": [2, 2], "matching": {"steps": 1, "pool": POOL}},
    "linear_head": {"formation": [2, 2], "head": {"steps": 1}},
}
LEARNT = ("gradient_matching", "linear_head")


@pytest.mark.parametrize("method", get_args(Method))
def test_a_set_is_an_ordinary_dataset_with_a_manifest(method, make, real, capsys):
    folder = make(method, **EXTRA.get(method, {}))
    facts = manifest(folder)
    index = open_dataset("yolo", folder, "train")
    assert not index.faults and index.names == NAMES and len(index) == facts["pictures"] == 3
    decoded = 3 * math.prod(facts["formation"])
    assert facts["decoded"] == decoded and (decoded == 12) == (method in ("mosaic", *LEARNT))
    if decoded > 3:
        enlarged = open_dataset("yolo", folder, "train_decoded")
        assert len(enlarged) == decoded and not enlarged.faults
        assert sum(map(len, enlarged.samples)) == sum(map(len, index.samples))
    assert facts["method"] == method and facts["ratio"] == 0.25 and facts["source"]["pictures"] == 12
    assert facts["objects"] == sum(map(len, index.samples)) > 0
    assert facts["seconds"] > 0 and 0.05 < facts["peak_gigabytes"] < 20 and "commit" in facts
    assert Image.open(folder / "set.png").size[0] > 300
    assert not folder.with_name("out.part").exists() and not list(folder.glob("state*"))
    assert (folder / "steps.csv").exists() == (method in LEARNT)
    make(method, **EXTRA.get(method, {}))
    assert "made before" in capsys.readouterr().out
    again = make(method, output="again", **EXTRA.get(method, {}))
    assert files(again) == files(folder)


def test_chosen_pictures_are_the_real_ones_without_padding(make, real):
    folder = make("random", 12, seed=3)
    source = {s.image_path.name: s for s in open_dataset("yolo", real, "train").samples}
    names = manifest(folder)["source_pictures"]
    assert len(set(names)) == 12
    for name, sample in zip(names, open_dataset("yolo", folder, "train").samples):
        assert np.array_equal(Image.open(sample.image_path), Image.open(source[name].image_path))
        np.testing.assert_allclose(sample.boxes_xyxy, source[name].boxes_xyxy.clip(max=[64, 48] * 2), atol=1e-5)
        assert sample.labels.tolist() == source[name].labels.tolist()


def test_methods_choose_as_their_rules_say(make, real, network):
    pictures = RealPictures(DataConfig("yolo", str(real), cache=False), 64)
    names = [sample.image_path.name for sample in pictures.index.samples]
    model, _ = checkpoint.load_model(network)
    batch = pictures.read(list(range(12)))
    with torch.no_grad():
        maps = model(batch.images.float() / 255).features
        features = torch.cat([maps[name].mean((2, 3)) for name in ("p3", "p4", "p5")], dim=1)
        boxes = {"boxes_xyxy": batch.targets.boxes_xyxy, "image": batch.targets.image, "image_size": (64, 64)}
        regions = torch.cat([pool_boxes(maps[name], **boxes).mean((2, 3)) for name in ("p3", "p4", "p5")], dim=1)
        alone = [pictures.read([row]) for row in range(12)]
        losses = [sum(model.losses(model(b.images.float() / 255), b.targets).values()).item() for b in alone]
    counts = [len(sample) for sample in pictures.index.samples]
    backbone = FrozenBackbone(model, 64, 2)
    data = backbone.data_of(pictures)
    fresh = backbone.grid.fresh_head(data.widths, 2)
    expected = {
        "most_objects": sorted(range(12), key=lambda row: (-counts[row], row)),
        "highest_loss": sorted(range(12), key=lambda row: -losses[row]),
        "herding": coresets.herding(features, 4).tolist(),
        "k_center": coresets.k_center(features, 4).tolist(),
        "region_cover": coresets.region_cover(regions, batch.targets.image, batch.targets.labels, 4, 12).tolist(),
        "head_gradient": head_gradient_rows(data, 4, fresh, HeadSettings().ridge).tolist(),
    }
    assert set(expected) == set(WITHOUT_DRAWS)
    torch.testing.assert_close(region_features_of(pictures, model), regions)
    for method, rows in expected.items():
        found = manifest(make(method, 4, method))
        assert found["source_pictures"] == [names[row] for row in rows[:4]], method
        assert "seed" not in found["settings"]
        mosaic = manifest(make("mosaic", 1, f"mosaic_{method}", formation=[2, 2], layouts=method))
        assert mosaic["source_pictures"] == found["source_pictures"] and "seed" not in mosaic["settings"], method
    uniform = manifest(make("uniform", 4, "uniform"))["source_pictures"]
    labels = np.concatenate([pictures.index.samples[names.index(name)].labels for name in uniform])
    assert abs((labels == 0).mean() - 0.5) < abs(np.mean([0, *(batch.targets.labels == 0)]) - 0.5)


@pytest.mark.parametrize("method", ["crops", "mosaic"])
def test_labels_lie_on_their_objects(method, make):
    """The middle of a box has the color of its class, as often as in real pictures, where objects overlap too."""
    extra = {"mosaic": {"formation": [2, 2]}}.get(method, {})
    folders = [(make("random", 12, "real"), "train"), (make(method, 3, "made", **extra), "train")]
    folders += [(folders[1][0], "train_decoded")] if method == "mosaic" else []
    shares = []
    for folder, split in folders:
        fits = []
        for sample in open_dataset("yolo", folder, split).samples:
            picture = np.asarray(Image.open(sample.image_path)).astype(int)
            for (x1, y1, x2, y2), label in zip(sample.boxes_xyxy, sample.labels):
                red, green, _ = picture[int((y1 + y2) / 2), int((x1 + x2) / 2)]
                fits.append((red > 150) if label else (green > 150))
        shares.append(np.mean(fits))
        assert len(fits) > 8
    assert shares[0] > 0.8 and min(shares[1:]) > shares[0] - 0.1


def test_draws_differ_by_seed_and_smaller_ones_are_part_of_larger_ones(make):
    sources = {
        seed: manifest(make("random", 5, f"s{seed}", f"condense.seed={seed}"))["source_pictures"] for seed in (0, 1)
    }
    assert sources[0] != sources[1]
    assert manifest(make("random", 2, "two", "condense.seed=1"))["source_pictures"] == sources[1][:2]
    learnt = make("gradient_matching", 2, "learnt", "condense.seed=1")
    assert manifest(learnt)["source_pictures"] == sources[1][:2]  # learning begins at the random draw of its seed


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ({"method": "random", "pictures": 0}, [], r"condense.pictures': found 0, expected at least 1"),
        ({"method": "random", "pictures": 13}, [], r"condense.pictures': found 13, expected as many as .* has: 12"),
        ({"method": "mosaic", "formation": [2, 2], "pictures": 4}, [], r"found 4, 2 x 2 real ones each, .* has: 12"),
        ({"method": "mosaic"}, [], r"condense.formation': found \[1, 1\], expected more than one tile"),
        ({"method": "random", "formation": [1, 2]}, [], r"found \[1, 2\], expected \[1, 1\]: random stores"),
        ({"method": "gradient_matching", "formation": [65, 1]}, [], r"found \[65, 1\], expected \[rows, columns\]"),
        ({"method": "crops", "crops": 5}, [], r"condense.crops': found 5, expected a divisor of 64"),
        ({"method": "crops", "crops": 16}, [], r"condense.pictures': 768 crops need as many objects; there are"),
        ({"method": "herding", "network": {}}, [], r"condense.network': herding needs a trained network"),
        ({"method": "gradient_matching", "init": "canvas"}, [], r"condense.init': found 'canvas', expected one of"),
        (
            {"method": "gradient_matching", "layouts": "herding", "network": {}}, [],
            r"condense.network': gradient_matching needs",
        ),
        ({"method": "herding", "network": {"weights": "gone.pt"}}, [], r"gone.pt: no such file"),
        ({"method": "randm"}, [], r"condense.method': found 'randm', expected one of random"),
        ({"method": "random", "inti": "noise"}, [], r"unknown key 'condense.inti', did you mean 'condense.init'"),
        ({"method": "gradient_matching", "matching": {"seed": 3}}, [], r"matching.seed': found 3, expected none"),
        ({"method": "gradient_matching", "augment": {"mosaic": 0.5}}, [], r"augment.mosaic: found 0.5, expected 0"),
        ({"method": "gradient_matching", "matching": {"distance": "l3"}}, [], r"matching.distance': found 'l3'"),
        ({"method": "gradient_matching", "matching": {"steps": -1}}, [], r"matching.steps': found -1"),
        ({"method": "gradient_matching", "matching": {"optimizer": "adm"}}, [], r"matching': pixel optimizer 'adm'"),
        ({"method": "gradient_matching", "matching": {"layers": ["nose"]}}, [], r"layers: 'nose' begins no"),
        ({"method": "gradient_matching", "matching": {"pool": {"networks": 0}}}, [], r"condense.matching': .*networks"),
        ({"method": "gradient_matching", "arch": "rtdetr_r18vd"}, [], r"its attention has no second derivative"),
        ({"method": "gradient_matching", "real_batch": 0}, [], r"condense.real_batch': found 0"),
        ({"method": "linear_head", "network": {}}, [], r"condense.network': linear_head needs a trained network"),
        ({"method": "linear_head", "head": {"steps": -1}}, [], r"head.steps': found -1"),
        ({"method": "linear_head", "head": {"distance": "mse"}}, [], r"head.distance': found 'mse', expected one of"),
        ({"method": "linear_head", "head": {"ridge": 0.0}}, [], r"condense.head.ridge': found 0.0, expected a number"),
        ({"method": "linear_head", "head": {"optimizer": "adm"}}, [], r"condense.head': pixel optimizer 'adm'"),
        ({"method": "linear_head", "head": {"total_variation": -1}}, [], r"head.total_variation': found -1"),
        ({"method": "linear_head", "head": {"momentum": 1}}, [], r"condense.head.momentum': found 1.0"),
        ({"method": "gradient_matching", "matching": {"pictures_per_step": -1}}, [], r"pictures_per_step of 0 or more"),
        ({"method": "gradient_matching", "matching": {"pool": {"gradient_clip": -1}}}, [], r"gradient_clip above 0"),
        ({"method": "gradient_matching"}, ["image_size=100"], r"key 'image_size': found 100, expected a mul"),
        ({"method": "random"}, ["--seed", "1"], r"argument --seed: expected --row"),
        ({"method": "random"}, ["--row", "full"], r"expected a teacher and a term|argument --row"),
        ({"method": "random"}, ["device=gpu"], r"key 'device': found 'gpu'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(section, changes, message, make, tmp_path):
    section = {"method": "random", "pictures": 3} | section
    with pytest.raises(UserError, match=message):
        make(section.pop("method"), section.pop("pictures"), "out", *changes, **section)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_a_config_without_the_section_is_told(real, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(to_tree(tiny_config(real, tmp_path / "runs"))))
    with pytest.raises(UserError, match=r"key 'condense.method' is missing, expected condense.method=NAME"):
        condense.main([str(path)])
    condense.main([str(path), "condense.method=random", "condense.pictures=2", "condense.seed=4"])
    assert [p.name[:15] for p in (tmp_path / "runs" / "tiny" / "sets").glob("[!.]*")] == ["random_2_seed4_"]


def test_a_folder_of_something_else_is_left_alone(make, tmp_path):
    make("random", 3, seed=1)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=r"out: holds a set with pictures 3, not 2; give another --output"):
        make("random", 2, seed=1)
    with pytest.raises(UserError, match=r"out: holds a set with method 'random', not 'most_objects'"):
        make("most_objects", 3)
    assert files(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"mine: holds no finished set, expected a new folder"):
        make("random", 3, "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_no_memory_is_one_line(make, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")

    monkeypatch.setattr(condense, "first_layout", fail)
    with pytest.raises(UserError, match=r"^out of memory: .* 9 bytes.; use a smaller image_size") as raised:
        make("random")
    assert raised.value.exit_code == 4 and not list(tmp_path.glob("out*"))


def test_a_network_of_other_classes_is_refused_where_its_loss_is_needed(make, network, tmp_path):
    state = checkpoint.load(network)
    checkpoint.save(tmp_path / "other.pt", state | {"names": ["red", "green"]})
    with pytest.raises(
        UserError, match=r"other.pt: found the classes red, green; expected those of the dataset: green, red"
    ):
        make("highest_loss", network={"weights": str(tmp_path / "other.pt")})
    for method in ("k_center", "linear_head"):  # they read features, which no class names
        assert manifest(make(method, 2, method, network={"weights": str(tmp_path / "other.pt")}))["pictures"] == 2


def test_a_network_whose_features_are_the_same_everywhere_is_refused(make, network, tmp_path):
    """A fresh one: no pixel would move, and nothing would tell."""
    state = checkpoint.load(network)
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "fresh.pt", state | {"ema": models.build("yolov8_narrow", 2).state_dict()})
    with pytest.raises(UserError, match=r"condense.network': its features hardly differ .* expected a trained network"):
        make("linear_head", 2, network={"weights": str(tmp_path / "fresh.pt")})
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("method", LEARNT)
def test_stopped_and_gone_on_with_ends_with_the_same_bytes(method, make, tmp_path, monkeypatch):
    learner = {"gradient_matching": condense.GradientMatching, "linear_head": condense.HeadMatching}[method]
    section = {"matching": {"steps": 4, "pool": POOL}, "head": {"steps": 4}, "picture_every_steps": 2, "init": "noise"}
    whole = make(method, 2, "whole", **section)
    step = learner.step

    def step_and_stop(self):
        report = step(self)
        if self.steps_done == 3:
            signal.raise_signal(signal.SIGINT)
        return report

    monkeypatch.setattr(learner, "step", step_and_stop)
    with pytest.raises(SystemExit) as stopped:
        make(method, 2, "parts", **section)
    assert stopped.value.code == 130 and not (tmp_path / "parts").exists()
    assert checkpoint.load(tmp_path / "parts.part" / "state.pt")["step"] == 3
    with pytest.raises(UserError, match=r"parts.part: holds a set with pictures 2, not 1"):
        make(method, 1, "parts", **section)
    done = []
    monkeypatch.setattr(learner, "step", lambda self: (done.append(self.steps_done), step(self))[1])
    assert files(make(method, 2, "parts", **section)) == files(whole) and done == [3]
    assert sorted(p.name for p in (whole / "steps").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    assert len((whole / "steps.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("method", LEARNT)
def test_another_source_or_network_under_the_same_name_makes_another_set(
    method, make, real, network, tmp_path, monkeypatch
):
    """A finished set is not passed off as theirs, and a stopped one does not go on with them."""
    shutil.copytree(real, tmp_path / "real")
    shutil.copy(network, tmp_path / "network.pt")
    common = {"network": {"weights": str(tmp_path / "network.pt")}}
    root = f"data.root={tmp_path / 'real'}"
    done = make(method, 2, "done", **common)
    make(method, 2, "done", root, **common)  # the same labels at another place

    def stop(*_, **__):
        save(*_, **__)
        raise KeyboardInterrupt

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        make(method, 2, "stopped", root, save_every_steps=1, **common)
    monkeypatch.setattr(checkpoint, "save", save)
    labels = tmp_path / "real" / "labels" / "train" / "r00.txt"
    for change in ("labels", "weights"):
        if change == "labels":
            before = labels.read_text()
            labels.write_text("0 0.5 0.5 0.5 0.5\n")
        elif method == "linear_head":
            save(tmp_path / "network.pt", checkpoint.load(network) | {"epoch": 2})
        else:
            break  # it reads no network
        for folder in ("done", "stopped"):
            with pytest.raises(UserError, match=rf"{folder}(.part)?: the {change} .* are not those of this set; give"):
                make(method, 2, folder, root, save_every_steps=1, **common)
        labels.write_text(before)
    assert manifest(done)["inputs"]


@pytest.mark.parametrize("method", LEARNT)
def test_learning_moves_pixels_and_leaves_boxes(method, make):
    start = make("random", 2, "start", seed=0)
    learnt = make(method, 2, "learnt", seed=0)
    for name, data in files(start).items():
        if name.startswith("labels/"):
            assert files(learnt)[name] == data
    one, two = (np.asarray(Image.open(f / "images/train/000.png")).astype(int) for f in (start, learnt))
    assert one.shape == two.shape == (HEIGHT, WIDTH, 3) and 0.1 < np.abs(one - two).mean() < 20


# ---------------------------------------------------------------- training on it


def test_training_on_a_set_takes_the_steps_of_the_whole_and_tests_on_real_pictures(make, real, tmp_path):
    folder = make("mosaic", 2, formation=[2, 2])
    config = tiny_config(real, tmp_path / "runs", epochs=1)
    steps = {}
    for split, root in (("train", None), ("train", str(folder)), ("train_decoded", str(folder))):
        data = dataclasses.replace(config.data, train=split, train_root=root, pictures_per_epoch=12)
        report = train.run(dataclasses.replace(config, data=data), quiet=True)
        steps[split, root] = report["steps"]
        assert report["split"] == "test" and 0 <= report["test"]["mAP50"] <= 1
    assert set(steps.values()) == {2}
    other = from_tree(type(config), to_tree(config), source="x")
    assert other == config
