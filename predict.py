"""Detect objects in pictures and video: drawn copies, a JSON file, YOLO text files.

    python predict.py CHECKPOINT SOURCE ... [--output DIR] [--json] [--txt]

Examples:

    python predict.py runs/bccd_yolov8n/weights/last.pt photo.jpg folder 'more/*.png' --output found --json --txt
    python predict.py runs/bccd_yolov8n clip.mp4 webcam --max-frames 500
    python predict.py runs/bccd_yolov8n webcam --show      # in a window; q ends it

A SOURCE is a picture, a video, a folder or pattern of both, or a webcam (`webcam`, `webcam:1`). Ctrl-C stops; results
up to then are kept, and a video written so far can be played. Below --output it writes:

    <name>.jpg          each picture with its boxes; pictures of a folder keep their subfolders
    <name>.mp4          each video with its boxes: every frame at its own time, upright, without sound
    predictions.json    with --json: a list of {"image_id", "file_name", "category_id", "category_name",
                        "bbox": [x, y, width, height], "score"}, in pixels of the upright picture, best first in each
                        picture. image_id counts pictures and frames from 1 in the order given, category_id the
                        classes from 0: pycocotools reads it as it is, FiftyOne with a dict of names. Frames also
                        have "frame", their number from 0, and "seconds" since the first frame
    labels/<name>.txt   with --txt: a line `class center_x center_y width height score` for each detection, as
                        fractions of the upright picture's size; empty if nothing was found
    labels/<name>.mp4/000000.txt ...    the same for each frame of a video
    labels/classes.txt  the class names in the order of their numbers, if the model has names

A file gets its name only once it is complete. A picture or frame that cannot be read is reported and skipped.

Exit codes: 0 all read, 1 something was skipped, 2 a mistake in the arguments or the data, 4 weights that do not fit in
memory, 5 a file that could not be written, 130 after Ctrl-C, 143 after SIGTERM.
"""

import argparse
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import check_image_size
from datasets.images import read_image
from datasets.yolo_txt import LabelFolders
from engine.command_line.translation import options_of, refuse_unknown
from engine.drawing.detections import draw_detections
from engine.onnx_files.detector import OnnxDetector, check_precision, load_detector
from engine.prediction.files import CLASS_LIST, PredictionFiles, complete_file, drawn_path, format_counts, text_path
from engine.prediction.predictor import Predictor
from engine.prediction.sources import Source, find_sources
from engine.prediction.video import VideoReader, VideoWriter, require_av
from engine.prediction.window import Window
from engine.runtime.interruption import StopSignals
from engine.runtime.processes import choose_device, use_bfloat16
from engine.runtime.progress import Progress
from errors import DISK_EXIT_CODE, ArgumentParser, UserError, counted, expect, run_script, shortened
from models import check_suppression
from structures import Detections


@dataclass
class Totals:
    """Counts over all sources. seconds: of the model, with letterbox and suppression."""

    pictures: int = 0
    videos: int = 0
    frames: int = 0
    broken: int = 0
    seconds: float = 0.0
    labels: Counter[int] = field(default_factory=Counter)

    def line(self, names: Sequence[str], output: Path) -> str:
        parts = [counted(self.pictures, "picture")] if self.pictures or not self.videos else []
        parts += [f"{counted(self.frames, 'frame')} of {counted(self.videos, 'video')}"] if self.videos else []
        num_images = self.pictures + self.frames
        return (
            f"{', '.join(parts)}, {counted(self.labels.total(), 'detection')} ({format_counts(self.labels, names)}), "
            f"{self.broken} skipped, {1000 * self.seconds / max(1, num_images):.0f} ms "
            f"a {'frame' if self.frames else 'picture'}: {output}"
        )


