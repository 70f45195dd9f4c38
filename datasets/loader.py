"""From an index of files to batches: decode, letterbox, collate. Only the order of pictures is random here.

The order of an epoch is a pure function of (seed, epoch). So a batch is the same with any number of workers, and a run
that stopped before batch k continues exactly with `epoch(e, start=k)`. There is no loader state.
"""

import contextlib
import functools
import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets.images import read_image
from datasets.letterbox import letterbox, letterbox_boxes, unletterbox
from errors import UserError
from random_streams import Stream, seeded_generator
from structures import Targets

MAX_CACHE_FRACTION = 0.5  # of the machine's memory


class LoaderProcessDied(UserError):
    """A loader process ended or hung while it read pictures, or a signal ended the whole process group."""


@dataclass(frozen=True)
class Batch:
    """The B images of one step.

    images: uint8 RGB (B, 3, S, S), letterboxed: aspect kept, centred, surrounded by grey 114.
    targets: boxes in pixels of `images`.
    indices (B,) int64: rows of index.samples.
    scale (B,), pad (B, 2) in x, y order, float32: a corner of the upright picture moves by x' = scale * x + pad.
    content_xyxy (B, 4) float32: the part of each image that is not padding.
    is_labelled (B,) bool: Sample.is_labelled.
    """

    images: Tensor
    targets: Targets
    indices: Tensor
    scale: Tensor
    pad: Tensor
    content_xyxy: Tensor
    is_labelled: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> "Batch":
        """Images and targets on the device. The rest stays on the host, where it is used."""
        return replace(self, images=self.images.to(device, non_blocking=True), targets=self.targets.to(device))

    def unletterbox(self, row: int, boxes_xyxy: Tensor, width: int, height: int) -> Tensor:
        """(N, 4) pixels of images[row] -> (N, 4) pixels of the original picture (width x height), clipped to it."""
        return unletterbox(boxes_xyxy, float(self.scale[row]), self.pad[row], width, height)


