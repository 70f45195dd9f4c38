"""The cache of teacher outputs: what comes back, what is removed, and what happens to files that are not whole."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from teachers.dinov2 import DINOv2, DINOv2Output
from teachers.output_cache import (
    RECOUNT,
    STALE_SECONDS,
    OutputCache,
    cached_forward,
    fingerprint_of,
    image_key,
    join_output,
    parts_of,
    split_output,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Output:
    features: dict[str, Tensor]
    logits: Tensor
    proposals: list[Tensor]
    extra: Tensor | None
    image_size: tuple[int, int]
    level: int


def make_output(batch: int = 3, seed: int = 0) -> Output:
    generator = torch.Generator().manual_seed(seed)
    return Output(
        features={"p3": torch.randn(batch, 4, 6, 5, generator=generator), "p4": torch.randn(batch, 2, 3, 2)},
        logits=torch.randn(batch, 7, generator=generator).double(),
        proposals=[torch.rand(n, 4, generator=generator) for n in range(batch)],
        extra=None,
        image_size=(48, 40),
        level=2,
    )


def files(cache: OutputCache) -> list:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def a_tensor(num_bytes: int) -> dict[str, Tensor]:
    return {"x": torch.zeros(num_bytes, dtype=torch.uint8)}


# outputs and rows ---------------------------------------------------------------------------------------------------


def test_splitting_and_joining_are_inverse():
    output = make_output()
    rows = split_output(output)
    assert len(rows) == 3
    assert set(rows[0]) == {"features/p3", "features/p4", "features=", "logits", "proposals[]", "image_size=", "level="}
    back = join_output(Output, rows)
    assert back.image_size == (48, 40) and back.level == 2 and back.extra is None
    assert list(back.features) == ["p3", "p4"]
    assert all(torch.equal(back.features[name], output.features[name]) for name in output.features)
    assert torch.equal(back.logits, output.logits) and back.logits.dtype == torch.float64
    assert [len(boxes) for boxes in back.proposals] == [0, 1, 2]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(back.proposals, output.proposals))


def test_the_parts_of_a_row_hold_all_of_it():
    row = split_output(make_output())[1]
    parts = parts_of(row)
    assert set(parts) == {"features/p3", "features/p4", "logits", "proposals[]", "="}
    assert set(parts["="]) == {"features=", "image_size=", "level="} and list(parts["logits"]) == ["logits"]


def test_any_batch_can_be_put_together():
    rows = split_output(make_output(3)) + split_output(make_output(2, seed=1))
    joined = join_output(Output, [rows[4], rows[0]])
    assert torch.equal(joined.logits[0], make_output(2, seed=1).logits[1])
    assert torch.equal(joined.features["p3"][1], make_output(3).features["p3"][0])


def test_a_dict_without_entries_is_no_missing_dict():
    @dataclass(frozen=True)
    class Bare:
        features: dict[str, Tensor] | None
        token: Tensor

    assert join_output(Bare, split_output(Bare({}, torch.ones(2, 3)))).features == {}
    assert join_output(Bare, split_output(Bare(None, torch.ones(2, 3)))).features is None


def test_gradients_stay_behind():
    @dataclass(frozen=True)
    class Bare:
        token: Tensor

    assert not split_output(Bare(torch.ones(2, 3, requires_grad=True)))[0]["token"].requires_grad


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logits": torch.ones(2, 7)}, "not batched along dim 0.*'logits': 2"),
        ({"logits": torch.ones(())}, "not batched along dim 0.*'logits': None"),
        ({"proposals": [torch.ones(1, 4)]}, "not batched along dim 0"),
        ({"extra": "text"}, "Output.extra is a str"),
        ({"extra": [1, 2]}, "Output.extra is a list"),
        ({"features": {"p3": None}}, "Output.features is a dict"),
    ],
)
def test_what_cannot_be_split(changes, reason):
    output = make_output()
    with pytest.raises(TypeError, match=reason):
        split_output(Output(**{**vars(output), **changes}))


def test_what_does_not_join():
    rows = split_output(make_output())
    for change, reason in [
        ({"level=": torch.tensor(3)}, "level differs"),
        ({"features/p3": torch.ones(4, 6, 6)}, r"features/p3 has different shapes: \[\(4, 6, 5\), \(4, 6, 6\)\]"),
        ({"more": torch.ones(1)}, "different tensors"),
    ]:
        with pytest.raises(ValueError, match=reason):
            join_output(Output, [rows[0], rows[1] | change])
    with pytest.raises(ValueError, match="0 images"):
        join_output(Output, [])


# entries ------------------------------------------------------------------------------------------------------------


def test_what_was_put_comes_back_rounded_to_float16(tmp_path):
    cache = OutputCache(tmp_path, 1.0, "a")
    tensors = {
        "map": torch.randn(4, 6, 5),
        "turned": torch.randn(5, 3).T,
        "double": torch.randn(3).double(),
        "short": torch.randn(3).bfloat16(),
        "labels": torch.tensor([2**40, -1]),
        "mask": torch.tensor([True, False]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(0.1),
    }
    put = cache.put("k", tensors)
    got = cache.get("k")
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], expected), name
        assert torch.equal(put[name], got[name]), name
    got["map"].add_(1)  # memory of its own
    assert torch.equal(cache.get("k")["map"], put["map"])
    assert (cache.counts.written, cache.counts.found) == (1, 2)


def test_large_numbers_keep_float32(tmp_path):
    cache = OutputCache(tmp_path, 1.0, "a")
    large = torch.tensor([70000.123, 0.1])
    assert torch.equal(cache.put("k", {"x": large})["x"], large)
    with_infinity = cache.put("k", {"x": torch.tensor([float("inf"), float("-inf"), 65504.0, 0.1])})["x"]
    assert torch.equal(with_infinity, torch.tensor([float("inf"), float("-inf"), 65504.0, 0.1]).half().float())
    assert torch.equal(cache.get("k")["x"], with_infinity)  # the later one replaced the earlier


def test_boxes_keep_float32(tmp_path):
    """float16 has only every half pixel beyond 512, and every pixel beyond 1024."""
    boxes = torch.tensor([[513.3, 0.123, 1279.7, 700.26]])
    put = OutputCache(tmp_path, 1.0, "a").put("k", {"boxes_xyxy": boxes, "boxes_xyxy[]": boxes, "regions/xyxy": boxes})
    assert all(torch.equal(kept, boxes) for kept in put.values())


def test_half_the_bytes(tmp_path):
    cache = OutputCache(tmp_path, 1.0, "a")
    cache.put("k", {"x": torch.randn(1000)})
    assert 2000 < files(cache)[0].stat().st_size < 2300


def test_entries_belong_to_a_key_and_a_fingerprint(tmp_path):
    cache, other = OutputCache(tmp_path, 1.0, "a"), OutputCache(tmp_path, 1.0, "b")
    cache.put("k", {"x": torch.ones(1)})
    assert other.get("k") is None and cache.get("l") is None and other.counts.absent == 1
    other.put("k", {"x": torch.zeros(1)})
    assert cache.get("k")["x"] == 1 and other.get("k")["x"] == 0
    assert OutputCache(tmp_path, 1.0, "a").get("k")["x"] == 1  # in a later run
    assert OutputCache(tmp_path, 1.0, "a\nk").get("") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"X" + data[1:],
        lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:-3] + bytes([data[-3] ^ 128]) + data[-2:],
        lambda data: bytes(len(data)),
        lambda data: b"PK\x03\x04" + data,
    ],
)
def test_damaged_entries_are_counted_and_recomputed(tmp_path, damage):
    cache = OutputCache(tmp_path, 1.0, "a")
    put = cache.put("k", {"x": torch.randn(10)})
    path = files(cache)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("k") is None
    assert cache.counts.damaged == 1 and not path.exists()
    assert cache.get("k") is None and cache.counts.damaged == 1 and cache.counts.absent == 1
    cache.put("k", put)
    assert torch.equal(cache.get("k")["x"], put["x"])


def test_every_flipped_byte_is_noticed(tmp_path):
    cache = OutputCache(tmp_path, 1.0, "a")
    cache.put("k", {"x": torch.randn(5)})
    path = files(cache)[0]
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        assert cache.get("k") is None, i
    assert cache.counts.damaged == len(whole)


def test_an_entry_under_another_name_is_not_taken(tmp_path):
    cache = OutputCache(tmp_path, 1.0, "a")
    cache.put("k", {"x": torch.ones(1)})
    cache.put("l", {"x": torch.zeros(1)})
    one, two = files(cache)
    two.write_bytes(one.read_bytes())
    assert [cache.get(key) is None for key in "kl"].count(True) == 1 and cache.counts.damaged == 1


# space --------------------------------------------------------------------------------------------------------------


def test_what_nobody_used_for_a_day_makes_room_and_nothing_else(tmp_path):
    cache = OutputCache(tmp_path, 10_000e-9, "a")
    for key in "abcd":
        cache.put(key, a_tensor(2000))
    old = time.time() - STALE_SECONDS - 60
    for key in "ab":
        os.utime(cache._path(key)[0], (old, old))
    assert cache.get("a") is not None  # used again
    cache.put("e", a_tensor(2000))
    assert [key for key in "abcde" if cache.get(key) is not None] == ["a", "c", "d", "e"]
    assert cache.counts.removed == 1
    cache.put("f", a_tensor(2000))
    assert cache.get("f") is None and cache.counts.removed == 1 and cache.counts.not_written == 1
    assert sum(path.stat().st_size for path in files(cache)) <= 10_000


def test_a_full_cache_keeps_what_comes_first(tmp_path):
    """Each run reads the views in the same order: with half the room, it finds half of them, not none."""
    for run in range(3):
        cache = OutputCache(tmp_path, 20_000e-9, "a")
        for i in range(20):
            if cache.get(f"{i}") is None:
                cache.put(f"{i}", a_tensor(1800))
            assert sum(path.stat().st_size for path in files(cache)) <= 20_000
        assert cache.counts.found == (10 if run else 0) and cache.counts.not_written == 10


def test_the_cap_is_that_of_all_processes(tmp_path):
    """Two that write side by side together exceed it by little, though each knows of the other only now and then."""
    caches = [OutputCache(tmp_path, 100_000e-9, "a") for _ in range(2)]
    for i in range(200):
        caches[i % 2].put(f"{i}", a_tensor(1000))
    size = sum(path.stat().st_size for path in files(caches[0]))
    assert 90_000 <= size <= (1 + 2 * RECOUNT) * 100_000


def test_replacing_an_entry_does_not_count_twice(tmp_path):
    cache = OutputCache(tmp_path, 10_000e-9, "a")
    cache.put("other", a_tensor(2000))
    for _ in range(50):
        cache.put("k", a_tensor(3000))
    assert cache.counts.removed == 0 and len(files(cache)) == 2


def test_what_is_larger_than_the_cap_is_not_kept(tmp_path):
    cache = OutputCache(tmp_path, 1000e-9, "a")
    cache.put("small", a_tensor(100))
    assert len(cache.put("k", a_tensor(2000))["x"]) == 2000
    assert cache.get("k") is None and cache.counts.not_written == 1
    assert cache.get("small") is not None


@pytest.mark.parametrize("gigabytes", [0, -1.0, float("nan")])
def test_a_cap_of_nothing_is_refused(tmp_path, gigabytes):
    with pytest.raises(ValueError, match="more than 0"):
        OutputCache(tmp_path, gigabytes, "a")


def test_a_disk_that_refuses_costs_nothing_but_the_entry(tmp_path, monkeypatch):
    cache = OutputCache(tmp_path, 1.0, "a")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert torch.equal(cache.put("k", {"x": torch.ones(2)})["x"], torch.ones(2))
    assert cache.counts.not_written == 1 and cache.counts.written == 0 and files(cache) == []
    (tmp_path / "file").touch()
    cache = OutputCache(tmp_path / "file" / "t", 1.0, "a")  # no folder can be made there
    assert torch.equal(cache.put("k", {"x": torch.ones(2)})["x"], torch.ones(2)) and cache.counts.not_written == 1


def test_an_entry_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    """At the moment of the rename the file is complete, and nothing is under the entry's name before."""
    cache, replace, seen = OutputCache(tmp_path, 1.0, "a"), os.replace, []

    def look(source, target):
        seen.append((source.stat().st_size, target.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    cache.put("k", a_tensor(500))
    assert len(seen) == 1 and seen[0][0] == files(cache)[0].stat().st_size and not seen[0][1]
    assert [path.suffix for path in files(cache)] == [".output"]


def test_what_dead_processes_left_is_removed_and_other_files_are_not(tmp_path):
    cache = OutputCache(tmp_path, 1.0, "a")
    cache.put("k", a_tensor(10))
    folder = files(cache)[0].parent
    for name, age in [("old.1.tmp", 7200), ("young.2.tmp", 10)]:
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age,) * 2)
    (tmp_path / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    OutputCache(tmp_path, 1.0, "a")
    assert {path.name for path in files(cache)} >= {"notes.txt", "young.2.tmp"}
    assert not (folder / "old.1.tmp").exists()
    OutputCache(tmp_path, 1e-9, "a").put("l", {"x": torch.zeros(1)})
    assert (folder / "notes.txt").exists() and (tmp_path / "notes.txt").exists()


# a teacher ----------------------------------------------------------------------------------------------------------


def test_a_teacher_is_asked_once_about_an_image(tmp_path):
    torch.manual_seed(0)
    model, asked = DINOv2(width=24, depth=2, heads=2, table_side=3).eval(), []
    model.requested_outputs = frozenset({"patches", "class_attention"})
    model.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    pixels = torch.randint(0, 256, (4, 3, 28, 42), dtype=torch.uint8)
    cache = OutputCache(tmp_path, 1.0, fingerprint_of(model, image_size=(28, 42)))

    def ask(rows, parts=("features/patches", "class_token", "class_attention", "=")):
        keys = [image_key(pixels[row]) for row in rows]
        return cached_forward(model, pixels[rows] / 255, keys, cache, DINOv2Output, parts)

    first, second = ask([0, 1, 2]), ask([0, 1, 2])
    assert asked == [3]
    mixed = ask([3, 1])  # the whole batch, because one is missing
    assert asked == [3, 2]
    cache = OutputCache(tmp_path, 1.0, cache.fingerprint)
    again, some = ask([0, 1, 2, 3]), ask([2, 3], ("class_token", "="))
    assert asked == [3, 2] and some.class_attention is None and some.features == {}
    assert torch.equal(some.class_token, again.class_token[2:])
    for output in (first, second, mixed, again):
        assert output.image_size == (28, 42) and list(output.features) == ["patches"]
    for name in ("class_token", "class_attention"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(again, name)[:3], getattr(first, name))
    assert torch.equal(mixed.features["patches"][1], first.features["patches"][1])
    assert torch.equal(again.features["patches"][3], mixed.features["patches"][0])
    with torch.no_grad():
        expected = model(pixels / 255)
    assert torch.equal(first.features["patches"], expected.features["patches"][:3].half().float()) or torch.allclose(
        first.features["patches"], expected.features["patches"][:3], rtol=1e-3, atol=1e-4
    )
    assert not first.class_token.requires_grad
