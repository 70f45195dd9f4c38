"""B4: data.yaml, configs and lists of class names: refused in one line, or every name stays the text that it was."""

from collections.abc import Iterator
from pathlib import Path

from config import load_config
from datasets.text_lines import read_names
from tests.faults.label_cases import YoloSet
from tests.faults.matrix import Case, Outcome, refusal

# fmt: off
DATA_REFUSED = {
    "no names": ("train: images/train\n", "expected a list of class names"),
    "names of a text": ("names: cell\ntrain: images/train\n", "expected a list"),
    "names of lists": ("names: [[a], [b]]\ntrain: images/train\n", "expected a list"),
    "no name in it": ("names: []\ntrain: images/train\n", "no class names"),
    "an empty name": ("names: [a, '', b]\ntrain: images/train\n", "expected a list"),
    "a name twice": ("names: [a, b, a]\ntrain: images/train\n", "'a' is named twice"),
    "a number is skipped": ("names: {0: a, 2: b}\ntrain: images/train\n", r"expected 0\.\.1"),
    "a number twice": ("names: {0: a, 0: b}\ntrain: images/train\n", ":1: .*given twice"),
    "numbers from one": ("names: {1: a, 2: b}\ntrain: images/train\n", r"expected 0\.\.1"),
    "names by names": ("names: {a: 0, b: 1}\ntrain: images/train\n", r"expected 0\.\.1"),
    "nc of another count": ("nc: 3\nnames: [a, b]\ntrain: images/train\n", "nc is 3, but there are 2"),
    "nc of a word": ("nc: many\ntrain: images/train\n", "expected the number"),
    "nc below zero": ("nc: -1\ntrain: images/train\n", "expected the number"),
    "nc of a billion": ("nc: 1000000000\ntrain: images/train\n", "expected a list of class names"),
    "another split": ("names: [a]\nval: images/train\n", "no split 'train', found val"),
    "split of nothing": ("names: [a]\ntrain:\n", "no split 'train'|expected a folder"),
    "split of keys": ("names: [a]\ntrain: {a: b}\n", "no split 'train'|expected a folder"),
    "split of an empty list": ("names: [a]\ntrain: []\n", "expected a folder"),
    "a key twice": ("names: [a]\ntrain: images/train\ntrain: images\n", ":3: .*given twice"),
    "a path to nowhere": ("names: [a]\npath: elsewhere\ntrain: images/train\n", "elsewhere.*is no folder"),
    "keypoints of text": ("names: [a]\nkpt_shape: many\ntrain: images/train\n", "kpt_shape"),
    "keypoints of four": ("names: [a]\nkpt_shape: [2, 4]\ntrain: images/train\n", "kpt_shape"),
    "a list": ("- a\n", "found a list"), "a text": ("a\n", "found a text"), "empty": ("", "found nothing"),
    "a tag of Python": ("names: !!python/object/apply:os.mkdir [ran-tag]\n", ":1: not valid YAML"),
    "a tag of its own": ("names: !cell [a]\ntrain: images/train\n", ":1: not valid YAML"),
    "an alias": ("names: &n [a]\ntrain: *n\n", ":2: aliases"),
    "laughs": ("a: &a [x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
              "alias"),
    "merged keys": ("a: &a {b: 1}\nc: {<<: *a}\n", ":2: aliases"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, ":1: nested deeper"),
    "open": ("names: [a\n", "not valid YAML"), "tabs": ("names:\n\t- a\n", ":2: not valid YAML"),
    "a zero byte": ("names: [a\0]\n", "not valid YAML"), "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "a list as key": ("? [1, 2]\n: 3\n", ":1: .*plain value"),
    "over 1 MiB": ("a: " + "x" * (1 << 20), "expected a YAML file"),
    "Latin-1": (b"names: [caf\xe9]\n", "not UTF-8"), "UTF-16": ("names: [a]\n".encode("utf-16"), "not UTF-8"),
}
ODD_NAMES = ("no", "on", "null", "1e3", "yes", "~", "010", "12:30", "0x10", "true", "nan", ".5", "1_000", "2024-01-01",
             "a: b", "# c", "'", '"', "\N{LATIN SMALL LETTER DOTLESS I}", "\N{SNOWMAN} cell", "two  spaces", "=", "<<")
CONFIG = "name: tiny\ndata: {format: yolo, root: set}\nstudent: {arch: yolov8n}\n"
CONFIG_REFUSED = {
    "unknown key": ("epoch: 3", "unknown key 'epoch', did you mean 'epochs'"),
    "unknown inner key": ("optimizer: {lr: 1}", "unknown key 'optimizer.lr', expected one of"),
    "text for a number": ("epochs: many", "'epochs': found 'many', expected an integer"),
    "a float for a count": ("epochs: 3.5", "'epochs': found 3.5, expected an integer"),
    "true for a count": ("epochs: true", "'epochs': found True, expected an integer"),
    "a number for a text": ("device: 0", "'device': found 0, expected text"),
    "a number for a section": ("optimizer: 3", "optimizer: found 3, expected keys and values"),
    "a number for a switch": ("compile: 1", "'compile': found 1, expected true or false"),
    "another choice": ("precision: float64", "'precision': found 'float64', expected one of"),
    "nothing": ("seed:", "'seed': found None, expected an integer"),
    "keys for a list": ("terms: {}", "'terms': found {}, expected a list"),
    "a key missing": ("terms: [{teacher: t, loss: mse}]", "'terms.0.weight' is missing"),
}
# fmt: on


def yaml_files(folder: Path) -> Iterator[Case]:
    labels = YoloSet(folder)
    labels.write(labels.text_of(list(labels.good)))
    path = folder / "data.yaml"

    def write(text: str | bytes) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def refused(text: str | bytes, words: str) -> Outcome:
        write(text)
        return refusal(labels.open, path, words)

    def named(name: str, form: str) -> Outcome:
        quoted = "'" + name.replace("'", "''") + "'"
        plain = name if form == "plain" else quoted
        (folder / "names.txt").write_text(f"\n{name}\r\nother\n", newline="")
        if form == "list":
            assert read_names(folder / "names.txt") == (name, "other")
            return "correct"
        write(f"names: [{plain}, b, c]\ntrain: images/train\n" if form != "keys" else
              f"names: {{0: {plain}, 1: b, 2: c}}\ntrain: images/train\n")  # fmt: skip
        assert labels.open().names == (name, "b", "c")
        return "correct"

    def config(text: str, words: str) -> Outcome:
        path = folder / "config_of_a_run.yml"
        path.write_text(CONFIG + text + "\n")
        return refusal(lambda: load_config(path), path, words)

    for name, given in DATA_REFUSED.items():
        yield Case("B4", f"data.yaml: {name}", lambda g=given: refused(*g))
    for name, given in CONFIG_REFUSED.items():
        yield Case("B4", f"config: {name}", lambda g=given: config(*g))
    for name in ODD_NAMES:
        forms = ("quoted", "keys", "list") if name in ("a: b", "# c", "'", '"', "<<", "=", "~") else ("plain", "list")
        for form in forms:
            yield Case("B4", f"class {name!r} in a {form}", lambda n=name, f=form: named(n, f))
