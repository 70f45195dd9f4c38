"""checkpoint.py: atomic on a full disk and under SIGKILL, and nothing damaged is ever read as if it were whole."""

import errno
import os
import re
import resource
import signal

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import models
from errors import UserError


def small_state(value: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(int(value))
    return {
        "arch": "yolov8n",
        "names": ["a", "b"],
        "image_size": 64,
        "step": int(value),
        "ema": {"w": torch.randn(40, 50, generator=generator), "n": torch.tensor(3)},
        "nested": [1, 2.5, None, {"x": "y"}],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_round_trip_and_plain_torch_load(tmp_path):
    path = tmp_path / "weights" / "last.pt"
    checkpoint.save(path, small_state())
    assert same(checkpoint.load(path), {"format": 1, **small_state()})
    assert same(torch.load(path, weights_only=True), {"format": 1, **small_state()})
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_keeps_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, small_state(step), keep_previous=True)
    assert checkpoint.load(path)["step"] == 3
    assert checkpoint.load(tmp_path / "last.prev.pt")["step"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_no_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "last.pt"
    for step in (1, 2):
        checkpoint.save(path, small_state(step), keep_previous=True)
    assert checkpoint.load(path)["step"] == 2 and checkpoint.load(checkpoint.previous_path(path))["step"] == 1


@pytest.mark.parametrize("fraction", np.linspace(0, 0.999, 20).tolist())
def test_full_disk_at_any_byte(tmp_path, fraction):
    """The file size limit makes the write fail after some bytes, as a full disk does."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, small_state(1))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * fraction), hard))
    try:
        with pytest.raises(UserError) as error:
            checkpoint.save(path, small_state(2), keep_previous=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.exit_code == 5 and str(path) in str(error.value) and "untouched" in str(error.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    checkpoint.save(path, small_state(2), keep_previous=True)  # after space is freed
    assert checkpoint.load(path)["step"] == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_errors_elsewhere(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small_state(1))
    before = path.read_bytes()

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(UserError, match="No space left") as error:
            checkpoint.save(path, small_state(2))
    assert error.value.exit_code == 5 and path.read_bytes() == before


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "weights").touch()
    with pytest.raises(UserError, match="could not be written") as error:
        checkpoint.save(tmp_path / "weights" / "last.pt", small_state())
    assert error.value.exit_code == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError) as error:
        checkpoint.save(tmp_path / "last.pt", small_state())
    assert error.value.exit_code == 5


def test_killed_at_every_system_call_of_a_save(tmp_path):
    """A child is killed before its n-th call, for every n: the newest readable checkpoint is the old or the new one."""
    path = tmp_path / "last.pt"
    for step in (1, 2):
        checkpoint.save(path, small_state(step), keep_previous=True)
    survived, kills = False, 0
    while not survived:
        child = os.fork()
        if child == 0:
            _die_before_call(kills)
            checkpoint.save(path, small_state(3), keep_previous=True)
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        kills += not survived
        said = []
        step = checkpoint.load_newest(path, said.append)["step"]
        assert step in (2, 3) and not said and checkpoint.load(checkpoint.previous_path(path))["step"] in (1, 2, 3)
        for number in (1, 2):
            checkpoint.save(path, small_state(number), keep_previous=True)
    assert kills >= 6


def _die_before_call(number: int) -> None:
    calls = [0]
    for name in ("fsync", "link", "replace", "open"):
        original = getattr(os, name)

        def counted(*args, _original=original, **kwargs):
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return _original(*args, **kwargs)

        setattr(os, name, counted)


def test_bit_flips_are_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small_state())
    good, whole = path.read_bytes(), checkpoint.load(path)
    rng = np.random.default_rng(0)
    refused = 0
    for offset in rng.integers(0, len(good), 300).tolist():
        damaged = bytearray(good)
        damaged[offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.load(path), whole), f"byte {offset}: read as something else"
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 200  # the rest hit padding and dates


def test_records_that_point_past_the_end_are_noticed(tmp_path):
    """zipfile then raises an EOFError without a text, or an error of zlib."""
    path = tmp_path / "a.pt"
    for number in range(2):
        checkpoint.save(path, {"a": torch.arange(10.0), "x": list(range(50)), "n": number}, keep_previous=True)
    whole = path.read_bytes()
    places = [match.start() + 28 for match in re.finditer(b"PK\x03\x04", whole)]  # the length of the extra field
    methods = [match.start() + 10 for match in re.finditer(b"PK\x01\x02", whole)]  # of compression
    assert len(places) >= 4 and len(methods) >= 4
    for place, value in [(place, b"\xff\xff") for place in places] + [(place, b"\x08\x00") for place in methods]:
        path.write_bytes(whole[:place] + value + whole[place + 2 :])
        for read in (checkpoint.check_whole, checkpoint.load):
            with pytest.raises(UserError, match=r"a\.pt: damaged") as caught:
                read(path)
            assert "\n" not in str(caught.value)
        assert checkpoint.load_newest(path, say=lambda line: None)["n"] == 0


def test_truncations_are_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small_state())
    good = path.read_bytes()
    for length in np.linspace(0, len(good) - 1, 60).astype(int).tolist():
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"last\.pt"):
            checkpoint.load(path)


def test_falls_back_with_a_line(tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        checkpoint.save(path, small_state(step), keep_previous=True)
    path.write_bytes(path.read_bytes()[:-100])
    said = []
    assert checkpoint.load_newest(path, said.append)["step"] == 1
    assert len(said) == 1 and "last.prev.pt (step 1)" in said[0]
    checkpoint.previous_path(path).unlink()
    with pytest.raises(UserError):
        checkpoint.load_newest(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled module: its class would have to be imported
    with pytest.raises(UserError, match="more than tensors"):
        checkpoint.load(path)
    torch.save({"model": {"w": torch.ones(2)}}, path)
    with pytest.raises(UserError, match="no key 'format'"):
        checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="found checkpoint format 99, this code reads 1"):
        checkpoint.load(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    torch.manual_seed(0)
    model = models.build("yolov8n", 2)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    state = {"arch": "yolov8n", "names": ["no", "1e3"], "image_size": 64, "epoch": 3, "step": 30}
    checkpoint.save(path, state | {"ema": model.state_dict(), "model": {"other": torch.ones(1)}})
    return path, model


def test_load_model(shipped):
    path, model = shipped
    loaded, info = checkpoint.load_model(path)
    assert info == checkpoint.CheckpointInfo("yolov8n", ("no", "1e3"), 64, 3, 30)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match="holds yolov8n, expected yolov8s"):
        checkpoint.load_model(path, "yolov8s")
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load_model(path.with_name("absent.pt"))


def test_what_a_checkpoint_of_ours_lacks_is_named(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"arch": "yolov8n", "names": ["a"], "ema": {}})
    with pytest.raises(UserError, match=r"a\.pt: no key 'image_size', expected a checkpoint with arch, names"):
        checkpoint.load_model(path)
    checkpoint.save(path, {"arch": "yolo9t", "names": ["a"], "image_size": 64, "ema": {}})
    with pytest.raises(UserError, match=r"a\.pt: found weights of 'yolo9t', expected one of yolov8n"):
        checkpoint.load_model(path)
    checkpoint.save(path, small_state() | {"format": 2})
    with pytest.raises(UserError, match=r"a\.pt: found checkpoint format 2, this code reads 1$"):
        checkpoint.load_model(path)


def test_an_older_name_of_an_architecture_is_read(tmp_path):
    model = models.build("yolov8_narrow", 2)
    state = dict(arch="yolov8p", names=["a", "b"], image_size=64, ema=model.state_dict())
    checkpoint.save(tmp_path / "old.pt", state)
    found, info = checkpoint.load_model(tmp_path / "old.pt", "yolov8_narrow")
    assert info.arch == "yolov8_narrow" and all(
        torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters())
    )


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n", "yolov5nu", "yolov7_tiny"])
def test_class_count_of_a_public_state(arch):
    model = models.build(arch, 7)
    state = {_public_name(name, model.public_names): tensor for name, tensor in model.state_dict().items()}
    state |= {f"{public}x": torch.zeros(1) for public, ours in model.public_names if ours is None}
    assert checkpoint.count_and_rename(state, arch, "x.pt")[0] == 7


def _public_name(name: str, table) -> str:
    """The released name of one of ours: the table read backwards."""
    import re

    for public, ours in table:
        if ours is None:
            continue
        match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return public.format(*match.groups()) + name[match.end() :]
    raise KeyError(name)


def test_public_checkpoint(shared_data):
    files = sorted((shared_data / "public_weights").glob("*.pt"))
    if not files:
        pytest.skip("no public checkpoint among the small real data")
    model, info = checkpoint.load_model(files[0], "yolov5n")
    assert info.source == "public" and model.num_classes == len(info.names)


@pytest.mark.parametrize("first", ["__background__", "background"])
def test_a_background_among_the_names_of_a_public_file_is_no_class(first, tmp_path):
    model = models.build("yolov8_narrow", 2)
    state = {_public_name(name, model.public_names): tensor for name, tensor in model.state_dict().items()}
    state |= {f"{public}x": torch.zeros(1) for public, ours in model.public_names if ours is None}
    for names, found in (((first, "a", "b"), ("a", "b")), ((first, "a"), (first, "a"))):
        torch.save({"model": state, "classes": names}, tmp_path / "public.pt")
        assert checkpoint.load_model(tmp_path / "public.pt", "yolov8_narrow")[1].names == found
    torch.save({"model": state, "classes": ("c", "a", "b")}, tmp_path / "public.pt")
    with pytest.raises(UserError, match="it names 3 classes, and its class head has 2"):
        checkpoint.load_model(tmp_path / "public.pt", "yolov8_narrow")


def test_a_public_file_without_arch_and_with_another_one(tmp_path):
    """The message names the file and the argument that is missing or wrong."""
    model = models.build("yolov8n", 2)
    state = {_public_name(name, model.public_names): tensor for name, tensor in model.state_dict().items()}
    state |= {f"{public}x": torch.zeros(1) for public, ours in model.public_names if ours is None}
    path = tmp_path / "released.pt"
    torch.save(state, path)
    for arch in (None, "yolov8n"):  # its names and shapes tell
        assert checkpoint.load_model(path, arch)[1].arch == "yolov8n"
    with pytest.raises(UserError, match=r"released\.pt: .*these are yolov8n weights, the model is yolov8s"):
        checkpoint.load_model(path, "yolov8s")
    shapes = {"roi_heads.box_predictor.cls_score.weight": (3, 4), "backbone.body.0.0.weight": (16, 3, 3, 3)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=r"released\.pt: not a checkpoint of ours: .*mobilenet.*which need --arch"):
        checkpoint.load_model(path)
    torch.save({"conv1.weight": torch.zeros(2), "layer4.1.conv2.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"of resnet18, which are not those of a detector"):
        checkpoint.load_model(path)
    torch.save({"something": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"released\.pt: not a checkpoint of ours: no key 'format'$"):
        checkpoint.load_model(path)


def test_the_folder_of_a_run_stands_for_its_last_weights(tmp_path):
    model = models.build("yolov8_narrow", 2)
    state = {"arch": "yolov8_narrow", "names": ["a", "b"], "image_size": 64, "ema": model.state_dict()}
    checkpoint.save(tmp_path / "run" / "weights" / "last.pt", state)
    found, info = checkpoint.load_model(tmp_path / "run")
    assert info.names == ("a", "b") and torch.equal(found.head.cls[0][2].bias, model.head.cls[0][2].bias)
    with pytest.raises(UserError, match=f"{tmp_path}: a folder, expected a weights file"):
        checkpoint.load_model(tmp_path)


def test_a_deeper_model_is_built_by_the_names_of_its_entries():
    """One more block in the first stage: the architecture alone would not fit."""
    depths = models.size_of("yolov8_narrow").all_depths
    deeper = models.build("yolov8_narrow", 2, depths=(depths[0] + 1, *depths[1:])).state_dict()
    assert checkpoint.build_for("yolov8_narrow", 2, deeper).state_dict().keys() == deeper.keys()
