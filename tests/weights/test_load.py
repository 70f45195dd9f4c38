"""Reading good files of every container bit-equal, renaming, and filling models strictly both ways."""

import hashlib
import io
import sys
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file as save_safetensors
from torch import nn

import models
from errors import UserError, run_script
from tests.reference.golden_models import relative_error
from tests.weights.hostile import fake_modules
from weights import load_public, read_state_dict
from weights.__main__ import describe, main

CHECKPOINT = "public_weights/yolov5n_helmet_vest.pt"


def assert_same(got: dict, expected: dict) -> None:
    """Names, order, dtypes, shapes and bits."""
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].is_contiguous()
        assert torch.equal(got[name], tensor.detach()), name


class Block(nn.Module):
    """A module with all that a state dict has to get right: order, None, unsaved buffers, views, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)  # bias: an entry that is None
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.nothing = None
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)])
        self.tied = self.branches[1]
        self.register_buffer("anchors", torch.arange(12.0).view(3, 4).t())  # not contiguous
        self.register_buffer("scratch", torch.ones(5), persistent=False)
        self.scale = nn.Parameter(torch.randn(()))
        self.fp16 = nn.Parameter(torch.randn(6).half()[::2])
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x):
        return self.bn(self.conv(x)) * self.scale


# good files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["top", "ema", "ema.module", "model", "state_dict", "model_state_dict"])
def test_plain_state_dicts(place, zipped, tmp_path):
    state = Block().state_dict()
    value = state
    for key in reversed(place.split(".")) if place != "top" else ():
        value = {"epoch": 3, key: value, "optimizer": {"state": {0: torch.ones(3)}}}
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    got, info = read_state_dict(tmp_path / "a.pt")
    assert_same(got, state)
    assert info.container == ("torch zip" if zipped else "legacy torch") and info.has_checksum == zipped
    assert info.uses_ema == place.startswith("ema")
    assert (place == "top") == (info.layout == "state dict")


@pytest.mark.parametrize(
    "place", ["ema.state_dict", "ema.model", "model_ema", "state_dict_ema", "ema_state_dict", "EMA", "ema_model.module"]
)
def test_the_running_mean_is_read_wherever_it_is(place, tmp_path):
    state = Block().state_dict()
    value = state
    for key in reversed(place.split(".")):
        value = {"updates": 3, key: value}
    others = {name: torch.zeros_like(value) for name, value in state.items()}
    settings = {"ema_decay": 0.999, "ema_settings": {"warmups": 3}, "schema": {"model": 1}}
    torch.save({"model": others, "state_dict": others, **settings, **value}, tmp_path / "a.pt")
    got, info = read_state_dict(tmp_path / "a.pt")
    assert_same(got, state)
    assert info.uses_ema and place in info.layout
    torch.save({"model": state, **settings, "ema": None}, tmp_path / "a.pt")
    got, info = read_state_dict(tmp_path / "a.pt")
    assert_same(got, state)
    assert not info.uses_ema


DECAY = {"decay": torch.ones(1)}


@pytest.mark.parametrize("other", [DECAY, {"model": DECAY}, Namespace(**DECAY)])
def test_what_has_no_name_of_the_weights_is_no_running_mean(other, tmp_path):
    """Training code keeps the settings and counters of its running mean under such keys, too."""
    state = Block().state_dict()
    for trained in (state, {f"module.{name}": value for name, value in state.items()}):
        torch.save({"ema_state": other, "model": trained}, tmp_path / "a.pt")
        got, info = read_state_dict(tmp_path / "a.pt")
        assert_same(got, state)
        assert not info.uses_ema
        torch.save({"ema_state": other, "model": trained, "the_ema": state}, tmp_path / "a.pt")
        assert read_state_dict(tmp_path / "a.pt")[1].uses_ema


@pytest.mark.parametrize("key", [None, "model_ema"])
def test_a_model_averaged_by_torch(key, tmp_path):
    block = Block()
    state = torch.optim.swa_utils.AveragedModel(block).state_dict()
    assert "n_averaged" in state
    trained = {name: torch.zeros_like(value) for name, value in block.state_dict().items()}
    torch.save(state if key is None else {"model": trained, key: state}, tmp_path / "a.pt")
    got, info = read_state_dict(tmp_path / "a.pt")
    assert_same(got, block.state_dict())
    assert info.uses_ema


def test_of_two_running_means_that_called_ema_is_read(tmp_path):
    """As in the published loaders."""
    state = Block().state_dict()
    others = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"a_ema": others, "ema": state, "model": others}, tmp_path / "a.pt")
    assert_same(read_state_dict(tmp_path / "a.pt")[0], state)


def test_an_average_of_nothing_is_refused(tmp_path):
    torch.save({"n_averaged": torch.tensor(3)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="it holds no tensors"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("key", ["names", "class_names", "classes", "CLASSES"])
@pytest.mark.parametrize(
    "value",
    [
        ["cat", "dog", "bird"],
        ("cat", "dog", "bird"),
        {2: "bird", 0: "cat", 1: "dog"},
        {"0": "cat", "1": "dog", "2": "bird"},
        {1: "cat", 2: "dog", 3: "bird"},
    ],
    ids=["list", "tuple", "dict", "dict of JSON", "ids from 1"],
)
def test_class_names(key, value, tmp_path):
    torch.save({"model": Block().state_dict(), key: value}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt")[1].names == ("cat", "dog", "bird")


@pytest.mark.parametrize("value", [3, [0, 1], {0: "cat", 2: "dog"}, {1: 2}, None, {(): "cat"}])
def test_what_is_no_list_of_class_names(value, tmp_path):
    torch.save({"model": Block().state_dict(), "classes": value}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt")[1].names == ()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_protocols(protocol, zipped, tmp_path):
    state = Block().state_dict()
    path = tmp_path / "a.pt"
    torch.save({"model": state}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path)[0], state)


@pytest.mark.parametrize("dtype", "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split())
def test_dtypes(dtype, tmp_path):
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype))
    state = {"many": values, "one": values[0, 1].clone(), "none": values[:0].clone()}
    for name, save in {
        "zip": torch.save,
        "legacy": lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=False),
        "safetensors": save_safetensors,
    }.items():
        save(state, tmp_path / name)
        got, info = read_state_dict(tmp_path / name)
        assert_same({k: got[k] for k in state}, state)
        assert info.dtypes == {dtype: 3} and info.num_tensors == 3 and info.num_parameters == 7


def pickled_checkpoint(module_name: str, class_name: str, make, zipped: bool = True) -> bytes:
    """torch.save of make(model), where the model's class lives in a module that does not exist before or after."""
    with fake_modules(module_name) as made:
        torch.manual_seed(0)
        cls = type(class_name, (Block,), {"__module__": module_name})
        setattr(made[module_name], class_name, cls)
        file = io.BytesIO()
        torch.save(make(cls), file, _use_new_zipfile_serialization=zipped)
    assert module_name not in sys.modules
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize(
    ("module_name", "class_name", "zipped"),
    [
        ("ultralytics.nn.tasks", "DetectionModel", True),
        ("ultralytics.yolo.v8.models", "DetectionModel", True),
        ("models.yolo", "DetectionModel", True),
        ("models.yolo", "Model", True),
        ("models.yolo", "Model", False),
    ],
)
@pytest.mark.parametrize("which", ["model", "ema", "ema before model", "bare"])
def test_pickled_modules(which, module_name, class_name, zipped, tmp_path):
    kept = {}

    def make(cls):
        model, other = cls().half(), cls()
        nn.init.ones_(other.conv.weight)
        model.names, model.yaml = {0: "helmet", 1: "vest", 2: "no"}, {"nc": 3, "anchors": [[1, 2], [3, 4]]}
        kept.update(model.state_dict())
        both = {"model": (None, other)[which == "ema before model"], "ema": model}
        checkpoint = {"epoch": -1, "date": "2023-01-01", "train_args": {"imgsz": 416, "lr0": 0.01, "data": None}}
        return (
            model
            if which == "bare"
            else {**checkpoint, **({"model": model, "ema": None} if which == "model" else both)}
        )

    (tmp_path / "a.pt").write_bytes(pickled_checkpoint(module_name, class_name, make, zipped))
    before = set(sys.modules)
    got, info = read_state_dict(tmp_path / "a.pt")
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in {"ultralytics", "models"}}
    assert "ultralytics" not in sys.modules
    assert_same(got, kept)
    assert "scratch" not in got and "conv.bias" not in got and "tied.weight" in got
    assert got["tied.weight"].data_ptr() != got["branches.1.weight"].data_ptr()
    assert info.names == ("helmet", "vest", "no") and f"{module_name}.{class_name}" in info.globals_seen
    assert info.layout.startswith(f"pickled module {module_name}.{class_name}")
    assert info.uses_ema == which.startswith("ema")
    if which != "bare":
        assert info.image_size == 416 and info.train_args == {"imgsz": 416, "lr0": 0.01, "data": None}


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_torchscript(how, tmp_path):
    class Masked(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn_mask = torch.full((2, 2), float("-inf"))  # an attribute: no entry of the state dict

    model = Masked().eval()
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.zeros(1, 3, 4, 4))
    torch.jit.save(made, tmp_path / "a.pt")
    got, info = read_state_dict(tmp_path / "a.pt")
    assert_same(got, made.state_dict())
    assert info.container == "TorchScript zip" and info.layout.startswith("TorchScript module")