class Loader:
    """Batches of an index of samples (datasets.index.DatasetIndex), by epoch.

    Args:
        index: any object with `samples`, each with image_path, boxes_xyxy (N, 4), labels (N,) and ignore (N,), and with
            class_scores (N, K) for soft labels.
        image_size: S, the side of the letterboxed square in pixels.
        batch_size: pictures per batch on this rank. The last batch of an epoch may be smaller.
        seed: of the order.
        workers: processes that decode (0: this one). They need an operating system with fork.
        shuffle: True for training; False for evaluation, in the order of the index.
        cache: keep every letterboxed picture in memory, 3 S^2 bytes each, shared by the workers, from its first reading
            on. Switched off with a warning where it would take more than half of the memory.
        rank, world_size: this process among those of a distributed run. Batch k of all ranks together holds the
            same pictures as batch k of one process with world_size times the batch size. With `shuffle`, the order
            wraps around, so every rank has the same number. Without, no picture is read twice, and a later rank may
            have one picture (and so one batch) fewer.
        timeout_s: seconds to wait for a worker.
        pictures_per_epoch: P, of all ranks together; 0: the size of the set. Passes over the set, each in its own
            order, follow one another without end; epoch e is their pictures e P to (e + 1) P. So sets of any size give
            the same number of steps, and how often two pictures are used differs by at most one.
        labelled_share: mix labelled and other pictures in this ratio (mixed_order); None: as they come in one order.
    """

    def __init__(
        self,
        index,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        workers: int = 0,
        shuffle: bool = True,
        cache: bool = False,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 300.0,
        pictures_per_epoch: int = 0,
        labelled_share: float | None = None,
    ) -> None:
        if not index.samples:
            raise UserError("the dataset has no pictures, expected at least one")
        if batch_size < 1 or image_size < 1 or pictures_per_epoch < 0 or not 0 <= rank < world_size:
            numbers = f"image_size {image_size}, pictures_per_epoch {pictures_per_epoch}, rank {rank} of {world_size}"
            raise ValueError(f"batch_size {batch_size}, {numbers}")
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise UserError(f"workers={workers}: loader processes need an operating system with fork, use workers=0")
        self.index, self.batch_size, self.seed, self.workers = index, batch_size, seed, workers
        self.shuffle, self.rank, self.world_size = shuffle, rank, world_size
        self.timeout_s = timeout_s
        self.pictures_per_epoch = pictures_per_epoch or len(index.samples)
        self.labelled_share = labelled_share
        self.is_labelled = [getattr(sample, "is_labelled", True) for sample in index.samples]
        self._reader = _Reader(
            index.samples, image_size, cache and _fits_in_memory(len(index.samples), image_size), workers
        )

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[list[int]]:
        """For each batch of an epoch on this rank its rows of index.samples."""
        order = self._order(epoch) if self.shuffle else list(range(len(self.index.samples)))
        rows = shard(order, self.rank, self.world_size, wrap_around=self.shuffle)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _order(self, epoch: int) -> list[int]:
        """The rows of a shuffled epoch, of all processes together."""
        if self.labelled_share is None:
            return endless_order(len(self.index.samples), self.seed, epoch, self.pictures_per_epoch)
        labelled = [row for row, is_labelled in enumerate(self.is_labelled) if is_labelled]
        others = [row for row, is_labelled in enumerate(self.is_labelled) if not is_labelled]
        return mixed_order(
            (labelled, others),
            self.labelled_share,
            seed=self.seed,
            epoch=epoch,
            per_epoch=self.pictures_per_epoch,
            batch_size=self.batch_size * self.world_size,
        )

    def read(self, rows: list[int]) -> Batch:
        """A batch of these rows, read by this process. UserError names the file that cannot be read."""
        return _checked(self._reader[rows])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on.

        UserError names the picture that cannot be read, or the files being read when a worker dies or takes longer than
        `timeout_s`. Workers end with the iterator, even if it is abandoned.
        """
        batches = self.batches(epoch)[start:]
        if not batches:
            return
        if not self.workers:
            for rows in batches:
                yield self.read(rows)
            return
        try:
            yield from self._read_by_workers(batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not is_dead_worker(error):
                raise
            files = ", ".join(str(self._reader.samples[row].image_path) for row in self._reader.rows_being_read())
            reason = " ".join(str(error).split()) or "it closed the connection"
            found = f"a loader process died or hung while reading {files or 'nothing'}: {reason}"
            raise LoaderProcessDied(found) from error

    def _read_by_workers(self, batches: list[list[int]]) -> Iterator[Batch]:
        """Read batches by worker processes.

        After a worker has died, torch's signal handler raises at any line until the workers are shut down. So this
        function only reads and shuts down: the error is the same at every line.
        """
        self._reader.reading[:] = 0
        iterator = cast(  # the class of every iterator with num_workers > 0
            _MultiProcessingDataLoaderIter,
            iter(
                DataLoader(
                    self._reader,
                    sampler=batches,  # one "sample" is a whole batch
                    batch_size=None,
                    collate_fn=_identity,
                    num_workers=min(self.workers, len(batches)),
                    multiprocessing_context="fork",
                    worker_init_fn=functools.partial(_start_worker, os.getpid()),
                    timeout=self.timeout_s,
                    generator=torch.Generator(),  # otherwise each epoch draws a number from the global one
                )
            ),
        )
        try:
            for _ in batches:
                yield _checked(next(iterator))
        finally:
            with contextlib.suppress(RuntimeError):  # the call completes even if this is raised inside it
                iterator._shutdown_workers()  # there is no public way
            for worker in iterator._workers:
                worker.join(1)  # otherwise a terminated worker stays a zombie (torch 2.11)


def epoch_order(count: int, seed: int, epoch: int, stream: Stream = Stream.ORDER) -> list[int]:
    """A permutation of range(count), the same for the same arguments."""
    return torch.randperm(count, generator=seeded_generator(stream, seed, epoch)).tolist()


def endless_order(count: int, seed: int, epoch: int, per_epoch: int) -> list[int]:
    """Places epoch * per_epoch to (epoch + 1) * per_epoch of endless passes over `count` rows: places_of_passes.

    With per_epoch = count this is epoch_order(count, seed, epoch).
    """
    return places_of_passes(count, seed, epoch * per_epoch, (epoch + 1) * per_epoch)


def places_of_passes(count: int, seed: int, first: int, last: int, stream: Stream = Stream.ORDER) -> list[int]:
    """Places first..last - 1 of the concatenated epoch_order(count, seed, k, stream), k = 0, 1, ..."""
    passes = range(first // count, -(-last // count))
    rows = [row for number in passes for row in epoch_order(count, seed, number, stream)]
    return rows[first % count :][: last - first]


def mixed_order(
    kinds: tuple[list[int], list[int]], share: float, *, seed: int, epoch: int, per_epoch: int, batch_size: int
) -> list[int]:
    """Rows of an epoch that mixes two endless streams, of labelled and of other rows, in a fixed ratio.

    Before place i of the mixed stream, floor(i share) places hold labelled rows, in the order of endless passes over
    them; the others hold the other rows, in an order of their own. An epoch is `per_epoch` places. So of any `n`
    consecutive places n share hold labelled rows, rounded down or up: the same number in every batch if
    batch_size * share is whole. Within each batch_size places the labelled rows come first, so that processes which
    take turns get equally many.
    """
    exact = Fraction(share).limit_denominator(1_000_000)  # 0.1 as 1 / 10
    first, last = epoch * per_epoch, (epoch + 1) * per_epoch
    before = [math.floor(place * exact) for place in range(first, last + 1)]  # labelled places before each
    streams = [
        places_of_passes(len(kinds[0]), seed, before[0], before[-1]),
        places_of_passes(len(kinds[1]), seed, first - before[0], last - before[-1], Stream.UNLABELLED_ORDER),
    ]
    labelled, others = ([rows[place] for place in places] for rows, places in zip(kinds, streams))
    order = []
    for start in range(0, per_epoch, batch_size):
        end = min(start + batch_size, per_epoch)
        a, b = before[start] - before[0], before[end] - before[0]
        order += labelled[a:b] + others[start - a : end - b]
    return order


def shard(rows: list[int], rank: int, world_size: int, *, wrap_around: bool) -> list[int]:
    """Every world_size-th row from `rank` on. `wrap_around` repeats first rows, so all ranks get the same number."""
    if not wrap_around:
        return rows[rank::world_size]
    per_rank = -(-len(rows) // world_size)
    return [rows[(rank + i * world_size) % len(rows)] for i in range(per_rank)]


class _Reader(Dataset):
    """Rows of samples -> a Batch, or the message of a UserError as text: a worker's exception would lose its type."""

    def __init__(self, samples, image_size: int, cache: bool, workers: int) -> None:
        self.samples, self.image_size = samples, image_size
        self.reading = np.frombuffer(mmap.mmap(-1, 8 * max(1, workers)), np.int64)  # 1 + row, per worker; 0: nothing
        self.pictures: np.ndarray | None = None
        self.geometry: np.ndarray | None = None
        if cache:
            # An anonymous shared map: forked workers fill it for all processes, it takes memory only where it is
            # filled, and unlike /dev/shm it has no size limit of its own.
            count, size = len(samples), image_size
            self.pictures = np.frombuffer(mmap.mmap(-1, count * size * size * 3), np.uint8).reshape(
                count, 3, size, size
            )
            self.geometry = np.frombuffer(mmap.mmap(-1, count * 40), np.float64).reshape(count, 5)  # scale 0: not read

    def __getitem__(self, rows: list[int]) -> "Batch | str":
        images = np.empty((len(rows), 3, self.image_size, self.image_size), np.uint8)
        scale, content = torch.empty(len(rows)), torch.empty(len(rows), 4)
        boxes = []
        worker = get_worker_info()
        slot = worker.id if worker else 0
        for i, row in enumerate(rows):
            self.reading[slot] = 1 + row
            try:
                images[i], exact_scale, *picture_xyxy = self._read(row)
            except UserError as error:
                return str(error)
            except Exception as error:
                raise RuntimeError(f"while reading {self.samples[row].image_path}: {error!r}") from error
            corners = torch.from_numpy(np.asarray(self.samples[row].boxes_xyxy, np.float64).reshape(-1, 4))
            boxes.append(letterbox_boxes(corners, exact_scale, picture_xyxy[:2]).float())
            scale[i], content[i] = exact_scale, torch.tensor(picture_xyxy)
        self.reading[slot] = 0
        counts = torch.tensor([len(b) for b in boxes])
        targets = Targets(
            torch.cat(boxes),
            torch.from_numpy(np.concatenate([np.asarray(self.samples[row].labels, np.int64) for row in rows])),
            torch.arange(len(rows)).repeat_interleave(counts),
            torch.from_numpy(np.concatenate([np.asarray(self.samples[row].ignore, bool) for row in rows])),
            self._class_scores(rows),
        )
        is_labelled = torch.tensor([getattr(self.samples[row], "is_labelled", True) for row in rows])
        pad = content[:, :2].clone()
        return Batch(torch.from_numpy(images), targets, torch.tensor(rows), scale, pad, content, is_labelled)

    def _class_scores(self, rows: list[int]) -> Tensor | None:
        """float32 (N, K) for the objects of these rows; None without soft labels. An index has them in all or none."""
        if getattr(self.samples[rows[0]], "class_scores", None) is None:
            return None
        return torch.from_numpy(np.concatenate([self.samples[row].class_scores for row in rows]).astype(np.float32))

    def rows_being_read(self) -> list[int]:
        """The rows of samples that the workers of an epoch are reading."""
        return (self.reading[self.reading > 0] - 1).tolist()

    def _read(self, row: int) -> tuple[np.ndarray, float, float, float, float, float]:
        """The letterboxed image (3, S, S), scale, and the corners of its content."""
        pictures, geometry = self.pictures, self.geometry
        if pictures is not None and geometry is not None and geometry[row, 0] > 0:
            return pictures[row], *geometry[row].tolist()
        square, scale, content_xyxy = letterbox(read_image(self.samples[row].image_path), self.image_size)
        planes = np.moveaxis(square, 2, 0)  # (3, S, S)
        if pictures is not None and geometry is not None:
            pictures[row] = planes
            geometry[row] = scale, *content_xyxy  # after the pixels: a scale above 0 marks that they are there
        return planes, scale, *content_xyxy


