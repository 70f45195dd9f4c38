"""video.py: times, turns, sound, damage and ends of files read; what is written can be read again, or is not there."""

import itertools
import resource
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import errors
from engine.prediction import video
from errors import UserError

av = pytest.importorskip("av")
from tests.engine.prediction.tiny_video import HEIGHT, WIDTH, damage, moving_red, packet_places, write_video  # noqa: E402

NTSC = Fraction(30000, 1001)
ENCODERS = [name for name in video.ENCODERS if name in av.codecs_available]


def red_box(pixels: np.ndarray) -> list[int]:
    """x1, y1, x2, y2 of what is red."""
    is_red = (pixels[:, :, 0] > 190) & (pixels[:, :, 1:] < 90).all(-1)
    y, x = is_red.nonzero()
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def write(path, frames, ticks=None, *, time_base=Fraction(1, 1000), frame_rate=Fraction(25), **options):
    height, width = frames[0].shape[:2]
    with video.VideoWriter(
        path, width=width, height=height, frame_rate=frame_rate, time_base=time_base, **options
    ) as writer:
        for number, pixels in enumerate(frames):
            writer.write(pixels, ticks[number] if ticks else 40 * number)


def times(path) -> list[float]:
    with video.VideoReader(path) as reader:
        return [frame.seconds for frame in reader]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov", "a.ts", "a:b.mp4"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_reads_every_frame_in_order(tmp_path, monkeypatch, name, encoder):
    monkeypatch.chdir(tmp_path)  # a relative a:b.mp4 looks like an address
    write_video(Path(name), [moving_red(n) for n in range(9)], encoder=encoder)
    with video.VideoReader(Path(name)) as reader:
        assert (reader.width, reader.height, reader.has_sound, reader.is_turned) == (WIDTH, HEIGHT, False, False)
        frames = list(reader)
        assert (reader.broken, reader.first_fault) == (0, "")
    assert [frame.number for frame in frames] == list(range(9))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(9) / 25, atol=1e-3)
    for frame in frames:
        assert frame.pixels.shape == (HEIGHT, WIDTH, 3) and frame.pixels.dtype == np.uint8
        np.testing.assert_allclose(red_box(frame.pixels), np.add([8, 16, 48, 48], [2 * frame.number, 0] * 2), atol=2)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_written_frame_is_shown_when_it_was(tmp_path, encoder):
    """Uneven times in the source's own time base, from file to file, and colours that survive it."""
    ticks = [0, 1001, 2002, 9009, 9010, 30030]
    write(
        tmp_path / "out.mp4",
        [moving_red(n) for n in range(6)],
        ticks,
        time_base=Fraction(1, 30000),
        frame_rate=NTSC,
        encoder=encoder,
    )
    assert times(tmp_path / "out.mp4") == [tick / 30000 for tick in ticks]
    with video.VideoReader(tmp_path / "out.mp4") as reader:
        for frame in reader:
            np.testing.assert_allclose(
                frame.pixels[20:44, 20 + 2 * frame.number : 40].mean((0, 1)), [255, 0, 0], atol=6
            )
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_the_frame_rate_is_kept(tmp_path):
    for rate in (NTSC, Fraction(24000, 1001), Fraction(25), Fraction(60)):
        write(tmp_path / "out.mp4", [moving_red(n) for n in range(5)], range(5), time_base=1 / rate, frame_rate=rate)
        with video.VideoReader(tmp_path / "out.mp4") as reader:
            assert reader.frame_rate == rate and reader.frame_count == 5


def test_mpeg4_rounds_times_finer_than_its_own(tmp_path):
    ticks = [0, 3, 333_333, 1_000_000]  # the first two fall together, and are shown one after the other
    write(
        tmp_path / "out.mp4",
        [moving_red(n) for n in range(4)],
        ticks,
        time_base=Fraction(1, 1_000_000),
        encoder="mpeg4",
    )
    np.testing.assert_allclose(times(tmp_path / "out.mp4"), np.array(ticks) / 1e6, atol=2 / 65535)


