"""datasets.download against a server on this machine: resuming, wrong sizes and hashes, archives that mean harm."""

import gzip
import hashlib
import importlib
import io
import json
import re
import stat
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import models
from datasets import download
from datasets.download import DATASETS, WEIGHTS, Archive, PublicDataset, fetch, main, unpack
from datasets.open import open_dataset
from errors import UserError

PIXELS = np.random.default_rng(0).bytes(300_000)


def test_the_command_is_not_imported_before_it_runs(monkeypatch):
    """Python warns in the first line of `python -m datasets.download` if its package has imported it already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("datasets")
    assert "datasets.open" in sys.modules and "datasets.download" not in sys.modules


def zip_bytes(members=(("top/data/a.bin", PIXELS), ("top/data/sub/b.txt", b"hello"))) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_bytes(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "" if kind == tarfile.REGTYPE else "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `files`. `cut`: bytes after which the connection closes, once. `ranges` False: Range is ignored."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cut: int | None = None
        self.ranges, self.lengths, self.range_offset = True, True, 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        if name not in server.files:
            self.send_error(404)
            return
        data, start = server.files[name], 0
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            first = start + server.range_offset
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.lengths:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if server.cut is not None:
            body, server.cut = body[: server.cut], None
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(server):
    """A published archive on the server."""
    data = zip_bytes()
    server.files["set.zip"] = data
    return Archive(server.url("set.zip"), len(data), "sha256:" + hashlib.sha256(data).hexdigest())


def quiet(_):
    pass


def test_fetch_unpack_and_manifest(server, archive, tmp_path):
    dataset = PublicDataset((archive,), "place/mine", "top/data")
    folder = download.download(dataset, tmp_path, say=quiet)
    assert folder == tmp_path / "place" / "mine" and (folder / "a.bin").read_bytes() == PIXELS
    assert (folder / "sub" / "b.txt").read_text() == "hello"
    manifest = json.loads((tmp_path / "downloads" / "manifest.json").read_text())
    row = manifest["set.zip"]
    assert (row["url"], row["bytes"], row["checked"]) == (archive.url, archive.bytes, archive.digest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "place"]  # nothing half done
    download.download(dataset, tmp_path, say=quiet)
    assert len(server.requests) == 1  # it is there already


def test_progress_is_said(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SAY_BYTES", 100_000)
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    said = []
    fetch(archive, tmp_path, say=said.append)
    assert said[0].startswith("fetching http") and len(said) == 1 + archive.bytes // 100_000


def test_several_archives_into_the_root_itself(server, tmp_path):
    archives = []
    for name, member in (("a.zip", "x/1.txt"), ("b.zip", "x/2.txt"), ("c.tar", "y/3.txt")):
        is_tar = name.endswith("tar")
        server.files[name] = tar_bytes([(member, tarfile.REGTYPE, b"1")]) if is_tar else zip_bytes([(member, b"1")])
        md5 = hashlib.md5(server.files[name]).hexdigest()
        archives.append(Archive(server.url(name), len(server.files[name]), f"md5:{md5}"))
    folder = download.download(PublicDataset(tuple(archives), "all"), tmp_path, say=quiet)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["x/1.txt", "x/2.txt", "y/3.txt"]


def test_a_single_file_is_put_in_its_folder_as_it_is(server, tmp_path):
    server.files["words.txt.gz"] = gzip.compress(b"one two\n")
    digest = hashlib.sha256(server.files["words.txt.gz"]).hexdigest()
    archive = Archive(server.url("words.txt.gz"), len(server.files["words.txt.gz"]), f"sha256:{digest}")
    folder = download.download(PublicDataset((archive,), "words"), tmp_path, say=quiet)
    assert [path.name for path in folder.iterdir()] == ["words.txt.gz"]
    assert (folder / "words.txt.gz").read_bytes() == server.files["words.txt.gz"]


def test_a_cut_download_goes_on_where_it_stopped(server, archive, tmp_path):
    server.cut = 100_000
    with pytest.raises(UserError, match=f"cut off at byte 100000 of {archive.bytes}; run again to go on"):
        fetch(archive, tmp_path, say=quiet)
    assert (tmp_path / "set.zip.part").stat().st_size == 100_000 and not (tmp_path / "set.zip").exists()
    path = fetch(archive, tmp_path, say=quiet)
    assert path.read_bytes() == server.files["set.zip"]
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-"]
    assert not (tmp_path / "set.zip.part").exists()


def test_a_server_without_ranges_starts_anew(server, archive, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert fetch(archive, tmp_path, say=quiet).read_bytes() == server.files["set.zip"]


def test_a_wrong_range_is_refused(server, archive, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(server.files["set.zip"][:1000])
    server.range_offset = 5
    with pytest.raises(UserError, match="answered with the range"):
        fetch(archive, tmp_path, say=quiet)


def test_a_part_of_another_file_is_noticed_and_removed(server, archive, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"sha256 .*, expected"):
        fetch(archive, tmp_path, say=quiet)
    assert not (tmp_path / "set.zip.part").exists()
    assert fetch(archive, tmp_path, say=quiet).read_bytes() == server.files["set.zip"]


def test_a_complete_part_needs_no_request(server, archive, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(server.files["set.zip"])
    fetch(archive, tmp_path, say=quiet)
    assert not server.requests and (tmp_path / "set.zip").exists()


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_wrong_hash(server, archive, tmp_path, kind):
    wrong = Archive(archive.url, archive.bytes, f"{kind}:" + "0" * 64)
    with pytest.raises(UserError, match=f"{kind} .*, expected 0000"):
        fetch(wrong, tmp_path, say=quiet)
    assert not list(tmp_path.glob("set*"))


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("change", [-10, 10])
def test_a_wrong_size(server, archive, tmp_path, change, lengths):
    server.lengths = lengths
    wrong = Archive(archive.url, archive.bytes + change, archive.digest)
    with pytest.raises(UserError, match=f"expected {wrong.bytes}|of {wrong.bytes}|more than {wrong.bytes}"):
        fetch(wrong, tmp_path, say=quiet)
    assert not (tmp_path / "set.zip").exists()


def test_a_damaged_archive_on_disk_is_noticed(server, archive, tmp_path):
    path = fetch(archive, tmp_path, say=quiet)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="delete it to fetch it again"):
        fetch(archive, tmp_path, say=quiet)


def test_without_a_published_hash_the_first_digest_counts(server, archive, tmp_path):
    unknown = Archive(server.url("set.zip"), saved_as="other.zip")
    server.cut = 1000
    with pytest.raises(UserError, match="run again to start anew"):
        fetch(unknown, tmp_path, say=quiet)
    path = fetch(unknown, tmp_path, say=quiet)
    assert path.name == "other.zip" and [wanted for _, wanted in server.requests] == [None, None]  # never two halves
    row = json.loads((tmp_path / "manifest.json").read_text())["other.zip"]
    assert row["sha256"] == archive.digest.removeprefix("sha256:") and row["checked"] == "recorded on first download"
    path.unlink()
    server.files["set.zip"] = zip_bytes([("top/data/other", b"1")])
    with pytest.raises(UserError, match="recorded in"):
        fetch(unknown, tmp_path, say=quiet)


def test_an_unknown_size_has_a_limit(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNKNOWN_BYTES", 1000)
    with pytest.raises(UserError, match="more than 1000 bytes"):
        fetch(Archive(archive.url), tmp_path, say=quiet)
    assert not (tmp_path / "set.zip").exists()


def test_no_server_and_no_file(server, archive, tmp_path):
    with pytest.raises(UserError, match="Not Found"):
        fetch(Archive(server.url("none.zip"), 10, "md5:0"), tmp_path, say=quiet)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"refused|at byte 0"):
        fetch(archive, tmp_path, say=quiet)


def test_a_full_disk_is_noticed_before(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="100 bytes free") as caught:
        fetch(archive, tmp_path, say=quiet)
    assert caught.value.exit_code == 5 and not server.requests


def zip_with(name: str, mode: int = stat.S_IFREG | 0o644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, b"/etc/passwd")
    return buffer.getvalue()


HOSTILE = {
    "parent.zip": zip_with("../out.txt"),
    "deep_parent.zip": zip_with("a/../../out.txt"),
    "absolute.zip": zip_with("/tmp/out.txt"),
    "backslash.zip": zip_with("..\\out.txt"),
    "link.zip": zip_with("link", stat.S_IFLNK | 0o777),
    "bomb.zip": zip_bytes([("zeros", bytes(50_000_000))]),
    "cut.zip": zip_bytes()[:-30],
    "no.zip": b"<html>",
    "parent.tar": tar_bytes([("../out.txt", tarfile.REGTYPE, b"x")]),
    "absolute.tar": tar_bytes([("/tmp/out.txt", tarfile.REGTYPE, b"x")]),
    "symlink.tar": tar_bytes([("link", tarfile.SYMTYPE, b"")]),
    "hardlink.tar": tar_bytes([("link", tarfile.LNKTYPE, b"")]),
    "device.tar": tar_bytes([("device", tarfile.CHRTYPE, b"")]),
    "cut.tar": tar_bytes([("a", tarfile.REGTYPE, PIXELS)])[:2000],
    "no.tar": b"<html>" * 1000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_archives_that_mean_harm(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=name):
        unpack(path, tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out.txt").exists() and not (tmp_path / "out.txt").exists()
    assert not any(item.is_symlink() for item in tmp_path.rglob("*"))


def test_a_broken_archive_leaves_no_dataset(server, tmp_path):
    data = HOSTILE["link.zip"]
    server.files["bad.zip"] = data
    archive = Archive(server.url("bad.zip"), len(data), "sha256:" + hashlib.sha256(data).hexdigest())
    with pytest.raises(UserError):
        download.download(PublicDataset((archive,), "bad"), tmp_path, say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    with pytest.raises(UserError, match="no folder elsewhere inside"):
        server.files["good.zip"] = zip_bytes()
        digest = "sha256:" + hashlib.sha256(server.files["good.zip"]).hexdigest()
        good = Archive(server.url("good.zip"), len(server.files["good.zip"]), digest)
        download.download(PublicDataset((good,), "good", "elsewhere"), tmp_path, say=quiet)


def test_the_table_of_datasets():
    names = {"bccd", "voc2007", "voc2012", "coco2017", "kitti", "clip_vocabulary", *WEIGHTS}
    assert set(DATASETS) == names
    digests = [archive.digest for dataset in DATASETS.values() for archive in dataset.archives]
    unknown = {name for name, dataset in DATASETS.items() if any(a.digest is None for a in dataset.archives)}
    assert unknown == {
        *("bccd", "rtdetr_x", "rtdetr_r18vd", "rtdetr_r50vd"),  # BCCD's archive is made on demand
        *(f"yolov5{size}u" for size in "nsmlx"),
        *(f"dinov2_vit{size}14_reg" for size in "sbl"),
    }
    assert len(set(digests) - {None}) == len(digests) - digests.count(None)  # no two files have one hash
    for digest in filter(None, digests):
        kind, _, value = digest.partition(":")
        assert len(bytes.fromhex(value)) in {"md5": (16,), "sha256": (4, 32)}[kind]  # or its first digits
    for dataset in DATASETS.values():
        for archive in dataset.archives:
            assert archive.filename.endswith((".zip", ".tar", *download.SINGLE_FILES))


def test_weights_are_named_by_their_hash():
    """Torchvision and DeiT put the first digits of a file's SHA-256 into its name, OpenAI all of them before it."""
    named = [name for name, file in WEIGHTS.items() if "download.pytorch.org" in file.url or name == "deit_tiny"]
    assert len(named) == 10
    for name in named:
        digest = WEIGHTS[name].digest.removeprefix("sha256:")
        assert WEIGHTS[name].filename.endswith(f"-{digest[:8]}.pth")
    for name in ("clip_vit_b32", "clip_vit_b16"):
        assert WEIGHTS[name].digest.removeprefix("sha256:") in WEIGHTS[name].url
    assert DATASETS["resnet18"].folder == "weights/resnet18"


