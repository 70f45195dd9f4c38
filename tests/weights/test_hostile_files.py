"""Reading weights from the corpus of hostile.py: nothing runs, nothing crashes, each file gets one line."""

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

import checkpoint
from errors import UserError
from tests.weights.hostile import (
    NAMED,
    absent_libraries,
    code_files,
    corpus,
    dump,
    gadgets,
    good_state,
    header_files,
    saved,
)
from weights import read_state_dict

ROOT = Path(__file__).resolve().parents[2]
# A process of its own, so that a crash is seen, memory can be limited, and what gets imported can be compared.
READER = """
import json, resource, sys, time
from pathlib import Path
import weights
from errors import UserError

used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
before = set(sys.modules)
for path in sorted(Path(sys.argv[1]).glob("*.pt")):
    start = time.perf_counter()
    try:
        state, info = weights.read_state_dict(path)
        outcome = "read", " ".join(state)
    except UserError as error:
        outcome = "refused", str(error)
    except BaseException as error:
        outcome = "crashed", repr(error)[:300]
    print(json.dumps([path.name, *outcome, time.perf_counter() - start]), flush=True)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """({case name: (case, verdict, message, seconds)}, folder, modules imported while reading)"""
    folder = tmp_path_factory.mktemp("hostile")
    cases = {f"{case.name}.pt": case for case in corpus(folder)}
    assert not list(folder.glob("ran-*")), "generating the corpus ran it"
    for name, case in cases.items():
        (folder / name).write_bytes(case.data)
    command = [sys.executable, "-c", READER, str(folder)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"the reader died after {lines[-1] if lines else 'nothing'}: {run.stderr[-1000:]}"
    return {name: (cases[name], *rest) for name, *rest in lines[:-1]}, folder, lines[-1]


def test_corpus_is_refused(outcomes, capsys):
    results, folder, imported = outcomes
    ran = sorted(path.name for path in folder.glob("ran-*"))
    refused = [name for name, (_, verdict, _, _) in results.items() if verdict == "refused"]
    crashed = {name: message for name, (_, verdict, message, _) in results.items() if verdict == "crashed"}
    one_line = [name for name in refused if "\n" not in results[name][2] and len(results[name][2]) < 600]
    with capsys.disabled():
        print(
            f"\nhostile files: {len(refused)} of {len(results)} refused, {len(one_line)} in one line; "
            f"{len(ran)} ran code, {len(crashed)} crashed the reader"
        )
    assert len(results) >= 300
    assert not ran and not crashed
    assert len(one_line) == len(results), sorted(set(results) - set(one_line))
    assert not [
        name for name in imported if name.partition(".")[0] in {"subprocess", "timeit", "models", "ultralytics"}
    ]


def test_reasons_are_right(outcomes):
    """A file that is refused for another reason than its own would be read if it were better made."""
    results, folder, _ = outcomes
    wrong = {
        name: message
        for name, (case, _, message, _) in results.items()
        if not re.search(case.reason, message.removeprefix(f"{folder / name}: "))
    }
    assert not wrong


def test_refusals_name_the_file_and_are_quick(outcomes):
    results, folder, _ = outcomes
    assert all(message.startswith(f"{folder / name}: ") for name, (_, _, message, _) in results.items())
    slow = {name: seconds for name, (_, _, _, seconds) in results.items() if seconds > 10}
    assert not slow


@pytest.mark.parametrize("kind", sorted(gadgets("")))
def test_gadgets_are_live(kind, tmp_path):
    """Python's own reader runs them; the corpus would prove nothing otherwise."""
    mark = tmp_path / "ran"
    program = dump(gadgets(str(mark))[kind])
    result = pickle.loads(program)
    for _ in range(100):  # a started process may take a moment
        if mark.exists() or (tmp_path / "ran.npy").exists():
            break
        time.sleep(0.05)
    assert mark.exists() or (tmp_path / "ran.npy").exists()
    if isinstance(result, subprocess.Popen):
        result.wait()


def test_no_file_that_names_code_reaches_torch_load(tmp_path, monkeypatch):
    """checkpoint.load checks what torch.load would read by the reader of public files."""
    cases = [*code_files(tmp_path), *absent_libraries(tmp_path), *header_files(tmp_path)]
    harmful = [case for case in cases if case.reason == NAMED or case.name.startswith("header-")]
    assert len(harmful) > 80
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch.load was called"))
    path = tmp_path / "last.pt"
    for case in harmful:
        path.write_bytes(case.data)
        with pytest.raises(UserError, match=r"last\.pt: "):
            checkpoint.load(path)
    assert not list(tmp_path.glob("ran-*"))


