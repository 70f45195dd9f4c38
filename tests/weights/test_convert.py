"""`python -m weights convert`: bit-equal tensors of every released layout, and files that every command takes."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import fine_tuning
import models
from errors import UserError
from tests.conftest import GOLDEN
from weights import arch_of_family, guess_family, read_state_dict
from weights.__main__ import main
from weights.shared_file import to_bytes, to_half


def keys_of(name: str) -> list:
    """[name, shape, dtype] of each entry of a released model, as recorded."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return json.loads(bytes(file["meta"])).get("keys", []) if "meta" in file else []


SAME_NAMES = re.compile(r"yolo.*[smlx]u?|clip_vit_b16|dinov2_vitb14|resnet34|rtdetr-l")  # other sizes of a layout
LAYOUTS = {path.stem: keys for path in sorted(GOLDEN.glob("*.npz")) if (keys := keys_of(path.stem))}


def assert_same(got: dict, expected: dict) -> None:
    """Names, order, dtypes, shapes and bits."""
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


def random_state(keys: list) -> dict:
    """The released names, order and dtypes; shapes are cut to 3 in each dimension, so that a large model is quick."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape, *dtype in keys:
        values = torch.randn([min(length, 3) for length in shape], generator=generator) * 100
        state[name] = values.to(getattr(torch, dtype[0].removeprefix("torch.")) if dtype else torch.float32)
    return state


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not SAME_NAMES.fullmatch(name)])
def test_every_released_layout_stays_bit_equal(name, tmp_path):
    state = random_state(LAYOUTS[name])
    torch.save(state, tmp_path / "a.pt")
    main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")])
    got, info = read_state_dict(tmp_path / "a.safetensors")
    assert_same(got, state)
    assert info.has_checksum and not info.ours
    by_others = load_file(tmp_path / "a.safetensors")
    assert_same({key: by_others[key] for key in state}, state)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_architecture_is_found_by_itself(name):
    """A shape decides, never the file's name. The two MobileNet detectors differ in nothing that a file holds."""
    found = arch_of_family(guess_family({key: tuple(shape) for key, shape, *_ in LAYOUTS[name]}))
    renamed = {
        "rtdetr-l": "rtdetr_l",
        "rtdetr-x": "rtdetr_x",
        "fasterrcnn_resnet50_fpn": "fasterrcnn_resnet50",
        "fasterrcnn_resnet50_fpn_v2": "fasterrcnn_resnet50_v2",
        "weights_yolov5n_helmet_vest": "yolov5n",
        "yolov7-tiny": "yolov7_tiny",
    }
    is_open = "mobilenet_v3_large_" in name or "_tiny_" in name
    assert found == (None if is_open else renamed.get(name, name))
    if found and not found.startswith(("resnet", "mobilenet")):
        assert found in models.ARCHITECTURES or found in models.TEACHERS


def test_a_pickled_module(shared_data, tmp_path):
    source = shared_data / "public_weights/yolov5n_helmet_vest.pt"
    main(["convert", str(source), str(tmp_path / "a.safetensors")])
    (expected, told), (got, info) = read_state_dict(source), read_state_dict(tmp_path / "a.safetensors")
    assert_same(got, expected)
    assert (info.names, info.image_size, info.arch) == (told.names, told.image_size, "yolov5n") and info.names
    described = checkpoint.load_model(tmp_path / "a.safetensors")[1]
    assert (described.arch, described.names, described.image_size) == ("yolov5n", told.names, told.image_size or 640)


# our own checkpoints -------------------------------------------------------------------------------------------------

CONFIG = {
    "data": {"format": "yolo", "root": "set", "classes": ["b", "a"]},
    "evaluation": {"protocol": "voc07", "iou_threshold": 0.55},
}


def write_run(folder, arch: str = "yolov8_narrow") -> dict:
    """runs/one with a checkpoint whose trained weights differ from the averaged ones; returns the averaged ones."""
    torch.manual_seed(0)
    ema, trained = models.build(arch, 2).state_dict(), models.build(arch, 2).state_dict()
    state = {"arch": arch, "names": ["b", "a"], "image_size": 96, "config": CONFIG, "versions": {"torch": "2.11"}}
    extra = {"epoch": 3, "step": 90, "ema": ema, "model": trained, "optimizer": {"state": {0: torch.ones(3)}}}
    checkpoint.save(folder / "weights" / "last.pt", state | extra)
    return ema


