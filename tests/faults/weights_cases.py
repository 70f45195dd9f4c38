"""A1 to A7: weights files with code, with lies, bombs, damage, of other models, and good ones of every layout."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

import checkpoint
import models
from errors import UserError
from tests.faults.matrix import Case, Outcome, refusal
from tests.weights import hostile, hostile_arrays, hostile_content
from weights import read_state_dict
from weights.shared_file import to_bytes

FLIPS, CUTS = 50, 25  # of each container
CONTAINERS = {"bare": bytes, "zip": hostile.torch_zip, "legacy": hostile.legacy}
KINDS = {
    hostile.absent_libraries: "A1",
    hostile.opcode_files: "A1",
    hostile.header_files: "A3",
    hostile_content.lying_files: "A3",
    hostile_content.bomb_files: "A4",
    hostile_content.wrong_files: "A5",
    hostile_arrays.safetensors_files: "A6",
    hostile_arrays.npz_files: "A6",
}


def is_refused(path: Path, data: bytes, reason: str) -> Outcome:
    """Write the file, read it, and look for what its code would have left behind."""
    path.write_bytes(data)
    found = refusal(lambda: read_state_dict(path), path, reason)
    path.unlink()
    assert not list(path.parent.glob("ran-*")), "its code ran"
    return found


def code_in_pickles(folder: Path) -> Iterator[Case]:
    """Every call that writes a file, in every protocol of pickle and every container."""

    def run(kind: str, protocol: int, container: str) -> Outcome:
        name = f"{kind}-{protocol}-{container}"
        program = hostile.dump({"model": hostile.gadgets(str(folder / f"ran-{name}"))[kind]}, protocol)
        return is_refused(folder / f"{name}.pt", CONTAINERS[container](program), hostile.NAMED)

    for kind, protocol, container in itertools.product(hostile.gadgets(""), range(6), CONTAINERS):
        yield Case("A1", f"{kind}-{protocol}-{container}", lambda *a, k=kind, p=protocol, c=container: run(k, p, c), 1)


def hostile_files(folder: Path) -> Iterator[Case]:
    """The corpus of tests/weights, by the kinds of the matrix."""
    makers = [(case, "A2" if "-in-" in case.name else "A1") for case in hostile.code_files(folder)]
    makers += [(case, kind) for make, kind in KINDS.items() for case in make(folder)]
    for case, kind in makers:
        run = lambda c=case: is_refused(folder / f"{c.name}.pt", c.data, c.reason)
        yield Case(kind, case.name, run, 10 if kind == "A4" else 2)


def same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        got[name].dtype == value.dtype and got[name].shape == value.shape and got[name].equal(value)
        for name, value in expected.items()
    )


def npz_of(state: dict[str, torch.Tensor]) -> bytes:
    return hostile.zip_of([(f"{name}.npy", _npy(value.numpy())) for name, value in state.items()])


def _npy(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def damaged_files(folder: Path) -> Iterator[Case]:
    """Flipped bits and cuts of each container: refused, or the tensors are what they were."""
    state = hostile.good_state()
    description = {"tensor_names": "ours", "arch": "yolov8n", "names": ["a"], "image_size": 64, "config": {}}
    files = {
        "zip": hostile.saved(state),
        "legacy": hostile.saved(state, zipped=False),
        "npz": npz_of(state),
        "safetensors": save_safetensors(state),
        "student": to_bytes(state, description),
    }

    def run(data: bytes, digest: str | None) -> Outcome:
        path = folder / "damaged.pt"
        path.write_bytes(data)
        try:
            got = read_state_dict(path, sha256=digest)[0]
        except UserError:
            return refusal(lambda: read_state_dict(path, sha256=digest), path)
        assert same_bits(got, state), "read as something else"
        return "correct"

    for container, data in files.items():
        (folder / "whole.pt").write_bytes(data)
        info = read_state_dict(folder / "whole.pt")[1]
        digest = None if info.has_checksum else info.sha256  # a release without a checksum inside gives one
        rng = np.random.default_rng(len(data))
        for number in range(FLIPS):
            place, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
            flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            yield Case("A5", f"{container}-flip-{number}", lambda d=flipped, s=digest: run(d, s))
        for number, length in enumerate(np.linspace(0, len(data) - 1, CUTS).astype(int)):
            yield Case("A5", f"{container}-cut-{number}", lambda d=data[:length], s=digest: run(d, s))


def write_model(path: Path, arch: str, changes: dict[str, object] | None = None) -> dict:
    """A checkpoint of ours with an untrained model of two classes. changes: of its keys. Returns its weights."""
    state = models.build(arch, 2).state_dict()
    checkpoint.save(path, {"arch": arch, "names": ["a", "b"], "image_size": 64, "ema": state} | (changes or {}))
    return state


def write_without(path: Path, key: str) -> None:
    write_model(path, "yolov8_narrow")
    state = checkpoint.load(path)
    del state[key]
    checkpoint.save(path, state)


def other_models(folder: Path) -> Iterator[Case]:
    """Checkpoints that are whole, and not those of the model that is asked for."""
    path = folder / "other.pt"

    def run(write: Callable[[], object], arch: str | None, words: str) -> Outcome:
        write()
        return refusal(lambda: checkpoint.load_model(path, arch), path, words)

    def changed(change: Callable[[dict], object]) -> Callable[[], None]:
        def write() -> None:
            state = models.build("yolov8_narrow", 2).state_dict()
            change(state)
            write_model(path, "yolov8_narrow", {"ema": state})

        return write

    family = ("yolov8n", "yolov5n", "yolov5nu", "yolov8_narrow", "yolov7_tiny")
    rows: dict[str, tuple[Callable[[], object], str | None, str]] = {
        f"{theirs}-for-{ours}": (lambda a=theirs: write_model(path, a), ours, f"holds {theirs}, expected {ours}")
        for theirs, ours in itertools.permutations(family, 2)
    }
    first = next(iter(models.build("yolov8_narrow", 2).state_dict()))
    narrow = {
        "key-missing": (lambda s: s.pop(first), f"parameters do not fit the model: {first}$"),
        "key-more": (lambda s: s.update(more=torch.ones(2)), "parameters do not fit the model: more$"),
        "key-renamed": (lambda s: s.update(other=s.pop(first)), "parameters do not fit the model: .*, other$"),
        "shape": (lambda s: s.update({first: torch.ones(3)}), "parameters do not fit the model"),
        "empty": (lambda s: s.clear(), "parameters do not fit|class head"),
    }
    rows |= {name: (changed(change), None, words) for name, (change, words) in narrow.items()}
    values = {
        "more-names": ({"names": ["a", "b", "c"]}, "parameters do not fit"),
        "fewer-names": ({"names": ["a"]}, "parameters do not fit"),
        "no-names": ({"names": None}, "damaged"),
        "names-of-numbers": ({"names": [1, 2]}, "damaged"),
        "size-of-text": ({"image_size": "64"}, "found image_size '64'"),
        "size-zero": ({"image_size": 0}, "found image_size 0"),
        "size-true": ({"image_size": True}, "found image_size True"),
        "config-of-text": ({"config": "x"}, "damaged"),
        "unknown-arch": ({"arch": "yolo9t"}, "found weights of 'yolo9t', expected one of yolov8n"),
        "arch-of-a-list": ({"arch": ["yolov8n"]}, "found weights of .*, expected one of yolov8n"),
        "weights-of-a-list": ({"ema": [torch.ones(2)]}, "expected one of yolov8n"),
        "format-newer": ({"format": 2}, "found checkpoint format 2, this code reads 1"),
        "format-of-text": ({"format": "1"}, "found checkpoint format '1', this code reads 1"),
    }
    for name, (changes, words) in values.items():
        rows[name] = (lambda c=changes: write_model(path, "yolov8_narrow", c), None, words)
    for key in ("arch", "names", "image_size", "ema"):
        rows[f"without-{key}"] = (lambda k=key: write_without(path, k), None, f"no key '{key}'")
    for name, (write, arch, words) in rows.items():
        yield Case("A5", name, lambda w=write, a=arch, t=words: run(w, a, t), 10)


def good_files(folder: Path) -> Iterator[Case]:
    """Twins of the released layouts, with other numbers, in every container: bit-equal; and checkpoints of ours."""
    from tests.weights.test_convert import LAYOUTS, SAME_NAMES, random_state

    forms: dict[str, Callable[[dict], bytes]] = {
        "zip": hostile.saved,
        "model": lambda state: hostile.saved({"model": state, "epoch": 3}),
        "legacy": lambda state: hostile.saved(state, zipped=False),
        "safetensors": save_safetensors,
    }

    def run(layout: str, form: str) -> Outcome:
        state, path = random_state(LAYOUTS[layout]), folder / "good.pt"
        path.write_bytes(forms[form](state))
        assert same_bits(read_state_dict(path)[0], state), "read as something else"
        return "correct"

    def ours(arch: str, half: bool) -> Outcome:
        path = folder / "ours.pt"
        state = write_model(path, arch)
        if half:
            path = folder / "ours.safetensors"
            description = {"arch": arch, "names": ["a", "b"], "image_size": 64, "config": {}}
            checkpoint.save_student(path, description | {"ema": state})
        model, info = checkpoint.load_model(path)
        assert info.arch == arch and same_bits(dict(model.state_dict()), dict(state)), "read as something else"
        return "correct"

    layouts = [name for name in LAYOUTS if not SAME_NAMES.fullmatch(name)]
    for layout, form in itertools.product(layouts, forms):
        yield Case("A7", f"{layout}-{form}", lambda n=layout, f=form: run(n, f))
    for arch, half in itertools.product(("yolov8_narrow", "yolov8n", "yolov5n", "yolov5nu"), (False, True)):
        yield Case("A7", f"ours-{arch}-{'student' if half else 'run'}", lambda a=arch, h=half: ours(a, h))