def _equal(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def _npz(state: dict) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    return file.getvalue()


CONTAINERS = {
    "zip": saved,
    "npz": _npz,
    "legacy": lambda state: saved(state, zipped=False),
    "safetensors": save_safetensors,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_flipped_bits_are_refused_or_harmless(container, tmp_path):
    """One flipped bit anywhere: refused, or the tensors are what they were. Where the container has no checksum the
    SHA-256 that the release gives is what notices."""
    state = good_state()
    data = CONTAINERS[container](state)
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    expected, info = read_state_dict(path)
    assert info.has_checksum == (container in {"zip", "npz"})
    digest = None if info.has_checksum else info.sha256
    rng = np.random.default_rng(0)
    refused = 0
    for position in {*range(100), *rng.integers(0, len(data), 300), *range(len(data) - 100, len(data))}:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            got = read_state_dict(path, sha256=digest)[0]
        except UserError:
            refused += 1
            continue
        assert _equal(got, expected), f"byte {position}"
    assert refused > 150


@pytest.mark.parametrize("container", CONTAINERS)
def test_damage_without_a_hash_never_crashes(container, tmp_path):
    """Runs of random bytes written over a good file: a UserError or tensors, no other exception."""
    state = good_state()
    data = CONTAINERS[container](state)
    head = data.find(b"conv.weight")
    rng = np.random.default_rng(1)
    path = tmp_path / "weights.pt"
    for trial in range(250):
        damaged = bytearray(data)
        near = head if trial % 2 else rng.integers(0, len(data))
        begin = int(np.clip(near + rng.integers(-300, 600), 0, len(data) - 1))
        length = int(rng.integers(1, 9))
        damaged[begin : begin + length] = rng.bytes(length)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    for data in (saved(good_state()), saved(good_state(), zipped=False), save_safetensors(good_state())):
        for length in range(0, len(data), 37):
            path.write_bytes(data[:length])
            with pytest.raises(UserError):
                read_state_dict(path)


def test_pickle_damage_behind_a_right_checksum(tmp_path):
    """Whoever writes a file also writes its checksums: data.pkl damaged before it is packed."""
    with zipfile.ZipFile(io.BytesIO(saved({"model": good_state(), "epoch": 3}))) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    rng = np.random.default_rng(2)
    path = tmp_path / "weights.pt"
    for _ in range(300):
        program = bytearray(entries[name])
        for position in rng.integers(0, len(program), rng.integers(1, 4)):
            program[position] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in entries.items():
                archive.writestr(entry, bytes(program) if entry == name else data)
        try:
            state = read_state_dict(path)[0]
        except UserError:
            continue
        assert all(isinstance(tensor, torch.Tensor) and tensor.isfinite().all() for tensor in state.values())


def test_odd_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"absent.pt": "No such file", "": "not a regular file", "pipe": "not a regular file"}.items():
        with pytest.raises(UserError, match=reason):
            read_state_dict(tmp_path / name)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="Not a directory"):
        read_state_dict(tmp_path / "file" / "weights.pt")
    (tmp_path / "huge.pt").touch()
    os.truncate(tmp_path / "huge.pt", 5 << 30)  # a hole: it takes no disk
    with pytest.raises(UserError, match="the limit is"):
        read_state_dict(tmp_path / "huge.pt")


def _dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that could run what a file holds."""
    modules = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "torch.hub"}
    calls = {"load", "loads", "Unpickler", "read_pickle"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module in modules or node.module == "torch"):
            for name in node.names:
                if name.name in calls | {"hub"}:
                    yield node.lineno, f"{node.module}.{name.name}"
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name in modules - {"pickle"})
        if isinstance(node, ast.Attribute) and node.attr == "hub" and ast.unparse(node) == "torch.hub":
            yield node.lineno, "torch.hub"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_danger = (
                name in {"eval", "exec", "builtins.eval", "builtins.exec"},
                name.rpartition(".")[0] in modules and name.rpartition(".")[2] in calls,
                name == "torch.load" and keywords.get("weights_only") != "True",
                name == "torch.jit.load",
                name in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False",
                name in {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"},
                name == "yaml.load" and "_Loader" not in keywords.get("Loader", ""),  # yaml_files.py's SafeLoader
            )
            if any(is_danger):
                yield node.lineno, name


def test_nothing_in_the_project_can_run_a_file():
    """Public weights are read here only; our own checkpoints by torch.load(weights_only=True), in one file."""
    skipped = {"tests", "build", "runs", "venv"}
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in skipped]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    trees = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in paths}
    assert Path("weights/load.py") in trees and len(trees) > 10
    found = [f"{path}:{line}: {what}" for path, tree in trees.items() for line, what in _dangers(tree)]
    loads = {
        str(path)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node) == "torch.load"
    }
    assert not found
    assert loads <= {"checkpoint.py"}


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "pickle.load(file)",
        "from pickle import loads",
        "class R(pickle.Unpickler): pass\nR = pickle.Unpickler(file)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.hub.load('a/b', 'c')",
        "torch.jit.load(path)",
        "eval(text)",
        "import dill",
    ],
)
def test_the_search_finds(code):
    assert list(_dangers(ast.parse(code)))
