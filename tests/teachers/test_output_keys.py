"""The keys of kept outputs: the pixels of an image, and a fingerprint of all that shapes the outputs of a teacher."""

from pathlib import Path

import torch
from torch import nn

from teachers import output_cache
from teachers.output_cache import fingerprint_of, image_key


def test_image_keys():
    image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = image.clone()
    changed[2, 3, 5] ^= 1
    others = [changed, image.view(3, 6, 4), image.int(), image[:, :, :5], image.flip(0)]
    assert len({image_key(other) for other in [image, *others]}) == 6
    assert image_key(image) == image_key(image.clone(memory_format=torch.contiguous_format))
    assert image_key(image) == image_key(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))  # strides are nothing
    assert image_key(torch.zeros(3, 0, 0)) != image_key(torch.zeros(3, 0, 1))


def test_fingerprints():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    same = fingerprint_of(model, image_size=28)
    assert same == fingerprint_of(model, image_size=28)
    found = {same, fingerprint_of(model), fingerprint_of(model, image_size=42)}
    found.add(fingerprint_of(model, image_size=28, names=["a"]))
    found.add(fingerprint_of(nn.ModuleList(model), image_size=28))
    model.requested_outputs = frozenset({"patches"})
    assert fingerprint_of(model, image_size=28) == same  # parts have entries of their own
    model.requested_outputs = None
    assert fingerprint_of(model, image_size=28) == same
    model.register_buffer("prompts", torch.zeros(1), persistent=False)
    found.add(fingerprint_of(model, image_size=28))
    model[1].running_mean[0] += 1
    found.add(fingerprint_of(model, image_size=28))
    model[0].bias.data = torch.nextafter(model[0].bias.data, torch.tensor(9.0))
    found.add(fingerprint_of(model, image_size=28))
    assert len(found) == 8


def test_a_fingerprint_names_what_no_weight_shows(monkeypatch):
    """Equal weights, other outputs: an epsilon, a number of proposals, other layers, another forward."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    found = {fingerprint_of(model)}
    model[1].eps = 0.1
    found.add(fingerprint_of(model))
    model.selection = {"proposals": 150}
    found.add(fingerprint_of(model))
    model[2] = nn.SiLU()
    found.add(fingerprint_of(model))
    model.seen = ["a list that it fills"]
    found.add(fingerprint_of(model))
    assert len(found) == 4
    monkeypatch.setattr(output_cache, "code_version", lambda: "of another commit")
    assert fingerprint_of(model) not in found


def test_the_version_of_the_code(tmp_path, monkeypatch):
    root = Path(output_cache.__file__).parent.parent
    for name in ("boxes.py", "yolo/yolov8.py", "layers/fusion.py", "datasets/letterbox.py", "teachers/output_cache.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    monkeypatch.setattr(output_cache, "__file__", str(tmp_path / "teachers" / "output_cache.py"))
    version = output_cache.code_version.__wrapped__
    found = [version(), version()]
    for name in ("boxes.py", "yolo/yolov8.py", "datasets/letterbox.py"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"#")
        found.append(version())
    (tmp_path / "notes.py").write_bytes(b"")
    assert found[0] == found[1] and version() == found[-1] and len(set(found)) == 4
