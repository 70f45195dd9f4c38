"""python -m engine.search: its tables, the same choices after a kill, and mistakes in its file."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import train
from config import to_tree
from distill.pruning.files import read_widths
from engine.runtime import run_folder
from engine.search.__main__ import Search, main
from engine.search.config import load_search
from engine.search.space import Space
from engine.search.table import Results
from errors import UserError
from layers.channel_groups import find_groups
from random_streams import Stream, seeded_generator
from tests.conftest import ROOT
from tests.tiny_training import tiny_config
from yaml_files import dump_yaml

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = {"name": "big", "arch": "yolov8_half", "weights": "random"}
TERM = {"teacher": "big", "loss": "soft_class", "weight": 1.0, "student_maps": ["class_logits"]}
SETTINGS = {"flops": 1.0, "shapes": 4, "short_epochs": [1], "keep": 2, "population": 2, "ranked": 3, "depth": 2}


@pytest.fixture
def write(tiny_data, tmp_path):
    """write(search={...}, **changes) -> the path of a search's file."""

    def write_file(search=None, **changes):
        changes = {"name": "search", "epochs": 3, "student": {"arch": "yolov8_narrow"}} | changes
        tree = to_tree(tiny_config(tiny_data, tmp_path / "runs", **changes))
        path = tmp_path / "search.yaml"
        path.write_text(dump_yaml(tree | {"decide": {"seeds": 2}, "search": SETTINGS | (search or {})}))
        return path

    return write_file