@dataclass
class Prediction:
    """One call of predict.py: the detector, the requested outputs, and the totals so far."""

    predictor: Predictor
    names: Sequence[str]
    output: Path
    files: PredictionFiles
    batch_size: int
    draw: bool
    quiet: bool
    max_frames: int | None
    window: Window | None
    is_ended: bool = False  # by q or by closing the window
    totals: Totals = field(default_factory=Totals)
    image_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(self, sources: Sequence[Source], stop: StopSignals) -> Totals:
        """Write everything into `output` and print the totals. A signal received by `stop` ends it after a batch."""
        with self.files:
            for is_video, group in itertools.groupby(sources, key=lambda source: source.is_video):
                if not is_video:
                    self.predict_pictures(list(group), stop)
                    continue
                for source in group:
                    if not stop.received and not self.is_ended:
                        self.predict_video(source, stop)
        print(self.totals.line(self.names, self.output))
        return self.totals

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        began = time.perf_counter()
        found = self.predictor(pictures)
        self.totals.seconds += time.perf_counter() - began
        for detections in found:
            self.totals.labels.update(detections.labels.tolist())
        return found

    def predict_pictures(self, sources: Sequence[Source], stop: StopSignals) -> None:
        for batch in batches(self.read_pictures(sources, stop), self.batch_size):
            found = self.detect([pixels for _, _, pixels in batch])
            self.totals.pictures += len(batch)
            for (source, image_id, pixels), detections in zip(batch, found):
                height, width = pixels.shape[:2]
                self.files.add(source, image_id, detections, (width, height))
                if self.draw:
                    with complete_file(drawn_path(self.output, source)) as path:
                        draw_detections(pixels, detections, self.names).save(path, format="JPEG", quality=92)
                if not self.quiet:
                    words = format_counts(Counter(detections.labels.tolist()), self.names)
                    print(f"{source.path}: {width} x {height}, {words}", flush=True)

    def read_pictures(self, sources: Sequence[Source], stop: StopSignals) -> Iterator[tuple[Source, int, np.ndarray]]:
        """Yield pictures with their image_id and pixels. One that cannot be read is reported, counted and skipped."""
        for source in sources:
            if stop.received:
                return
            image_id = next(self.image_ids)
            try:
                yield source, image_id, read_image(source.path)
            except UserError as error:
                self.skip(error)

    def skip(self, error: UserError) -> None:
        self.totals.broken += 1
        print(f"skipped: {error}", flush=True)

    def predict_video(self, source: Source, stop: StopSignals) -> None:
        try:
            reader = open_video(source)
        except UserError as error:
            if source.is_named:
                raise
            self.skip(error)
            return
        with reader:
            if not self.draw:
                self.predict_frames(source, reader, None, stop)
                return
            with VideoWriter(
                drawn_path(self.output, source),
                width=reader.width,
                height=reader.height,
                frame_rate=reader.frame_rate,
                time_base=reader.time_base,
                pixel_shape=reader.pixel_shape,
            ) as writer:
                self.predict_frames(source, reader, writer, stop)

    def predict_frames(
        self, source: Source, reader: VideoReader, writer: VideoWriter | None, stop: StopSignals
    ) -> None:
        labels: Counter[int] = Counter()
        done, seconds, began = 0, 0.0, time.perf_counter()
        progress = Progress(quiet=self.quiet, unit="frame")
        known = [count for count in (reader.frame_count, self.max_frames) if count]
        progress.start(reader.name, min(known, default=None))
        frames = itertools.islice(reader, self.max_frames)
        # frames of a camera, and those that are shown, go to the model one by one, as they come
        is_live = source.camera is not None or self.window is not None
        for batch in batches(frames, 1 if is_live else self.batch_size):
            for frame, detections in zip(batch, self.detect([frame.pixels for frame in batch])):
                height, width = frame.pixels.shape[:2]
                self.files.add(source, next(self.image_ids), detections, (width, height), frame)
                if writer is not None or self.window is not None:
                    drawn = np.asarray(draw_detections(frame.pixels, detections, self.names))
                    if writer is not None:
                        writer.write(drawn, frame.ticks)
                    if self.window is not None and not self.window.show(drawn):
                        self.is_ended = True
                labels.update(detections.labels.tolist())
                done, seconds = done + 1, frame.seconds
                progress.advance({"frames per second": done / (time.perf_counter() - began)})
            if stop.received or self.is_ended:
                break
        progress.finish()
        self.totals.videos += 1
        self.totals.frames += done
        self.totals.broken += reader.broken
        progress.say(self.video_line(reader, done, seconds, labels, done / (time.perf_counter() - began)))
        if reader.broken:
            fault = f"{reader.first_fault} first, after which frames may show traces of it"
            print(f"skipped: {reader.name}: {counted(reader.broken, 'broken frame')} ({fault})", flush=True)

    def video_line(self, reader: VideoReader, done: int, seconds: float, labels: Counter[int], speed: float) -> str:
        frames = counted(done, "frame") if reader.frame_count in (0, done) else f"{done} of {reader.frame_count} frames"
        return (
            f"{reader.name}: {reader.width} x {reader.height}{', turned upright' * reader.is_turned}, "
            f"{frames} in {seconds:.1f} s at {float(reader.frame_rate):.4g} a second"
            f"{', sound dropped' * (reader.has_sound and self.draw)}, {format_counts(labels, self.names)}; "
            f"{speed:.1f} frames per second"
        )


def batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items; the last one may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def open_video(source: Source) -> VideoReader:
    return VideoReader(source.path) if source.camera is None else VideoReader(camera=source.camera)


def check_videos(sources: Sequence[Source]) -> None:
    """UserError, before any work starts, if videos cannot be read at all or if one given by name cannot."""
    if any(source.is_video for source in sources):
        require_av()
    for source in sources:
        if source.is_video and source.is_named:
            open_video(source).close()