def test_a_released_file_of_the_table(shared_data):
    """The hash and the size in the table are those of a released file that is at hand."""
    path = shared_data / "public_weights" / "yolov5n_coco_v6.1.pt"
    if not path.is_file():
        pytest.skip("no released YOLOv5n among the small real data")
    assert WEIGHTS["yolov5n"].bytes == path.stat().st_size
    assert WEIGHTS["yolov5n"].digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_every_architecture_that_was_released_is_in_the_table():
    families = re.compile(r"(yolov8|yolov5)[nsmlx]u?|rtdetr_.*|dinov2_.*|clip_.*")
    released = {name for name in (*models.ARCHITECTURES, *models.TEACHERS) if families.fullmatch(name)}
    assert len(released) == 27 and released <= set(WEIGHTS)


def test_first_digits_of_a_hash(server, tmp_path):
    server.files["model-abc.pth"] = b"weights"
    digits = hashlib.sha256(b"weights").hexdigest()[:8]
    right, wrong = (Archive(server.url("model-abc.pth"), None, f"sha256:{d}") for d in (digits, digits[::-1]))
    with pytest.raises(UserError, match=f"expected {digits[::-1]} "):
        fetch(wrong, tmp_path, say=quiet)
    assert fetch(right, tmp_path, say=quiet).read_bytes() == b"weights"