@pytest.fixture
def trained(monkeypatch):
    """Stands in for train.run: writes the report of a run that scored by its shape and epochs, and notes its name."""
    names = []

    def run(config, *, resume=False, **_):
        names.append(config.name)
        folder = run_folder.RunFolder(Path(config.runs) / config.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.config.write_text(dump_yaml(to_tree(config)))
        score = zlib.crc32(Path(config.student.widths).read_bytes()) % 97 / 100
        score += 0.001 * config.epochs + (0.1 if config.terms else 0)
        score = 1 - score if config.seed else score  # another seed reverses the order
        report = {"test": {"mAP50-95": score}, "seconds": 60.0, "device": "cpu", "threads": 1}
        folder.report.write_text(json.dumps(report))
        return report

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(Space, "widths_text", lambda space, shape: shape.name)
    monkeypatch.setattr(Search, "proxies", lambda search, shape: {"GFLOPs": search.space.flops(shape) / 1e9})
    return names


def read(tmp_path, name):
    return (tmp_path / "runs" / "search" / name).read_text()


def test_killed_and_given_again_it_chooses_the_same(write, trained, monkeypatch, tmp_path, capsys):
    path, run = str(write()), train.run
    main([path])
    text, tree = read(tmp_path, "search.md"), json.loads(read(tmp_path, "search.json"))
    found, whole = read(tmp_path, "found_labels.yaml"), list(trained)
    assert len(whole) == len(set(whole))  # each training once
    main([path])
    assert trained == whole and read(tmp_path, "search.md") == text  # all are read
    kills = iter(range(1, 100))

    def run_or_die(config, **options):
        if next(kills) % 6 == 0:
            (Path(config.runs) / config.name).mkdir()  # as a run that had no checkpoint yet
            raise KeyboardInterrupt
        return run(config, **options)

    (tmp_path / "runs" / "search").rename(tmp_path / "before")
    trained.clear()
    monkeypatch.setattr(train, "run", run_or_die)
    for _ in range(100):
        try:
            main([path])
            break
        except KeyboardInterrupt:
            continue
    assert trained == whole and read(tmp_path, "search.md") == text
    assert json.loads(read(tmp_path, "search.json")) == tree and read(tmp_path, "found_labels.yaml") == found
    labels = tree["results"]["labels"]
    for method in ("random", "evolution"):
        assert [[len(rung) for rung in draw["rungs"]] for draw in labels["found"][method]] == [[4, 2]] * 2
        assert len({draw["rungs"][0][0]["shape"] for draw in labels["found"][method]}) == 2  # other draws
    full = [pair for draws in labels["found"].values() for draw in draws for pair in draw["rungs"][-1]]
    full += [{"shape": r["shape"], "score": r["scores"]["3"]} for r in labels["ranked"]]
    assert labels["best"]["score"] == max(pair["score"] for pair in full)
    assert len(labels["ranked"]) == 3 and set(labels["tau"]) == {"GFLOPs", "1 epoch"}
    assert labels["tau"]["1 epoch"] == 1  # the score of the stand-in
    assert "If the order of 3 shapes were random, |tau| would stay below 1.25 in about 95 % of cases." in text
    assert "**Kendall's tau with 3 epochs**" in text and "| evolution | random | 2 |" in text
    assert "written: " in capsys.readouterr().out


def test_ranked_shapes_are_trained_again_with_the_next_seed(write, trained, tmp_path):
    main([str(write({"ranked_again": True}))])
    labels = json.loads(read(tmp_path, "search.json"))["results"]["labels"]
    assert sum(name.endswith("_3_seed1") for name in trained) == len(labels["ranked"]) == 3
    for ranked in labels["ranked"]:
        assert ranked["another_seed"] == pytest.approx(1 - ranked["scores"]["3"])
    assert labels["tau"]["another seed"] == -1 and list(labels["tau"])[-1] == "another seed"
    header = next(line for line in read(tmp_path, "search.md").splitlines() if line.startswith("| random shape"))
    assert header.endswith("| mAP, 1 epoch | mAP, 3 epochs, seed 1 | mAP, 3 epochs |")
    row = next(line for line in read(tmp_path, "search.md").splitlines() if "Kendall's tau with 3" in line)
    assert row.endswith("| +1.00 | -1.00 | |")
    first = np.array([ranked["scores"]["3"] for ranked in labels["ranked"]])
    of_seeds = np.stack((first, 1 - first)).var(0, ddof=1).mean() ** 0.5
    found = f"has a standard deviation of {of_seeds:.3f} over its seeds; the means of both seeds: 0.500 ± 0.000 over"
    assert found in read(tmp_path, "search.md")


def test_labels_and_distillation_have_searches_of_their_own(write, trained, tmp_path):
    search = {"on": ["labels", "distillation"], "ranked": 2, "shapes": 2}
    main([str(write(search, teachers=[TEACHER], terms=[TERM]))])
    text = read(tmp_path, "search.md")
    assert "over the same 2 shapes in full: +1.00. distillation - labels, paired by shape: mAP +0.100, 95 %" in text
    assert "interval +0.100 .. +0.100." in text
    tree = json.loads(read(tmp_path, "search.json"))["results"]
    scores = [tree[name]["ranked"][0]["scores"]["3"] for name in ("labels", "distillation")]
    assert scores[1] == pytest.approx(scores[0] + 0.1)
    assert load_search(write(None, teachers=[TEACHER], terms=[TERM])).teachings == ("distillation",)


def test_a_loss_that_is_not_finite_scores_nothing(write, trained, monkeypatch, tmp_path):
    run = train.run

    def run_or_fail(config, **options):
        if len(trained) == 2:
            trained.append(config.name)
            raise UserError("step 3: box is nan", 3)
        return run(config, **options)

    monkeypatch.setattr(train, "run", run_or_fail)
    main([str(write({"ranked": 0}))])
    text, whole = read(tmp_path, "search.md"), list(trained)
    assert f"Failed, counted as 0: {whole[2]}: step 3: box is nan" in text
    monkeypatch.setattr(train, "run", run)  # it would end well now
    main([str(tmp_path / "search.yaml")])
    assert trained == whole and read(tmp_path, "search.md") == text  # nothing is trained again, the failed one included


def test_a_search_in_earnest(write, tmp_path):
    """Two random shapes and the control, really trained for an epoch; the best one is an ordinary run and a file."""
    main([str(write({"shapes": 1, "short_epochs": [], "ranked": 1, "population": 1}, epochs=1))])
    tree = json.loads(read(tmp_path, "search.json"))["results"]["labels"]
    run = tmp_path / "runs" / "search" / "runs" / f"labels_{tree['best']['shape']}_1"
    model, info = checkpoint.load_model(run)
    widths = read_widths(tmp_path / "runs" / "search" / "found_labels.yaml", "yolov8_narrow")
    assert find_groups(model).widths() == widths and info.arch == "yolov8_narrow"
    report = json.loads((run / "report.json").read_text())
    assert tree["best"]["score"] == (report["test"]["mAP50-95"] or 0)
    assert tree["ranked"][0]["proxies"]["parameters (M)"] > 0.1 and tree["ranked"][0]["proxies"]["gradient norm"] > 0
    assert len(list(run.parent.glob("labels_*"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("search.flops=0", r"'search\.flops': found 0\.0, expected a share above 0"),
        ("search.keep=1", r"'search\.keep': found 1, expected at least 2"),
        (
            "search.short_epochs=[3]",
            r"'search\.short_epochs': found \(3,\), expected rising numbers below the file's epochs, 3",
        ),
        ("search.population=9", r"'search\.population': found 9, expected 1\.\.4"),
        ("search.ranked=9", r"'search\.ranked': found 9, expected 0\.\.8"),
        (
            "search.on=[distillation]",
            r"'search\.on': found \('distillation',\), expected labels: ",
        ),
        ("search.flops=.inf", r"'search\.flops': found inf, expected a share above 0"),
        ("search.widths=[0.5,.inf]", r"'search\.widths': found \(0\.5, inf\), expected the least and the largest"),
        ("search.depth=13", r"'search\.depth': found 13, expected 1\.\.12"),
        ("search.least=0.9999", r"key 'search': none of 2,000 random shapes .* and is new"),
        ("search.flops=0.001", r"key 'search'"),
        ("name=../up", r"key 'name': found '\.\./up', expected the name of a folder"),
        ("search.dept=2", r"'search\.dept'.*depth"),
        ("student.arch=yolov5n", r"'student\.arch': found yolov5n, expected a YOLOv8"),
        ("student.weights=a.pt", r"'student\.weights': every shape begins fresh, expected none"),
        ("decide.seeds=1", r"'decide\.seeds'"),
        ("batch_size=0", r"'batch_size'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(write, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        main([str(write()), change])
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_a_term_of_weight_0_does_not_part_a_search_from_its_runs(write, tmp_path, capsys):
    """train.py leaves such a term out of the config that a finished run is known by."""
    idle = TERM | {"loss": "localization", "weight": 0.0, "student_maps": ["box_logits"]}
    path = write(teachers=[TEACHER], terms=[TERM, idle])
    searches = [Search(load_search(path), "here") for _ in range(2)]
    for search in searches:
        search.results["distillation"] = Results()
    shape = search.space.draw(seeded_generator(Stream.SHAPES, 0, 0))
    first, again = (search.score("distillation", shape, 1) for search in searches)  # trained, and read
    assert first == again
    assert "left out, weight 0: localization_big" in capsys.readouterr().out


def test_only_this_command_takes_its_file(write, tmp_path):
    with pytest.raises(UserError, match=r"key 'search': python -m engine\.search .* trains its shapes"):
        train.main([str(write())])
    plain = tmp_path / "plain.yaml"
    plain.write_text(dump_yaml({"name": "a", "data": {"format": "voc", "root": "a"}, "student": {"arch": "yolov8n"}}))
    with pytest.raises(UserError, match="key 'search' is missing"):
        main([str(plain)])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "search").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_the_repository(path):
    file = load_search(path)
    assert path.read_text().startswith("# ") and f"engine.search configs/search/{path.name}" in path.read_text()
    assert file.name == f"{path.stem}_search"
