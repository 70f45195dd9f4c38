"""The order of batches is a pure function of (seed, epoch); letterboxed boxes cover letterboxed pixels."""

import functools
import os
import signal
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import letterbox as L
from datasets import loader as loader_module
from datasets.loader import Batch, Loader, endless_order, epoch_order, shard
from errors import UserError


def make_index(folder: Path, count: int, seed: int = 0):
    """Pictures of many sizes, each with a white box on black, and 0 to 2 further objects."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        w, h = (int(v) for v in rng.integers(20, 90, 2))
        x1, y1 = int(rng.integers(0, w // 2)), int(rng.integers(0, h // 2))
        x2, y2 = int(rng.integers(x1 + 6, w)), int(rng.integers(y1 + 6, h))
        picture = np.zeros((h, w, 3), np.uint8)
        picture[y1:y2, x1:x2] = 255
        path = folder / f"{i:03d}.png"
        Image.fromarray(picture).save(path)
        extra = int(rng.integers(0, 3))
        samples.append(
            SimpleNamespace(
                image_path=path,
                width=w,
                height=h,
                boxes_xyxy=np.array([[x1, y1, x2, y2]] + [[0.0, 0.0, 5.5, 6.25]] * extra, np.float64),
                labels=np.arange(1 + extra),
                ignore=np.arange(1 + extra) == 1,
            )
        )
    samples[count // 2].boxes_xyxy = np.zeros((0, 4))
    samples[count // 2].labels, samples[count // 2].ignore = np.zeros(0, np.int64), np.zeros(0, bool)
    return SimpleNamespace(samples=tuple(samples))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("pictures"), 13)


def flat(batch: Batch) -> list[torch.Tensor]:
    return [batch.images, batch.indices, batch.scale, batch.pad, batch.content_xyxy] + [
        column for f in fields(batch.targets) if (column := getattr(batch.targets, f.name)) is not None
    ]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert all(torch.equal(p, q) for p, q in zip(flat(x), flat(y)))


# ---------------------------------------------------------------- letterbox


@pytest.mark.parametrize("width, height", [(64, 48), (33, 71), (500, 333), (10, 7), (32, 32), (300, 2), (1, 200)])
def test_letterbox_geometry(width, height):
    scale, pad_x, pad_y, w, h = L.letterbox_geometry(width, height, 32)
    assert scale == 32 / max(width, height)
    assert max(w, h) == 32 and min(w, h) == max(1, 32 * min(width, height) // max(width, height))
    assert (pad_x, pad_y) == ((32 - w) // 2, (32 - h) // 2)


def test_letterbox_of_the_right_size_is_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (32, 20, 3)).astype(np.uint8)
    square, scale, content = L.letterbox(picture, 32)
    assert scale == 1 and content == (6, 0, 26, 32)
    assert np.array_equal(square[:, 6:26], picture) and (square[:, :6] == 114).all() and (square[:, 26:] == 114).all()


@pytest.mark.parametrize("size", [640, 97])
def test_shrinking_averages_instead_of_skipping(size):
    board = np.indices((size, size)).sum(0) % 2 * 255  # aliases badly when pixels are skipped
    square, *_ = L.letterbox(np.repeat(board[..., None], 3, 2).astype(np.uint8), 32)
    assert abs(square.astype(float) - 127.5).max() < 30


def test_shrinking_by_a_whole_number_is_close_to_the_mean_of_blocks():
    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((128, 128), 3))
    square, *_ = L.letterbox(picture, 32)
    blocks = picture.reshape(32, 4, 32, 4, 3).astype(float).mean((1, 3))
    assert abs(square - blocks).mean() < 2


def test_boxes_go_there_and_back():
    boxes = torch.tensor([[0.0, 0, 500, 333], [10, 20, 30, 40.5]])
    scale, pad_x, pad_y, *_ = L.letterbox_geometry(500, 333, 320)
    moved = L.letterbox_boxes(boxes, scale, (pad_x, pad_y))
    torch.testing.assert_close(L.unletterbox(moved, scale, (pad_x, pad_y), 500, 333), boxes)
    outside = torch.tensor([[-50.0, -50, 999, 999]])
    assert L.unletterbox(outside, scale, (pad_x, pad_y), 500, 333).tolist() == [[0, 0, 500, 333]]


@pytest.mark.parametrize("image_size", [32, 160])
def test_boxes_cover_the_letterboxed_pixels(index, image_size):
    for batch in Loader(index, image_size=image_size, batch_size=4, seed=0, shuffle=False).epoch(0):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, image_size, image_size)
        for row, i in enumerate(batch.indices.tolist()):
            sample, mine = index.samples[i], batch.targets[batch.targets.image == row]
            assert mine.labels.tolist() == sample.labels.tolist() and mine.ignore.tolist() == sample.ignore.tolist()
            back = batch.unletterbox(row, mine.boxes_xyxy, sample.width, sample.height)
            np.testing.assert_allclose(back.numpy(), sample.boxes_xyxy.astype(np.float32), atol=1e-4)
            x1, y1, x2, y2 = (round(v) for v in batch.content_xyxy[row].tolist())
            outside = torch.ones(image_size, image_size, dtype=torch.bool)
            outside[y1:y2, x1:x2] = False
            assert (batch.images[row][:, outside] == 114).all() and batch.pad[row].tolist() == [x1, y1]
            if len(mine):
                seen = (batch.images[row, 0] > 127) & ~outside
                columns, rows = seen.any(0).nonzero()[:, 0], seen.any(1).nonzero()[:, 0]
                found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                np.testing.assert_allclose(found, mine.boxes_xyxy[0].numpy(), atol=1.0)


# ---------------------------------------------------------------- order


def test_order_is_a_pure_function_of_seed_and_epoch():
    orders = {(s, e): tuple(epoch_order(50, s, e)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9 and all(sorted(o) == list(range(50)) for o in orders.values())
    assert epoch_order(50, 1, 2) == list(orders[1, 2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])  # three have four batches to share
@pytest.mark.parametrize("cache", [False, True])
def test_batches_are_the_same_with_any_number_of_workers(index, workers, cache):
    alone = Loader(index, image_size=48, batch_size=4, seed=7)
    many = Loader(index, image_size=48, batch_size=4, seed=7, workers=workers, cache=cache)
    state = torch.get_rng_state()
    for epoch in (0, 1, 0):
        assert_same(list(alone.epoch(epoch)), list(many.epoch(epoch)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_goes_on_as_a_full_epoch_would(index, workers, start):
    loader = Loader(index, image_size=48, batch_size=4, seed=7, workers=workers)
    full = list(loader.epoch(3))
    assert len(full) == len(loader) == 4
    assert_same(list(loader.epoch(3, start=start)), full[start:])


def test_every_picture_once_and_the_last_batch_smaller(index):
    batches = list(Loader(index, image_size=32, batch_size=4, seed=0).epoch(0))
    assert [len(b) for b in batches] == [4, 4, 4, 1]
    assert sorted(torch.cat([b.indices for b in batches]).tolist()) == list(range(13))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("count", [1, 12, 13])
def test_shards(world_size, count):
    order = epoch_order(count, 0, 0)
    train = [shard(order, r, world_size, wrap_around=True) for r in range(world_size)]
    assert len({len(rows) for rows in train}) == 1
    merged = [row for step in zip(*train) for row in step]
    assert merged[:count] == order and merged[count:] == (order * world_size)[: len(merged) - count]
    test = [shard(order, r, world_size, wrap_around=False) for r in range(world_size)]
    assert (
        sorted(row for rows in test for row in rows) == sorted(order) and max(map(len, test)) - min(map(len, test)) <= 1
    )


def test_ranks_together_hold_the_batches_of_one_process(index):
    one = Loader(index, image_size=32, batch_size=4, seed=1).batches(5)
    ranks = [Loader(index, image_size=32, batch_size=2, seed=1, rank=r, world_size=2).batches(5) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    for together, a, b in zip(one, *ranks):
        assert set(a + b) >= set(together)


@pytest.mark.parametrize(("count", "per_epoch"), [(5, 13), (13, 5), (13, 13), (4, 12), (1, 7)])
def test_an_epoch_of_any_length_is_cut_out_of_endless_passes(count, per_epoch):
    passes = [row for number in range(40) for row in epoch_order(count, 3, number)]
    for epoch in range(5):
        expected = passes[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert endless_order(count, 3, epoch, per_epoch) == expected and len(expected) == per_epoch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("per_epoch", [6, 30])
def test_epochs_of_other_lengths_go_on_from_any_batch_on_any_number_of_ranks(index, workers, per_epoch):
    make = functools.partial(Loader, index, image_size=32, seed=7, pictures_per_epoch=per_epoch)
    loader = make(batch_size=4, workers=workers)
    assert len(loader) == -(-per_epoch // 4) and [len(rows) for rows in loader.batches(3)][-1] == 2
    full = list(loader.epoch(3))
    assert_same(list(loader.epoch(3, start=1)), full[1:])
    ranks = [make(batch_size=2, rank=rank, world_size=2).batches(3) for rank in range(2)]
    for batch, a, b in zip(full, *ranks):
        assert [row for pair in zip(a, b) for row in pair] == batch.indices.tolist()


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pictures_are_not_read_again(tmp_path, workers):
    index = make_index(tmp_path, 6)
    loader = Loader(index, image_size=32, batch_size=4, seed=0, workers=workers, cache=True)
    first = list(loader.epoch(0))
    for sample in index.samples:
        sample.image_path.unlink()
    assert_same(list(loader.epoch(0)), first)


def test_a_cache_beyond_memory_is_refused_aloud(index, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_CACHE_FRACTION", 1e-9)
    with pytest.warns(UserWarning, match="not cached: 13 pictures of 32 px need"):
        loader = Loader(index, image_size=32, batch_size=4, seed=0, cache=True)
    assert len(list(loader.epoch(0))) == 4


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["missing", "truncated", "text"])
def test_a_broken_picture_is_named(tmp_path, workers, fault):
    index = make_index(tmp_path, 6)
    path = index.samples[3].image_path
    data = path.read_bytes()
    path.unlink() if fault == "missing" else path.write_bytes(data[:60] if fault == "truncated" else b"no picture")
    loader = Loader(index, image_size=32, batch_size=2, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"003\.png") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_bug_in_a_worker_names_the_file_and_keeps_its_traceback(index, monkeypatch):
    monkeypatch.setattr(loader_module, "read_image", lambda path: 1 / 0)
    with pytest.raises(RuntimeError, match=r"(?s)while reading .*\.png: ZeroDivisionError"):
        list(Loader(index, image_size=32, batch_size=4, seed=0, workers=1).epoch(0))


def worker_ids() -> set[int]:
    return {int(p) for p in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in /proc")
class TestWorkers:
    def wait_until_gone(self, ids: set[int]) -> None:
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{i}/stat").exists() for i in ids) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [i for i in ids if Path(f"/proc/{i}/stat").exists()]

    def test_workers_end_with_an_abandoned_epoch(self, index):
        before = worker_ids()
        epoch = Loader(index, image_size=32, batch_size=2, seed=0, workers=2).epoch(0)
        next(epoch)
        workers = worker_ids() - before
        assert len(workers) == 2
        epoch.close()
        self.wait_until_gone(workers)

    def test_ctrl_c_for_the_group_leaves_the_workers_to_the_training_process(self, index):
        before = worker_ids()
        epoch = Loader(index, image_size=32, batch_size=1, seed=0, workers=1).epoch(0)
        batches = [next(epoch)]
        for worker in worker_ids() - before:
            os.kill(worker, signal.SIGINT)
        batches += list(epoch)
        assert len(batches) == 13

    def test_a_killed_worker_is_an_error_that_names_the_file_awaited(self, tmp_path, monkeypatch):
        index = make_index(tmp_path, 6)

        def read(path):
            if path.name == "002.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return np.zeros((8, 8, 3), np.uint8)

        monkeypatch.setattr(loader_module, "read_image", read)
        with pytest.raises(UserError, match=r"died or hung while reading \S*002\.png: "):
            list(Loader(index, image_size=32, batch_size=1, seed=0, workers=1, shuffle=False).epoch(0))

    @pytest.mark.parametrize(
        "error", [EOFError(), FileNotFoundError(2, "no socket"), ConnectionResetError(104, "reset")]
    )
    def test_a_worker_that_dies_while_it_hands_a_batch_over_is_an_error_too(self, index, monkeypatch, error):
        def receive(iterator):
            raise error

        monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", receive)
        with pytest.raises(UserError, match="a loader process died or hung"):
            list(Loader(index, image_size=32, batch_size=4, seed=0, workers=1).epoch(0))

    def test_a_worker_whose_death_is_signalled_late_is_one_error_all_the_same(self, index, monkeypatch):
        def receive(iterator):
            os.kill(iterator._workers[0].pid, signal.SIGKILL)
            raise ConnectionResetError(104, "reset")

        def slowly(reader, rows_being_read=loader_module._Reader.rows_being_read):
            time.sleep(0.2)  # the signal arrives here, if the dead worker is still one of torch's
            return rows_being_read(reader)

        monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", receive)
        monkeypatch.setattr(loader_module._Reader, "rows_being_read", slowly)
        with pytest.raises(UserError, match="a loader process died or hung"):
            list(Loader(index, image_size=32, batch_size=4, seed=0, workers=1).epoch(0))

    def test_a_hanging_worker_ends_in_a_timeout(self, index, monkeypatch):
        before = worker_ids()
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # of a polite end
        monkeypatch.setattr(loader_module, "read_image", lambda path: time.sleep(60))
        loader = Loader(index, image_size=32, batch_size=1, seed=0, workers=1, shuffle=False, timeout_s=0.5)
        with pytest.raises(UserError, match=r"died or hung while reading \S*000\.png: .*timed out after 0\.5 s"):
            list(loader.epoch(0))
        self.wait_until_gone(worker_ids() - before)


def test_nothing_to_load_is_an_error():
    with pytest.raises(UserError, match="pictures"):
        Loader(SimpleNamespace(samples=()), image_size=32, batch_size=4, seed=0)