def is_dead_worker(error: RuntimeError | OSError | EOFError) -> bool:
    """Whether an error of torch's DataLoader means a dead or hung worker, and not a fault in what the worker read.

    OSError and EOFError come from a worker that died while it passed a batch on. For a worker that died or hung before,
    PyTorch has no type: it raises a RuntimeError whose text begins with "DataLoader ", which no other error here does.
    """
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader ")


def _checked(result: "Batch | str") -> Batch:
    if isinstance(result, str):
        raise UserError(result)
    return result


def _identity(batch):
    return batch


def _start_worker(parent: int, worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole process group: the training process decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent has died. PyTorch's own watch misses a death right after the fork."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _fits_in_memory(count: int, image_size: int) -> bool:
    """Whether a cache of `count` pictures takes at most MAX_CACHE_FRACTION of the memory. Warns if it takes more."""
    if not hasattr(os, "sysconf"):  # on Windows the size of the memory needs further libraries
        return True
    needed = 3 * image_size**2 * count
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    if needed > MAX_CACHE_FRACTION * memory:
        warnings.warn(
            f"not cached: {count} pictures of {image_size} px need {needed / 2**30:.1f} GiB, "
            f"the machine has {memory / 2**30:.1f} GiB",
            stacklevel=3,
        )
        return False
    return True
