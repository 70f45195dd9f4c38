"""predict.py on video: each frame's boxes and text, the filmed copy, damage, Ctrl-C, webcams, what is refused first."""

import json
import os
import signal
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import checkpoint
import predict
from checkpoint import CheckpointInfo
from engine.prediction import sources, video
from engine.runtime import progress
from errors import UserError

av = pytest.importorskip("av")
from tests.engine.prediction.colour_detector import NAMES, ColourDetector  # noqa: E402
from tests.engine.prediction.tiny_video import HEIGHT, WIDTH, damage, moving_red, write_video  # noqa: E402

needs_lavfi = pytest.mark.skipif("lavfi" not in av.formats_available, reason="FFmpeg was built without lavfi")


@pytest.fixture
def colour_model(monkeypatch):
    info = CheckpointInfo("colours", NAMES, 160)
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **kwargs: (ColourDetector(), info))


@pytest.fixture
def clip(tmp_path):
    """Ten frames at 30000/1001 a second, the last four held longer."""
    ticks = [1001 * n + 9009 * (n > 5) for n in range(10)]
    frames = [moving_red(n) for n in range(10)]
    rate, time_base = Fraction(30000, 1001), Fraction(1, 30000)
    path = tmp_path / "in" / "clip.mp4"
    path.parent.mkdir()
    return write_video(path, frames, ticks=ticks, rate=rate, time_base=time_base, sound=True)


def seconds_of(path) -> list[float]:
    with video.VideoReader(path) as reader:
        return [frame.seconds for frame in reader]


def run(*arguments: object) -> int:
    return predict.main(["weights.pt", *map(str, arguments)])


def test_writes_the_filmed_copy_json_and_text(clip, tmp_path, colour_model, capsys):
    out = tmp_path / "out"
    assert run(clip, "--output", out, "--json", "--txt", "--batch-size", 4) == 0
    said = capsys.readouterr().out
    assert f"{clip}: 160 x 96, 10 frames in 0.6 s" in said and "sound dropped, 10 red thing" in said
    assert "frames per second" in said
    assert "\n10 frames of 1 video, 10 detections (10 red thing), 0 skipped" in said
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(
        ["clip.mp4", "predictions.json", "labels/classes.txt", *(f"labels/clip.mp4/{n:06d}.txt" for n in range(10))]
    )

    assert seconds_of(out / "clip.mp4") == seconds_of(clip)
    with video.VideoReader(out / "clip.mp4") as drawn, video.VideoReader(clip) as source:
        assert not drawn.has_sound and source.has_sound
        for frame, original in zip(drawn, source):
            difference = np.abs(frame.pixels.astype(int) - original.pixels).mean(-1)
            x = 8 + 2 * frame.number
            assert difference[20:44, x + 4 : x + 36].mean() < 12  # the red is still there
            assert difference[:16, x : x + 40].max() > 80  # and a label above it

    rows = json.loads((out / "predictions.json").read_text())
    assert [(row["image_id"], row["frame"]) for row in rows] == [(n + 1, n) for n in range(10)]
    np.testing.assert_allclose([row["seconds"] for row in rows], seconds_of(clip), atol=1e-6)
    for row in rows:
        np.testing.assert_allclose(row["bbox"], [8 + 2 * row["frame"], 16, 40, 32], atol=3)
        assert row["file_name"] == str(clip)
        label, *box, score = map(float, (out / f"labels/clip.mp4/{row['frame']:06d}.txt").read_text().split())
        x, y, width, height = row["bbox"]
        np.testing.assert_allclose(
            box, [(x + width / 2) / 160, (y + height / 2) / 96, width / 160, height / 96], atol=1e-4
        )
        assert (label, score) == (0, pytest.approx(0.9))


def test_pictures_and_videos_of_a_folder_share_one_count(clip, tmp_path, colour_model, capsys):
    Image.fromarray(moving_red(0)).save(clip.parent / "a.png")
    Image.fromarray(moving_red(1)).save(clip.parent / "z.png")
    (clip.parent / "broken.mkv").write_text("words")
    out = tmp_path / "out"
    assert run(clip.parent, "--output", out, "--json", "--max-frames", 3, "--quiet") == 1
    said = capsys.readouterr().out
    assert f"skipped: {clip.parent / 'broken.mkv'}: " in said
    assert "2 pictures, 3 frames of 1 video, 5 detections (5 red thing), 1 skipped" in said
    rows = json.loads((out / "predictions.json").read_text())
    assert [(row["image_id"], row.get("frame")) for row in rows] == [(1, None), (2, 0), (3, 1), (4, 2), (5, None)]
    assert {path.name for path in out.iterdir()} == {"a.jpg", "clip.mp4", "z.jpg", "predictions.json"}