def test_safetensors_with_metadata(tmp_path):
    state = {"b.weight": torch.randn(2, 3), "a.weight": torch.randn(4).bfloat16(), "empty": torch.zeros(0, 3)}
    save_safetensors(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    got, info = read_state_dict(tmp_path / "a.safetensors")
    assert_same({name: got[name] for name in state}, state)
    assert info.metadata == {"format": "pt"} and info.container == "safetensors"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "Transformer/block_0/kernel": rng.normal(size=(3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4, 2))),
        "big_endian": rng.normal(size=5).astype(">f4"),
        "half": rng.normal(size=5).astype(np.float16),
        "scalar": np.int64(7),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3), np.int8),
    }
    save(tmp_path / "a.npz", **arrays)
    got, info = read_state_dict(tmp_path / "a.npz")
    assert list(got) == list(arrays) and info.has_checksum
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name].numpy(), array)


def test_shared_storage_and_odd_views(tmp_path):
    base = torch.arange(24.0)
    state = {
        "all": base,
        "middle": base[5:9],
        "transposed": base.view(4, 6).t(),
        "strided": base[1::3],
        "overlapping": base.as_strided((5, 4), (2, 1)),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "expanded": base[:4].clone().as_strided((2, 2), (0, 1)),
        "empty": base[:0],
    }
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        got = read_state_dict(tmp_path / "a.pt")[0]
        assert_same(got, state)
        got["all"].zero_()
        assert torch.equal(got["middle"], base[5:9]), "tensors must not share memory"