@pytest.mark.parametrize("size", [(97, 161), (1, 1), (96, 160), (33, 64)])
def test_odd_sizes_get_a_copy_of_their_edge(tmp_path, size):
    height, width = size
    pixels = np.full((height, width, 3), (200, 60, 30), np.uint8)
    write(tmp_path / "out.mp4", [pixels, pixels])
    with video.VideoReader(tmp_path / "out.mp4") as reader:
        assert (reader.height, reader.width) == (height + height % 2, width + width % 2)
        assert np.abs(next(iter(reader)).pixels.astype(int) - (200, 60, 30)).max() <= 9


def test_a_frame_of_another_size_is_scaled(tmp_path):
    first = moving_red(0)
    with video.VideoWriter(
        tmp_path / "out.mp4", width=WIDTH, height=HEIGHT, frame_rate=Fraction(25), time_base=Fraction(1, 25)
    ) as writer:
        writer.write(first, 0)
        writer.write(first.repeat(2, 0).repeat(2, 1), 1)
    with video.VideoReader(tmp_path / "out.mp4") as reader:
        for frame in reader:
            np.testing.assert_allclose(red_box(frame.pixels), [8, 16, 48, 48], atol=2)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_turned_videos_stand_upright(tmp_path, degrees):
    """A display matrix of `degrees` counter-clockwise, as a phone held upright writes it."""
    shown = moving_red(0)
    stored = np.ascontiguousarray(np.rot90(shown, -degrees // 90))
    path = write_video(tmp_path / "turned.mp4", [stored] * 2, degrees=degrees)
    with video.VideoReader(path) as reader:
        assert (reader.width, reader.height, reader.is_turned) == (WIDTH, HEIGHT, True)
        for frame in reader:
            np.testing.assert_allclose(red_box(frame.pixels), red_box(shown), atol=2)


def test_the_eight_display_matrices():
    """A stored point (x, y) is shown at (x, y) @ matrix, up to a shift: asked of three points one by one."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for (a, d), is_transposed in itertools.product(itertools.product([1, -1], [1, -1]), [False, True]):
        linear = np.array([[0, a], [d, 0]] if is_transposed else [[a, 0], [0, d]])
        matrix = np.zeros((3, 3), np.int32)
        matrix[:2, :2], matrix[2, 2] = linear * 65536, 2**30
        shown = video.turn(pixels, matrix)
        points = np.array([(x, y) for y in range(2) for x in range(3)])
        places = points @ linear
        places -= places.min(0)
        for (x, y), (to_x, to_y) in zip(points, places):
            assert (shown[to_y, to_x] == pixels[y, x]).all()
    assert video.turn(pixels, np.diag([65536, 65536, 2**30])) is pixels
    nearly = np.array([[60000, 26000, 0], [-26000, 60000, 0], [0, 0, 2**30]])
    assert video.turn(pixels, nearly) is pixels


def test_sound_is_noticed(tmp_path):
    path = write_video(tmp_path / "sound.mp4", [moving_red(n) for n in range(3)], sound=True)
    with video.VideoReader(path) as reader:
        assert reader.has_sound and len(list(reader)) == 3


def test_pixel_shape_is_kept_and_turned(tmp_path):
    write(tmp_path / "out.mp4", [moving_red(0)], pixel_shape=Fraction(16, 11))
    with video.VideoReader(tmp_path / "out.mp4") as reader:
        assert reader.pixel_shape == Fraction(16, 11)
    for degrees in (90, 180):
        path = write_video(tmp_path / "turned.mp4", [moving_red(0)], degrees=degrees, pixel_shape=Fraction(16, 11))
        with video.VideoReader(path) as reader:
            assert reader.pixel_shape == (Fraction(16, 11) if degrees == 180 else Fraction(11, 16))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_damaged_picture_is_counted_and_skipped(tmp_path, encoder):
    path = write_video(tmp_path / "a.mp4", [moving_red(n) for n in range(12)], encoder=encoder)
    damage(path, packet=5)
    with video.VideoReader(path) as reader:
        frames = list(reader)
        assert reader.broken >= 1 and reader.first_fault
        assert len(frames) + reader.broken <= 13 and len(frames) >= 9
    moments = [frame.ticks for frame in frames]
    assert moments == sorted(set(moments)) and frames[-1].seconds == pytest.approx(11 / 25)


def test_a_cut_file_ends_early(tmp_path):
    path = write_video(tmp_path / "a.ts", [moving_red(n) for n in range(12)])
    path.write_bytes(path.read_bytes()[: packet_places(path)[7][0]])
    with video.VideoReader(path) as reader:
        assert 6 <= len(list(reader)) <= 8


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_file_that_cannot_be_followed_gives_what_the_decoder_still_holds(tmp_path, monkeypatch, encoder):
    path = write_video(tmp_path / "a.mp4", [moving_red(n) for n in range(12)], encoder=encoder)
    open_file = video.VideoReader._open

    class Broken:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            yield from itertools.islice(self.container.demux(stream), 7)
            raise av.InvalidDataError(-1, "Invalid data", "av_read_frame()")

    monkeypatch.setattr(video.VideoReader, "_open", lambda self, path: Broken(open_file(self, path)))
    with video.VideoReader(path) as reader:
        assert len(list(reader)) == 7 and (reader.broken, reader.first_fault) == (1, "Invalid data")


def test_frames_without_times_and_clocks_set_back():
    reader = object.__new__(video.VideoReader)
    reader._last, reader._offset, reader.frame_rate, reader.time_base = None, 0, Fraction(25), Fraction(1, 1000)
    stamps = [500, 540, None, 620, 620, 100, 170, None]
    assert [reader._tick(pts) for pts in stamps] == [0, 40, 80, 120, 160, 200, 270, 310]


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("kind", ["words", "empty", "cut", "sound", "playlist", "concat", "headers", "absent"])
def test_what_is_no_video_is_one_line(tmp_path, kind):
    good = write_video(tmp_path / "good.mp4", [moving_red(n) for n in range(3)], sound=True)
    path = tmp_path / "bad.mp4"
    if kind == "words":
        path.write_text("these are words\n" * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(good.read_bytes()[:2000])
    elif kind == "sound":
        with av.open(str(good)) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    elif kind == "playlist":
        write_video(tmp_path / "part.ts", [moving_red(n) for n in range(3)])
        path.write_text(PLAYLIST.format("part.ts"))
    elif kind == "concat":
        path.write_text("ffconcat version 1.0\nfile good.mp4\n")
    elif kind == "headers":
        data = bytearray(good.read_bytes())
        for start, size in packet_places(good):
            data[start : start + size] = bytes(size)
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.mp4: .*expected a video") as error:
        video.VideoReader(path)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_frames_too_large_are_refused_before_decoding(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [moving_red(0)])
    monkeypatch.setattr(video, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(UserError, match="160 x 96, expected at most 15,359 pixels"):
        video.VideoReader(path)


def test_no_camera_is_one_line(monkeypatch):
    monkeypatch.setattr(video, "CAMERA_PATH", "/dev/no-such-camera-{}")
    with pytest.raises(UserError, match=r"webcam:3: /dev/no-such-camera-3: .*expected a camera"):
        video.VideoReader(camera=3)
    monkeypatch.setattr(video, "CAMERA_FORMAT", "no-such-format")
    with pytest.raises(UserError, match="expected one with Video4Linux"):
        video.VideoReader(camera=0)


def test_no_pyav_says_what_to_install(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [moving_red(0)])
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(errors.UserError, match=r"video needs the package 'av': pip install '\.\[video\]'"):
        video.VideoReader(path)


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_and_an_interrupt_a_video(tmp_path, stop):
    with pytest.raises(stop):
        with video.VideoWriter(
            tmp_path / "deep" / "out.mp4", width=64, height=64, frame_rate=Fraction(25), time_base=Fraction(1, 25)
        ) as writer:
            for number in range(5):
                writer.write(np.full((64, 64, 3), 40 * number, np.uint8), number)
            raise stop
    left = [path.name for path in (tmp_path / "deep").iterdir()]
    assert left == (["out.mp4"] if stop is KeyboardInterrupt else [])
    if left:
        assert len(times(tmp_path / "deep" / "out.mp4")) == 5


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3)).astype(np.uint8)
    (tmp_path / "out.mp4").write_bytes(b"an older one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"out\.mp4: could not be written: ") as error:
            write(tmp_path / "out.mp4", list(noise))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.exit_code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"an older one"