def test_a_turned_video_is_drawn_upright(tmp_path, colour_model):
    stored = np.ascontiguousarray(np.rot90(moving_red(0), -1))
    path = write_video(tmp_path / "phone.mov", [stored] * 3, degrees=90)
    assert run(path, "--output", tmp_path / "out", "--json") == 0
    with video.VideoReader(tmp_path / "out" / "phone.mp4") as reader:
        assert (reader.width, reader.height, reader.is_turned) == (WIDTH, HEIGHT, False)
        assert reader.frame_rate == 25 and reader.frame_count == 3
    for row in json.loads((tmp_path / "out" / "predictions.json").read_text()):
        np.testing.assert_allclose(row["bbox"], [8, 16, 40, 32], atol=3)


def test_broken_frames_are_counted_and_skipped(tmp_path, colour_model, capsys):
    encoder = next(name for name in video.ENCODERS if name in av.codecs_available)
    path = write_video(tmp_path / "a.mp4", [moving_red(n) for n in range(12)], encoder=encoder)
    damage(path, packet=5)
    assert run(path, "--output", tmp_path / "out", "--txt") == 1
    said = capsys.readouterr().out
    with video.VideoReader(path) as reader:
        good = list(reader)
    assert f"{len(good)} of 12 frames" in said and f"{path}: {reader.broken} broken frame" in said
    assert f", {reader.broken} skipped, " in said
    assert len(list((tmp_path / "out" / "labels" / "a.mp4").glob("*.txt"))) == len(good)
    assert seconds_of(tmp_path / "out" / "a.mp4") == [frame.seconds for frame in good]


@needs_lavfi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_webcam_runs_until_it_is_stopped_and_leaves_a_video(tmp_path, colour_model, monkeypatch, number, capsys):
    """An endless picture of FFmpeg's own stands for the camera; the third frame comes with Ctrl-C."""
    monkeypatch.setattr(video, "CAMERA_FORMAT", "lavfi")
    monkeypatch.setattr(video, "CAMERA_PATH", "color=c=red:size=64x48:rate=10,split[a][out];[a]nullsink")
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    seen = []

    class Interrupted(ColourDetector):
        def forward(self, images):
            seen.append(len(images))
            if len(seen) == 3:
                os.kill(os.getpid(), number)
            return super().forward(images)

    monkeypatch.setattr(checkpoint, "load_model", lambda *a, **k: (Interrupted(), CheckpointInfo("c", NAMES, 64)))
    Image.fromarray(moving_red(0)).save(tmp_path / "later.png")
    out = tmp_path / "out"
    assert run("webcam:0", "webcam:1", tmp_path / "later.png", "--output", out, "--json") == 128 + number
    said = capsys.readouterr().out
    assert "webcam:0  frame 2  frames per second " in said and "webcam:0: 64 x 48, 3 frames" in said
    assert seen == [1, 1, 1] and len(json.loads((out / "predictions.json").read_text())) == 3
    np.testing.assert_allclose(seconds_of(out / "webcam-0.mp4"), [0, 0.1, 0.2], atol=1e-3)
    assert {path.name for path in out.iterdir()} == {"webcam-0.mp4", "predictions.json"}


@needs_lavfi
def test_max_frames_ends_a_webcam(tmp_path, colour_model, monkeypatch):
    monkeypatch.setattr(video, "CAMERA_FORMAT", "lavfi")
    monkeypatch.setattr(video, "CAMERA_PATH", "testsrc=size=64x48:rate=10")
    assert run("webcam", "--output", tmp_path / "out", "--max-frames", 4, "--quiet") == 0
    assert len(seconds_of(tmp_path / "out" / "webcam-0.mp4")) == 4