def test_parallel_prefix_and_parameters(tmp_path):
    model = Block()
    state = OrderedDict((f"module.{name}", value) for name, value in model.state_dict(keep_vars=True).items())
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    got, info = read_state_dict(tmp_path / "a.pt")
    assert_same(got, model.state_dict())
    assert info.layout == "state dict under 'state_dict', parallel"


def test_mask_of_infinities(tmp_path):
    mask = torch.full((3, 3), float("-inf")).triu(1)
    torch.save({"transformer.attn_mask": mask}, tmp_path / "a.pt")
    assert torch.equal(read_state_dict(tmp_path / "a.pt")[0]["transformer.attn_mask"], mask)


def test_hash_in_the_name_and_given(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert not read_state_dict(tmp_path / "a.pth")[1].is_hash_checked
    assert read_state_dict(tmp_path / "a.pth", sha256=digest.upper())[1].is_hash_checked
    released = tmp_path / f"resnet18-{digest[:8]}.pth"
    released.write_bytes(data)
    assert read_state_dict(released)[1].is_hash_checked
    with pytest.raises(UserError, match=f"SHA-256 is {digest}, expected 00"):
        read_state_dict(released, sha256="00")
    dated = tmp_path / "best-20240131.pt"
    dated.write_bytes(data)
    assert not read_state_dict(dated)[1].is_hash_checked
    other = tmp_path / "resnet18-f37072fd.pth"
    other.write_bytes(data)
    with pytest.raises(UserError, match="promises SHA-256 f37072fd"):
        read_state_dict(other)


def test_zip_made_by_another_tool(tmp_path):
    """Entries in another order and under another root, as unpacking and packing again leaves them."""
    state = Block().state_dict()
    torch.save(state, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for entry in reversed(old.infolist()):
            new.writestr("model/" + entry.filename.partition("/")[2], old.read(entry))
    assert_same(read_state_dict(tmp_path / "b.pt")[0], state)


# a real file --------------------------------------------------------------------------------------------------------


def test_real_checkpoint_names_and_sums(shared_data, golden):
    arrays, meta = golden("weights_yolov5n_helmet_vest")
    state, info = read_state_dict(shared_data / CHECKPOINT)
    assert [[name, list(tensor.shape)] for name, tensor in state.items()] == meta["keys"]
    sums = [tensor.double().abs().sum().item() for tensor in state.values()]
    np.testing.assert_allclose(sums, arrays["checksum"], rtol=1e-12)
    assert info.names == tuple(meta["names"]) and info.family == "yolov5n" and not info.uses_ema
    assert info.dtypes == {"float16": 292, "int64": 57}


def test_real_checkpoint_forward(shared_data, golden):
    arrays, meta = golden("weights_yolov5n_helmet_vest")
    model = models.build("yolov5n", 2).eval()
    report = load_public(model, shared_data / CHECKPOINT)
    assert len(report.loaded) == len(model.state_dict()) == 349
    with Image.open(shared_data / "photos" / "darknet_person.jpg") as photo:
        crop = np.asarray(photo.convert("RGB"))[: meta["height"], : meta["width"]]
    images = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        output = model(images)
        boxes, scores = model.decode(output)
    expected = arrays["decoded"]  # (1, A, 5 + K): cx, cy, w, h, objectness, classes
    corners = np.concatenate(
        (expected[..., :2] - expected[..., 2:4] / 2, expected[..., :2] + expected[..., 2:4] / 2), axis=-1
    )
    assert relative_error(boxes, corners) < 1e-4
    assert relative_error(scores, expected[..., 4:5] * expected[..., 5:]) < 1e-4
    np.testing.assert_allclose(output.objectness_logits.sigmoid().numpy(), expected[..., 4], atol=1e-5)
    best = scores.flatten().topk(20).values  # 0.08: nobody on the photo wears either, yet far above the background
    np.testing.assert_allclose(best, np.sort((expected[..., 4:5] * expected[..., 5:]).ravel())[:-21:-1], rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax(-1).numpy(), expected[..., 5:].argmax(-1))


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weights", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code


def test_inspect(shared_data, monkeypatch, capsys):
    assert run_main(monkeypatch, "inspect", str(shared_data / CHECKPOINT), "--tensors", "2") == 0
    out = capsys.readouterr().out
    for word in (
        "yolov5n",
        "2: helmet, vest",
        "torch zip",
        "models.yolo.Model",
        "471189f8a510",
        "1,766,641",
        "float16",
    ):
        assert word in out
    assert out.splitlines()[-2:] == [
        "  model.0.conv.weight  (16, 3, 6, 6)  float16",
        "  model.0.bn.weight  (16,)  float16",
    ]


def test_inspect_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.pt").write_bytes(b"<html>404</html>")
    assert run_main(monkeypatch, "inspect", str(tmp_path / "a.pt")) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "web page" in captured.err


def test_describe_hides_escapes(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "names": ["\x1b[2Jcat", "dog"]}, tmp_path / "a.pt")
    text = describe(tmp_path / "a.pt")
    assert "\x1b" not in text and "dog" in text and "not recognised" in text


def test_describe_names_the_architecture_of_our_checkpoints(tmp_path):
    torch.save({"format": 1, "arch": "yolov8n", "names": ["a"], "ema": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    assert "family     yolov8n, a checkpoint of train.py" in describe(tmp_path / "a.pt")
    torch.save({"format": 1, "arch": "\x1b[2J", "ema": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    assert "family     not recognised" in describe(tmp_path / "a.pt")


def test_fake_modules_leave_nothing():
    with fake_modules("ultralytics.nn.tasks"):
        assert isinstance(sys.modules["ultralytics.nn"], types.ModuleType)
    assert not [name for name in sys.modules if name.startswith("ultralytics")]
    assert sys.modules["models"] is models