@pytest.mark.parametrize("given", ["", "weights/last.pt"])
def test_a_run_of_ours(given, tmp_path):
    ema = write_run(tmp_path / "one")
    main(["convert", str(tmp_path / "one" / given), str(tmp_path / "a.safetensors")])
    got, info = read_state_dict(tmp_path / "a.safetensors")
    assert_same(got, ema)
    assert info.uses_ema and info.ours["versions"]["torch"] == "2.11"
    (_, expected), (model, found) = (
        checkpoint.load_model(path) for path in (tmp_path / "one/weights/last.pt", tmp_path / "a.safetensors")
    )
    assert found == expected and found.classes == ("b", "a") and found.evaluation.protocol == "voc07"
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())
    again = tmp_path / "b.safetensors"
    main(["convert", str(tmp_path / "a.safetensors"), str(again)])
    assert_same(read_state_dict(again)[0], ema)
    assert checkpoint.load_model(again)[1] == expected
    student = fine_tuning.start_model("yolov8_narrow", ("a",), again, say=lambda line: None)
    assert torch.equal(student.head.cls[0][2].weight[0], ema["head.cls.0.2.weight"][1])


def test_half(tmp_path):
    """The file that the demo ships: at most 2 MB, its boxes and scores nearly the same."""
    ema = write_run(tmp_path / "one")
    main(["convert", str(tmp_path / "one"), str(tmp_path / "a.safetensors"), "--half"])
    assert (tmp_path / "a.safetensors").stat().st_size <= 2_000_000
    for name, value in read_state_dict(tmp_path / "a.safetensors")[0].items():
        kept = not value.is_floating_point() or name.endswith(("running_mean", "running_var"))
        assert torch.equal(value, ema[name] if kept else ema[name].half()), name
    whole, half = (checkpoint.load_model(tmp_path / p)[0] for p in ("one/weights/last.pt", "a.safetensors"))
    images = torch.rand(1, 3, 96, 96)
    (boxes, scores), (half_boxes, half_scores) = (model.decode(model(images)) for model in (whole, half))
    assert (boxes - half_boxes).abs().max() < 0.5 and (scores - half_scores).abs().max() < 1e-3
    assert not torch.equal(scores, half_scores)


def test_half_refuses_what_it_cannot_hold(tmp_path):
    mask = torch.full((2, 2), -torch.inf)
    assert to_half({"attn_mask": mask}, "x")["attn_mask"].tolist() == mask.tolist()
    torch.save({"a.weight": torch.tensor([1.0, 7e4])}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.weight has 70000, float16 ends at 65504"):
        main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"), "--half"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_run_is_inspected(tmp_path, capsys):
    write_run(tmp_path / "one")
    main(["inspect", str(tmp_path / "one")])
    assert "family     yolov8_narrow, a checkpoint of train.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "options", "reason"),
    [
        ("a.pt", (), r"expected a name that ends in \.safetensors"),
        ("a-0a1b2c3d.safetensors", (), "its name would promise the SHA-256 0a1b2c3d"),
        ("none/a.safetensors", (), "no such folder"),
        ("a.safetensors", ("--arch", "yolov8s"), "holds yolov8_narrow, expected yolov8s"),
        (None, (), "expected FILE and OUT.safetensors"),
    ],
)
def test_refused(output, options, reason, tmp_path):
    write_run(tmp_path / "one")
    outputs = [] if output is None else [str(tmp_path / output)]
    with pytest.raises(UserError, match=reason):
        main(["convert", str(tmp_path / "one"), *outputs, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_released_file_of_another_architecture_is_refused(tmp_path):
    tensors = {key: torch.zeros(shape) for key, shape, *_ in LAYOUTS["yolov5n"]}
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds yolov5n, expected yolov8s"):
        main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"), "--arch", "yolov8s"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_an_open_architecture_is_given(tmp_path, capsys):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    for options, arch in (((), None), (("--arch", "fasterrcnn_mobilenet_v3_large_320"),) * 2):
        main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"), *options])
        assert read_state_dict(tmp_path / "a.safetensors")[1].arch == (arch and options[1])
    assert "architecture not known" in capsys.readouterr().out


# damaged files ------------------------------------------------------------------------------------------------------


def shared_bytes(**changes) -> bytes:
    description = {"tensor_names": "ours", "arch": "yolov8n", "names": ["a"], "image_size": 64, "config": {}}
    return to_bytes({"w": torch.arange(3.0), "n": torch.tensor(1)}, description | changes)


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    whole, path = shared_bytes(), tmp_path / "a.safetensors"
    path.write_bytes(whole)
    state, info = read_state_dict(path)
    for byte in range(0, len(whole), 3):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ (1 << byte % 8)]) + whole[byte + 1 :])
        try:
            got, found = read_state_dict(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)
        assert not found.ours or found.ours == info.ours


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensor_names": "theirs"}, "'tensor_names' or 'names'"),
        ({"names": [1]}, "'tensor_names' or 'names'"),
        ({"names": {"0": "a"}}, "'names' is .* expected list"),
        ({"names": None}, "'names' is missing"),
        ({"image_size": True}, "'image_size' is 'true', expected int"),
        ({"config": []}, "'config' is .* expected dict"),
        ({"names": ["a" * (1 << 20)]}, "characters of 'names'; the limit is"),
    ],
)
def test_a_description_with_a_right_checksum_and_wrong_values(changes, reason, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(shared_bytes(**changes))
    with pytest.raises(UserError, match=reason):
        read_state_dict(tmp_path / "a.safetensors")