def check_output(output: Path, sources: Sequence[Source], *, draw: bool, write_txt: bool) -> None:
    """UserError if a drawn copy would overwrite a source, or a text file the labels of a picture."""
    originals = {source.path.resolve() for source in sources}
    for source in sources:
        writes = {drawn_path(output, source).resolve()} & originals if draw else set()
        if write_txt and not source.is_video:
            writes |= {text_path(output, source).resolve()} & labels_of(source.path)
        for path in writes:
            raise UserError(f"--output {output}: would overwrite {path}, expected another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, expected a folder")


def check_class_list(output: Path, names: Sequence[str]) -> None:
    """UserError where the folder of the text files lists other classes than those that their numbers would mean."""
    path = output / "labels" / CLASS_LIST
    if path.is_file():
        listed = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        found, expected = f"the classes {shortened(listed)} in {path}", f"{shortened(names)}, or another folder"
        expect(listed == list(names), f"--output {output}", found, expected)


def labels_of(picture: Path) -> set[Path]:
    """The label files of a picture that exist, in the layout of YOLO's datasets."""
    places = LabelFolders(Path("/")).choices(picture.absolute().parent)
    files = (place.labels / f"{picture.stem}.txt" for place in places)
    return {file.resolve() for file in files if file.is_file()}


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser("predict.py", __doc__)
    parser.add_argument("checkpoint", help="a checkpoint, a released file, a run, or a .onnx file")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="picture, video, folder, 'pattern' or webcam")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), metavar="DIR", help="folder to write to (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="write predictions.json")
    parser.add_argument("--txt", action="store_true", help="write labels/*.txt")
    parser.add_argument("--no-pictures", action="store_true", help="write no drawn copies")
    parser.add_argument("--arch", help="architecture of a released file that leaves it open")
    parser.add_argument("--image-size", type=int, help="side in pixels, a multiple of 32 (as trained)")
    parser.add_argument(
        "--score-threshold", type=fraction, default=0.25, help="drop detections with a lower score (%(default)s)"
    )
    parser.add_argument(
        "--nms-iou",
        type=fraction,
        help="IoU threshold of non-maximum suppression (as evaluated in the checkpoint's run)",
    )
    parser.add_argument("--max-detections", type=int, help="at most, in a picture (as evaluated in its run)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass (%(default)s)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="only the first N frames of each video")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0 (%(default)s)")
    precisions = ("auto", "float32", "bfloat16")
    parser.add_argument("--precision", choices=precisions, default="float32", help="of the model (%(default)s)")
    parser.add_argument("--show", action="store_true", help="show videos and webcams in a window; q ends it")
    parser.add_argument("--quiet", action="store_true", help="print only the totals and what was skipped")
    refuse_unknown("predict.py", argv, options_of(parser))
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_detections", "max_frames"):
        value = getattr(args, name)
        expect(value is None or value >= 1, f"argument --{name.replace('_', '-')}", value, "at least 1")
    if args.image_size is not None:
        check_image_size("argument --image-size", args.image_size)
    return args


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    sources = find_sources(args.sources)
    check_output(args.output, sources, draw=not args.no_pictures, write_txt=args.txt)
    expect(not args.show or any(source.is_video for source in sources), "--show", "pictures alone", "a video or webcam")
    # before the first import of av: on Linux OpenCV never returns from opening a window where av's libxcb is loaded
    window = Window("Retort: q ends it") if args.show else None
    check_videos(sources)
    device = choose_device(args.device)
    model, info = load_detector(args.checkpoint, args.arch, device=str(device))
    check_precision(model, args.precision)
    if args.txt:
        check_class_list(args.output, info.names)
    image_size = args.image_size or info.image_size
    if isinstance(model, OnnxDetector):
        model.check_size(image_size, image_size)
    check_suppression("argument --nms-iou", info.arch, args.nms_iou)
    given = {"score_threshold": args.score_threshold, "iou_threshold": args.nms_iou}
    detection = info.evaluation.detection.changed(max_detections=args.max_detections, **given)
    if info.plumbing:
        print(info.plumbing)
    if not args.quiet:
        print(
            f"{image_size} px, scores from {detection.score_threshold:g}, NMS IoU {detection.iou_threshold:g}, at most "
            f"{counted(detection.max_detections, 'detection')} a picture"
        )
    bfloat16 = use_bfloat16(args.precision, device)
    prediction = Prediction(
        Predictor(model, image_size=image_size, detection=detection, device=device, bfloat16=bfloat16),
        info.names,
        args.output,
        PredictionFiles(args.output, info.names, write_json=args.json, write_txt=args.txt),
        batch_size=args.batch_size,
        draw=not args.no_pictures,
        quiet=args.quiet,
        max_frames=args.max_frames,
        window=window,
    )
    try:
        with StopSignals() as stop, window or contextlib.nullcontext():
            totals = prediction.run(sources, stop)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.output}: could not be written: {error.strerror}", DISK_EXIT_CODE
        ) from None
    if stop.received:
        return stop.exit_code
    return 1 if totals.broken else 0


if __name__ == "__main__":
    run_script(main)
