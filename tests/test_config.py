"""config.py and yaml_files.py: every mistake in a config is an error of one line that names the key."""

import dataclasses

import pytest

from config import Config, OptimizerConfig, apply_override, from_tree, load_config, to_tree
from errors import UserError
from yaml_files import dump_yaml, parse_yaml, read_yaml

MINIMAL = "name: x\ndata: {format: yolo, root: somewhere}\nstudent: {arch: yolov8n}\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_and_types(write):
    config = load_config(write(MINIMAL + "optimizer: {learning_rate: 1e-3, warmup_epochs: 2}\nseed: 010\n"))
    assert config.optimizer == OptimizerConfig(learning_rate=0.001, warmup_epochs=2.0)
    assert isinstance(config.optimizer.warmup_epochs, float)  # a whole number passes for a float
    assert config.seed == 10 and config.terms == () and config.student.weights is None


def test_round_trip(write):
    text = MINIMAL + (
        "teachers: [{name: t, arch: yolov8s, optimizer: {learning_rate: 0.02}}]\n"
        "terms: [{teacher: t, loss: mse, weight: 2, student_maps: [p3, p4], parameters: {a: [1, 2]}}]\n"
    )
    config = load_config(write(text))
    assert from_tree(Config, to_tree(config), source="") == config
    assert from_tree(Config, parse_yaml(dump_yaml(to_tree(config)), ""), source="") == config
    assert config.terms[0].student_maps == ("p3", "p4") and config.terms[0].weight == 2.0


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("epoch: 3", "unknown key 'epoch', did you mean 'epochs'?"),
        (
            "optimizer: {learningrate: 1}",
            "unknown key 'optimizer.learningrate', did you mean 'optimizer.learning_rate'?",
        ),
        ("epochs: 3.5", "key 'epochs': found 3.5, expected an integer"),
        ("epochs: true", "key 'epochs': found True, expected an integer"),
        ("optimizer: {momentum: true}", "key 'optimizer.momentum': found True, expected a number"),
        ("optimizer: {momentum: fast}", "key 'optimizer.momentum': found 'fast', expected a number"),
        ("optimizer: {name: adam}", "key 'optimizer.name': found 'adam', expected one of sgd, adamw"),
        ("optimizer: 3", "optimizer: found 3, expected keys and values"),
        ("compile: 1", "key 'compile': found 1, expected true or false"),
        ("device: 0", "key 'device': found 0, expected text"),
        ("terms: {}", "key 'terms': found {}, expected a list"),
        ("terms: [{teacher: t, loss: mse}]", "key 'terms.0.weight' is missing"),
        ("terms: [3]", "terms.0: found 3, expected keys and values"),
        ("seed: ", "key 'seed': found None, expected an integer"),
    ],
)
def test_mistakes_name_the_key(write, extra, expected):
    path = write(MINIMAL + extra + "\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {expected}"
    assert error.value.exit_code == 2


def test_missing_key_and_wrong_top_level(write):
    with pytest.raises(UserError, match="key 'student' is missing"):
        load_config(write("name: x\ndata: {format: yolo, root: r}\n"))
    with pytest.raises(UserError, match="expected keys and values"):
        load_config(write("- 1\n"))
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_overrides(write):
    path = write(MINIMAL + "terms: [{teacher: t, loss: mse, weight: 1, student_maps: [p3]}]\n")
    config = load_config(
        path, ["epochs=3", "optimizer.learning_rate=1e-4", "terms.0.weight=2", "student.weights=null", "name='1e3'"]
    )
    assert (config.epochs, config.optimizer.learning_rate, config.terms[0].weight) == (3, 1e-4, 2.0)
    assert config.student.weights is None and config.name == "1e3"
    assert load_config(path, ["terms=[]"]).terms == ()
    # null is a section without values
    assert load_config(path, ["optimizer=null", "optimizer.momentum=0.5"]).optimizer.momentum == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("terms.1.weight=2", "found '1', expected an index 0..0"),
        ("terms.x.weight=2", "found 'x', expected an index"),
        ("terms.².weight=2", "found '²', expected an index"),
        ("name.x=2", "inside a plain value"),
        ("name.x.y=2", "inside a plain value"),
        ("a: b=[", "argument"),
        ("epochs=[1", "not valid YAML"),
    ],
)
def test_bad_overrides(override, expected):
    tree = {"name": "x", "terms": [{"weight": 1}]}
    with pytest.raises(UserError, match=expected.replace("[", r"\[")):
        apply_override(tree, override)
        from_tree(Config, tree, source="arguments")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizerConfig().momentum = 1.0


SCALARS = [
    ("1e-3", 1e-3), ("1E3", 1e3), ("1.", 1.0), (".5", 0.5), ("-2", -2), ("010", 10), ("true", True), ("False", False),
    ("no", "no"), ("on", "on"), ("yes", "yes"), ("12:30", "12:30"), ("0x10", "0x10"), ("1_000", "1_000"),
    ("2024-01-01", "2024-01-01"), ("~", None), ("null", None), ("", None), ("1e3x", "1e3x"), (".inf", float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars(text, value):
    got = parse_yaml(f"key: {text}", "here")["key"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text", [text for text, _ in SCALARS] + ["'", '"', "a: b", "- x", "# c", "ü\n", " x ", "=", "<<"]
)
def test_strings_survive_a_round_trip(text):
    tree = {"names": [text], "nested": {"key": text}}
    assert parse_yaml(dump_yaml(tree), "") == tree


def test_as_text_keeps_class_names():
    assert parse_yaml("names: [no, 1e3, null, 010, true]", "", as_text=True)["names"] == [
        "no",
        "1e3",
        "null",
        "010",
        "true",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("? [1, 2]\n: 3", "plain value"),
        ("a: \x00", "not valid YAML"),
    ],
    ids=["twice", "alias", "deep", "tag", "open", "key", "nul"],
)
def test_refused(text, expected):
    with pytest.raises(UserError, match=expected) as error:
        parse_yaml(text, "file.yaml")
    assert str(error.value).startswith("file.yaml") and "\n" not in str(error.value)


def test_files_too_large_or_not_text(tmp_path):
    (tmp_path / "big.yaml").write_text("a: " + "x" * (1 << 20))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    for name in ("big.yaml", "latin.yaml"):
        with pytest.raises(UserError, match=name):
            read_yaml(tmp_path / name)
    assert read_yaml(tmp_path / "bom.yaml") == {"a": 1, "b": 2}


def test_a_missing_config_names_what_comes_nearest(tmp_path, monkeypatch):
    (tmp_path / "my_set.yaml").touch()
    begin = (
        "wheels.yaml: found no such file, expected a config; python train.py --init .*wheels.yaml --data FOLDER writes"
    )
    with pytest.raises(UserError, match=begin):
        load_config(tmp_path / "wheels.yaml")
    monkeypatch.chdir(tmp_path)
    for wrong, near in (
        ("my_sets.yaml", "my_set.yaml"),
        ("bccd_yolov8", "bccd_yolov8n.yaml"),
        ("demoo.yaml", "demo.yaml"),
    ):
        with pytest.raises(
            UserError, match=rf"{wrong}: found no such file, .*\(did you mean (\S*/)?{near}\?\); python"
        ):
            load_config(wrong)