def test_what_cannot_be_looked_at_is_refused_before_the_model_is_read(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **kwargs: pytest.fail("read the model"))
    (tmp_path / "words.mp4").write_text("words")
    monkeypatch.setattr(video, "CAMERA_PATH", "/dev/no-such-camera-{}")
    for source, message in (("words.mp4", "expected a video"), ("webcam:7", "expected a camera"), ("none", "no such")):
        place = source if source.startswith("webcam") else tmp_path / source
        with pytest.raises(UserError, match=message) as error:
            run(clip, place, "--output", tmp_path / "out")
        assert error.value.exit_code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="would overwrite"):
        run(clip, "--output", clip.parent)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    for source in (clip, clip.parent):  # a folder too: what is missing is no fault of each of its videos
        with pytest.raises(UserError, match=r"pip install '\.\[video\]'"):
            run(source, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_the_middle_leaves_no_half_files(clip, tmp_path, colour_model, monkeypatch):
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("drawing broke")
        return Image.fromarray(args[0])

    monkeypatch.setattr(predict, "draw_detections", fail)
    with pytest.raises(RuntimeError, match="drawing broke"):
        run(clip, "--output", tmp_path / "out", "--json")
    assert list((tmp_path / "out").iterdir()) == []


def test_finds_videos_and_webcams(clip, tmp_path, monkeypatch):
    Image.fromarray(moving_red(0)).save(clip.parent / "clip.png")
    (clip.parent / "B.MOV").write_bytes(b"")
    found = sources.find_sources([str(clip.parent), "webcam", "webcam:2", "webcam:0", str(clip)])
    assert [(str(s.name), s.is_video, s.is_named, s.camera) for s in found] == [
        ("B", True, False, None),
        ("clip", True, False, None),
        ("clip-2", False, False, None),
        ("webcam-0", True, True, 0),
        ("webcam-2", True, True, 2),
    ]
    assert [s.path.name for s in sources.find_pictures([str(clip.parent)])] == ["clip.png"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "webcam").mkdir()
    with pytest.raises(UserError, match="webcam: holds no picture"):
        sources.find_sources(["webcam"])


class FakeOpenCV(types.ModuleType):
    """cv2, as far as a window needs it; `q` is pressed at frame `quit_at`, or the window is closed at `close_at`."""

    WINDOW_NORMAL, WINDOW_KEEPRATIO, WINDOW_GUI_NORMAL, WND_PROP_VISIBLE = 0, 0, 16, 4
    error = RuntimeError

    def __init__(self, quit_at: int = -1, close_at: int = -1) -> None:
        super().__init__("cv2")
        self.shown: list[np.ndarray] = []
        self.sizes: list[tuple[int, int]] = []
        self.quit_at, self.close_at, self.is_open = quit_at, close_at, False

    def namedWindow(self, title, flags):
        self.is_open = True

    def resizeWindow(self, title, width, height):
        self.sizes.append((width, height))

    def imshow(self, title, pixels):
        self.shown.append(pixels)

    def waitKey(self, milliseconds):
        return ord("q") if len(self.shown) == self.quit_at else -1

    def getWindowProperty(self, title, number):
        return float(len(self.shown) != self.close_at)

    def destroyAllWindows(self):
        self.is_open = False


@pytest.mark.parametrize(("keys", "frames"), [({"quit_at": 3}, 3), ({"close_at": 2}, 2), ({}, 10)])
def test_show(keys, frames, clip, tmp_path, colour_model, monkeypatch, capsys):
    """What is written is what was shown, up to where the window was closed; a second video is then left out."""
    fake = FakeOpenCV(**keys)
    monkeypatch.setitem(sys.modules, "cv2", fake)
    monkeypatch.setenv("DISPLAY", ":0")
    check = predict.check_videos
    was_open = []  # OpenCV hangs in opening its window where av was imported before
    monkeypatch.setattr(predict, "check_videos", lambda sources: was_open.append(fake.is_open) or check(sources))
    second = tmp_path / "z.mp4"
    second.write_bytes(clip.read_bytes())
    assert run(clip, second, "--output", tmp_path / "out", "--show", "--max-frames", 10) == 0
    assert len(fake.shown) == (frames if keys else 20) and not fake.is_open
    assert was_open == [True]
    assert fake.sizes == [fake.shown[0].shape[1::-1]]
    assert len(seconds_of(tmp_path / "out" / "clip.mp4")) == frames
    assert (tmp_path / "out" / "z.mp4").exists() != bool(keys)
    blue, _, red = fake.shown[0][20:44, 12:44].reshape(-1, 3).mean(0)  # OpenCV's order
    assert red > 150 > blue
    assert "frames per second" in capsys.readouterr().out


def test_show_says_what_is_missing(clip, tmp_path, colour_model, monkeypatch):
    Image.fromarray(moving_red(0)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--show: found pictures alone"):
        run(tmp_path / "a.png", "--output", tmp_path / "out", "--show")
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"a window \(--show\) needs the package 'cv2': pip install '\.\[window\]'"):
        run(clip, "--output", tmp_path / "out", "--show")
    headless = FakeOpenCV()
    monkeypatch.setitem(sys.modules, "cv2", headless)
    monkeypatch.setenv("DISPLAY", ":0")

    def refuse(*args):
        raise RuntimeError("The function is not implemented. Rebuild the library")

    monkeypatch.setattr(headless, "namedWindow", refuse)
    with pytest.raises(UserError, match=r"needs OpenCV with its windows: pip install '\.\[window\]'"):
        run(clip, "--output", tmp_path / "out", "--show")
    if sys.platform == "linux":
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        with pytest.raises(UserError, match="there is no display"):
            run(clip, "--output", tmp_path / "out", "--show")
    assert not (tmp_path / "out").exists()