def test_weights_are_put_in_their_folder_as_they_are(server, tmp_path):
    server.files["model-abc.pth"] = b"weights"
    archive = Archive(server.url("model-abc.pth"), None, f"sha256:{hashlib.sha256(b'weights').hexdigest()}")
    folder = download.download(PublicDataset((archive,), "weights/model"), tmp_path, say=quiet)
    assert (folder / "model-abc.pth").read_bytes() == b"weights"


def test_dry_run_fetches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", None)
    assert main(["voc2007", "resnet18", "--root", str(tmp_path / "data"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "VOCtrainval_06-Nov-2007.tar  460.0 MB  md5:c52e2795" in printed and "resnet18-f37072fd.pth" in printed
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("folder", "format", "names"),
    [
        ("bccd", "voc", "bccd"),
        ("VOCdevkit", "voc", "voc2007 voc2012"),
        ("coco", "coco", "coco2017"),
        ("mine", "yolo", ""),
        ("coco", "voc", ""),
        ("clip", "voc", ""),
    ],
)
def test_a_set_that_is_not_there_says_how_to_fetch_it(folder, format, names, tmp_path):
    with pytest.raises(UserError) as error:
        open_dataset(format, tmp_path / folder, "train")
    advice = f" (python -m datasets.download {names} --root {tmp_path})" if names else ""
    assert str(error.value) == f"{tmp_path / folder}: no such file or folder, expected a {format} dataset{advice}"
