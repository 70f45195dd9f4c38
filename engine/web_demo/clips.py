"""A short video through two detectors: the drawn frames of both beside each other, in memory."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO

import numpy as np
from PIL import Image

from datasets.enhance import Enhancement, enhance
from engine.prediction.video import VideoReader, VideoWriter
from engine.web_demo.detectors import Detector, detect
from engine.web_demo.gallery import beside, resize, shown_with
from errors import UserError

MAX_MEGABYTES = 40
MAX_SECONDS = 10  # of a video; what follows is left out
FRAMES_PER_SECOND = 8
MAX_DECODED = 1200  # frames: a file may claim any number of them in a second
MAX_FRAME_PIXELS = 9_000_000  # 3840 x 2160 has 8.3 million
SIDE = 640  # pixels: the longer side of a frame

ONE_VIDEO_AT_A_TIME = threading.Lock()  # a decoder may hold a dozen frames


def read_frames(data: bytes) -> Iterator[np.ndarray]:
    """FRAMES_PER_SECOND frames a second of a video's first MAX_SECONDS, uint8 RGB, at most SIDE pixels a side.

    UserError for a file that is too large or no video. Nothing is written to disk.
    """
    if len(data) > MAX_MEGABYTES * 2**20:
        raise UserError(f"the video: {len(data) / 2**20:.1f} MB, expected at most {MAX_MEGABYTES} MB")
    taken = 0
    with VideoReader(BytesIO(data), max_pixels=MAX_FRAME_PIXELS) as reader:
        for frame in reader:
            if frame.seconds >= MAX_SECONDS or frame.number >= MAX_DECODED:
                return
            if frame.seconds * FRAMES_PER_SECOND >= taken - 1e-6:
                taken += 1
                scale = min(1.0, SIDE / max(frame.pixels.shape[:2]))
                yield np.asarray(resize(Image.fromarray(frame.pixels), scale))


def draw_clip(
    data: bytes,
    pair: Sequence[Detector],
    steps: Enhancement,
    *,
    score: float,
    iou: float,
    progress: Callable[[int], object] = lambda frames: None,
) -> bytes:
    """An MP4 file in which each frame stands twice, with the detections of both. UserError as in read_frames.

    progress: called with the number of frames done.
    """
    file, writer, rate = BytesIO(), None, Fraction(FRAMES_PER_SECOND)
    with ONE_VIDEO_AT_A_TIME, contextlib.ExitStack() as opened:
        for number, frame in enumerate(read_frames(data)):
            enhanced = enhance(frame, steps)
            found = [detect(detector, enhanced, score=score, iou=iou) for detector in pair]
            views = [shown_with(enhanced, rows, d.names, side=SIDE) for rows, d in zip(found, pair)]
            sheet = np.asarray(beside(views[0], views[1], [d.name for d in pair]))
            if writer is None:
                height, width = sheet.shape[:2]
                writer = VideoWriter(file, width=width, height=height, frame_rate=rate, time_base=1 / rate)
                opened.enter_context(writer)
            writer.write(sheet, number)
            progress(number + 1)
    return file.getvalue()
