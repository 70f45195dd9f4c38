"""Fetch public datasets, and the weights of foundation models, backbones and detectors. No other command fetches any.

    python -m datasets.download NAME [NAME ...] --root data [--dry-run]

Sizes and hashes are checked where they are publicly known. Their sources:

    VOC                        MD5 sums that torchvision publishes
    COCO, KITTI                sizes and SHA-256 sums that TensorFlow Datasets publishes
    the vocabulary             the file in CLIP's released code
    CLIP                       the hash in the address
    torchvision, DeiT          the first digits in the file name; the others, and sizes, recorded by others
    YOLOv8, YOLOv5, RT-DETR-L  recorded by others, of the files of these releases; YOLOv5n's also by us
    DINOv2                     recorded by others

No digest is known for BCCD, an archive made on demand, for YOLOv5u, the other RT-DETRs, and DINOv2 with registers;
--dry-run says so. The digest of the first download is recorded, and a later download with another one is refused.

An interrupted download continues (HTTP Range) if its size and hash are known. Otherwise it starts again: a file made of
two different halves would go unnoticed. Archives and manifest.json (url, bytes, sha256 of each) are kept in
<root>/downloads. A dataset is unpacked beside its place and moved there when it is complete.

    name      folder of pictures and labels              open_dataset(...)
    bccd      <root>/bccd                                "voc", "<root>/bccd", "trainval"
    voc2007   <root>/VOCdevkit/VOC2007                   "voc", "<root>/VOCdevkit", "2007/trainval"
    voc2012   <root>/VOCdevkit/VOC2012                   "voc", "<root>/VOCdevkit", "2012/trainval"
    coco2017  <root>/coco                                "coco", "<root>/coco", "train2017"
    kitti     <root>/kitti                               "kitti", "<root>/kitti", "train"

    clip_vocabulary is one file, <root>/clip/bpe_simple_vocab_16e6.txt.gz, for teachers.clip_tokenizer. Each name of
    WEIGHTS is one file, <root>/weights/<name>/<its released name>.
"""

import hashlib
import http.client
import json
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from errors import ArgumentParser, UserError, run_script

CHUNK_BYTES = 1 << 20
SAY_BYTES = 256 << 20  # bytes between two lines of progress
MAX_UNKNOWN_BYTES = 2 << 30  # limit for an archive without a published size
MAX_EXPANSION = 20  # unpacked bytes per archive byte
MAX_MEMBERS = 1_000_000
TIMEOUT_SECONDS = 60
SINGLE_FILES = (".txt.gz", ".pth", ".pt")  # nothing to unpack


@dataclass(frozen=True)
class Archive:
    """A .zip, .tar, .txt.gz or weights file to fetch.

    bytes, digest ("md5:..." or "sha256:..."): None where they are not known. A digest may be its first digits.
    saved_as: the file's name, for an address that does not end in one.
    """

    url: str
    bytes: int | None = None
    digest: str | None = None
    saved_as: str | None = None

    @property
    def filename(self) -> str:
        return self.saved_as or self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class PublicDataset:
    """Archives that are unpacked into one folder. Its subfolder `inside` becomes <root>/<folder>.

    format: of the labels; None for what is no dataset.
    """

    archives: tuple[Archive, ...]
    folder: str
    inside: str = "."
    format: str | None = None


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org"
_KITTI = "https://s3.eu-central-1.amazonaws.com/avg-kitti"

# fmt: off
DATASETS = {
    "bccd": PublicDataset((
        Archive("https://codeload.github.com/Shenggan/BCCD_Dataset/zip/refs/heads/master", saved_as="BCCD_Dataset.zip"),
    ), "bccd", "BCCD_Dataset-master/BCCD", "voc"),
    "voc2007": PublicDataset((
        Archive(f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", 460032000, "md5:c52e279531787c972589f7e41ab4ae64"),
        Archive(f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar", 451020800, "md5:b6e924de25625d8de591ea690078ad9f"),
    ), "VOCdevkit/VOC2007", "VOCdevkit/VOC2007", "voc"),
    "voc2012": PublicDataset((
        Archive(f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", 1999639040, "md5:6cd6e144f989b92b3379bac3b3de84fd"),
    ), "VOCdevkit/VOC2012", "VOCdevkit/VOC2012", "voc"),
    "coco2017": PublicDataset((
        Archive(f"{_COCO}/annotations/annotations_trainval2017.zip", 252907541,
                "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
        Archive(f"{_COCO}/zips/val2017.zip", 815585330,
                "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
        Archive(f"{_COCO}/zips/train2017.zip", 19336861798,
                "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    ), "coco", format="coco"),
    "kitti": PublicDataset((
        Archive(f"{_KITTI}/data_object_label_2.zip", 5601213,
                "sha256:4efc76220d867e1c31bb980bbf8cbc02599f02a9cb4350effa98dbb04aaed880"),
        Archive(f"{_KITTI}/data_object_image_2.zip", 12569945557,
                "sha256:351c5a2aa0cd9238b50174a3a62b846bc5855da256b82a196431d60ff8d43617"),
    ), "kitti", format="kitti"),
    "clip_vocabulary": PublicDataset((
        Archive("https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz", 1356917,
                "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    ), "clip"),
}
_TORCHVISION = "https://download.pytorch.org/models"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_YOLOV5 = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
_ULTRALYTICS = "https://github.com/ultralytics/assets/releases/download/v8.3.0"
_RTDETR = "https://github.com/lyuwenyu/storage/releases/download/v0.1"
WEIGHTS = {
    "yolov8n": Archive(f"{_ULTRALYTICS}/yolov8n.pt",
        6549796, "sha256:f59b3d833e2ff32e194b5bb8e08d211dc7c5bdf144b90d2c8412c47ccfc83b36"),
    "yolov8s": Archive(f"{_ULTRALYTICS}/yolov8s.pt",
        22588772, "sha256:1f47a78bf100391c2a140b7ac73a1caae18c32779be7d310658112f7ac9aa78a"),
    "yolov8m": Archive(f"{_ULTRALYTICS}/yolov8m.pt",
        52136884, "sha256:5d4a90cdc7a21786cc59cd19778e9eafff836df9e2da32524737c7ee6efe4fe5"),
    "yolov8l": Archive(f"{_ULTRALYTICS}/yolov8l.pt",
        87792836, "sha256:64c9115303f6a25575f82200d1b22ec409fa6bd7d08d0313884fc20d919478cd"),
    "yolov8x": Archive(f"{_ULTRALYTICS}/yolov8x.pt",
        136890692, "sha256:3df4ada6b4dad6d657868f2fdf7faecfb34dcfccf3a25c4b82079064718524c8"),
    "yolov5n": Archive(f"{_YOLOV5}/yolov5n.pt",
        4062133, "sha256:4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3"),
    "yolov5s": Archive(f"{_YOLOV5}/yolov5s.pt",
        14808437, "sha256:8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee"),
    "yolov5m": Archive(f"{_YOLOV5}/yolov5m.pt",
        42806829, "sha256:61d933360ba5a7733a36764996c800287d973889d875227f5beedd2473a97a56"),
    "yolov5l": Archive(f"{_YOLOV5}/yolov5l.pt",
        93622629, "sha256:2f603b7354c25454d1270663a14d8ddc1eea98e5eebc1d84ce0c6e3150fa155f"),
    "yolov5x": Archive(f"{_YOLOV5}/yolov5x.pt",
        174114333, "sha256:9f27a794fa0308e2606f90565164571d6f0a0ba18a3ce2e5e5d323b71c157859"),
    "yolov5nu": Archive(f"{_ULTRALYTICS}/yolov5nu.pt"),
    "yolov5su": Archive(f"{_ULTRALYTICS}/yolov5su.pt"),
    "yolov5mu": Archive(f"{_ULTRALYTICS}/yolov5mu.pt"),
    "yolov5lu": Archive(f"{_ULTRALYTICS}/yolov5lu.pt"),
    "yolov5xu": Archive(f"{_ULTRALYTICS}/yolov5xu.pt"),
    "rtdetr_l": Archive(f"{_ULTRALYTICS}/rtdetr-l.pt",
        digest="sha256:6de60b10d4bc566f00cda0f5b4d64afe4b66d48dc9695d2171effb7859d8e73f"),
    "rtdetr_x": Archive(f"{_ULTRALYTICS}/rtdetr-x.pt"),
    "rtdetr_r18vd": Archive(f"{_RTDETR}/rtdetr_r18vd_dec3_6x_coco_from_paddle.pth"),
    "rtdetr_r50vd": Archive(f"{_RTDETR}/rtdetr_r50vd_6x_coco_from_paddle.pth"),
    "fasterrcnn_resnet50": Archive(
        f"{_TORCHVISION}/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", digest="sha256:258fb6c6"),
    "fasterrcnn_resnet50_v2": Archive(
        f"{_TORCHVISION}/fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", digest="sha256:dd69338a"),
    "fasterrcnn_mobilenet_v3_large": Archive(
        f"{_TORCHVISION}/fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", digest="sha256:fb6a3cc7"),
    "fasterrcnn_mobilenet_v3_large_320": Archive(
        f"{_TORCHVISION}/fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth", digest="sha256:907ea3f9"),
    "resnet18": Archive(f"{_TORCHVISION}/resnet18-f37072fd.pth",
        46830571, "sha256:f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"),
    "resnet34": Archive(f"{_TORCHVISION}/resnet34-b627a593.pth",
        digest="sha256:b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f"),
    "resnet50": Archive(f"{_TORCHVISION}/resnet50-0676ba61.pth",
        102530333, "sha256:0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"),
    "mobilenet_v3_small": Archive(f"{_TORCHVISION}/mobilenet_v3_small-047dcff4.pth",
        10306551, "sha256:047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f"),
    "mobilenet_v3_large": Archive(f"{_TORCHVISION}/mobilenet_v3_large-5c1a4163.pth", digest="sha256:5c1a4163"),
    "deit_tiny": Archive("https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
        digest="sha256:a1311bcf4f24e3c95adaa75535db67bc4412d95535b98f7c1dfd1164dda41c97"),
    "dinov2_vits14": Archive(f"{_DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
        88283115, "sha256:b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": Archive(f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        346378731, "sha256:0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": Archive(f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        1217586395, "sha256:d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vits14_reg": Archive(f"{_DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
    "dinov2_vitb14_reg": Archive(f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2_vitl14_reg": Archive(f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"),
    "clip_vit_b32": Archive(f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        353976522, "sha256:40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "clip_vit_b16": Archive(f"{_CLIP}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        digest="sha256:5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
}
# fmt: on
DATASETS |= {name: PublicDataset((file,), f"weights/{name}") for name, file in WEIGHTS.items()}


def how_to_fetch_set(root: str | Path, format: str) -> str:
    """The end of an error about a missing dataset: " (python -m datasets.download bccd --root data)".

    "" where no download makes a folder of that name, with labels in that format.
    """
    path, sets = Path(root), {name: entry for name, entry in DATASETS.items() if entry.format == format}
    names = [name for name, entry in sets.items() if Path(entry.folder).parts[0] == path.name]
    return f" (python -m datasets.download {' '.join(names)} --root {path.parent})" if names else ""


def released(name: str) -> tuple[str, str] | None:
    """(where a download puts the released weights, its command). None for a name that has none.

    name: in WEIGHTS, or the name of a released file, such as "yolov8n.pt".
    """
    for known, file in WEIGHTS.items():
        if name in (known, file.filename):
            command = f"python -m datasets.download {known} --root data"
            return f"data/{DATASETS[known].folder}/{file.filename}", command
    return None


def how_to_fetch(name: str) -> str:
    """The end of an error about missing weights: where they would be, and the command; "" where `released` has none."""
    return " (released: {}, after {})".format(*found) if (found := released(name)) else ""


def download(dataset: PublicDataset, root: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """Fetch, check and unpack, unless the folder exists. Returns the folder. UserError if anything fails."""
    root = Path(root)
    target = root / dataset.folder
    if target.exists():
        say(f"{target} is there already")
        return target
    archives_folder = root / "downloads"
    try:
        archives_folder.mkdir(parents=True, exist_ok=True)
        archives = [fetch(archive, archives_folder, say=say) for archive in dataset.archives]
        with tempfile.TemporaryDirectory(prefix=".unpack.", dir=root) as temporary:
            for path in archives:
                say(f"unpacking {path.name}")
                unpack(path, Path(temporary))
            source = Path(temporary) / dataset.inside
            if dataset.inside == ".":
                source = Path(temporary) / "all"
                source.mkdir()
                for item in list(Path(temporary).iterdir()):
                    if item != source:
                        item.rename(source / item.name)
            if not source.is_dir():
                raise UserError(f"{archives[0]}: no folder {dataset.inside} inside, expected the dataset there")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}", exit_code=5) from None
    say(f"{target} is complete")
    return target


def fetch(archive: Archive, folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """The checked archive in `folder`, downloaded if needed. UserError for a cut, a wrong size or a wrong hash."""
    path = folder / archive.filename
    if path.is_file():
        say(f"checking {path.name}")
        _check(path, archive)
        return path
    part = path.with_name(path.name + ".part")
    can_go_on = archive.digest is not None and archive.bytes is not None
    start = part.stat().st_size if part.exists() and can_go_on else 0
    if archive.bytes is not None:
        free = shutil.disk_usage(folder).free
        if free < archive.bytes - start:
            raise UserError(
                f"{folder}: {free} bytes free, expected {archive.bytes - start} for {path.name}", exit_code=5
            )
    if archive.bytes is None or start < archive.bytes:
        say(f"fetching {archive.url}" + (f" from byte {start}" if start else ""))
        _stream(archive, part, start, say)
    try:
        _check(part, archive)
    except UserError:
        part.unlink()  # more bytes would not make it right
        raise
    os.replace(part, path)
    return path


def _stream(archive: Archive, part: Path, start: int, say: Callable[[str], None]) -> None:
    """Append the bytes from `start` on to the part file. It may be called again after an error."""
    again = "run again to go on" if archive.digest is not None else "run again to start anew"
    request = urllib.request.Request(archive.url, headers={"User-Agent": "retort", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if response.status != 206:
                start = 0  # the server sends the whole file
            elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
                raise UserError(f"{archive.url}: answered with the range {response.headers.get('Content-Range')}")
            length = response.headers.get("Content-Length")
            total = start + int(length) if length and length.isdecimal() else None
            if archive.bytes is not None and total is not None and total != archive.bytes:
                raise UserError(f"{archive.url}: {total} bytes offered, expected {archive.bytes}")
            limit = archive.bytes if archive.bytes is not None else MAX_UNKNOWN_BYTES
            with open(part, "r+b" if start else "wb") as file:
                file.seek(start)
                written = start
                while chunk := response.read(CHUNK_BYTES):
                    written += len(chunk)
                    if written > limit:
                        raise UserError(f"{archive.url}: more than {limit} bytes, expected no more")
                    file.write(chunk)
                    if written // SAY_BYTES > (written - len(chunk)) // SAY_BYTES:
                        say(f"  {written / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        done = part.stat().st_size if part.exists() else 0
        raise UserError(f"{archive.url}: {getattr(error, 'reason', None) or error} at byte {done}; {again}") from None
    expected = archive.bytes if archive.bytes is not None else total
    if expected is not None and written < expected:
        raise UserError(f"{archive.url}: cut off at byte {written} of {expected}; {again}")


def _check(path: Path, archive: Archive) -> None:
    """Compare size and digest with the published ones, else with the manifest. Then write the manifest."""
    size = path.stat().st_size
    if archive.bytes is not None and size != archive.bytes:
        raise UserError(f"{path}: {size} bytes, expected {archive.bytes}; delete it to fetch it again")
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            md5.update(chunk)
    manifest_path = path.with_name("manifest.json")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.exists() else {}
        recorded = manifest.get(archive.filename, {}).get("sha256")
    except (ValueError, AttributeError):
        raise UserError(f"{manifest_path}: not a manifest of ours; delete it to start anew") from None
    expected = archive.digest or (f"sha256:{recorded}" if recorded else None)
    if expected is not None:
        kind, _, value = expected.partition(":")
        found = {"sha256": sha256, "md5": md5}[kind].hexdigest()
        if not found.startswith(value):
            source = "published" if archive.digest else f"recorded in {manifest_path}"
            raise UserError(f"{path}: {kind} {found}, expected {value} ({source}); delete it to fetch it again")
    checked = archive.digest or "recorded on first download"
    manifest[archive.filename] = {"url": archive.url, "bytes": size, "sha256": sha256.hexdigest(), "checked": checked}
    temporary = manifest_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, manifest_path)


def unpack(path: Path, folder: Path) -> None:
    """Unpack the plain files and folders of a .zip or .tar below `folder`. A .txt.gz or weights file is only copied.

    UserError for a link, a device, a path that leaves the folder, and more than 20 times the archive's bytes.
    """
    limit = MAX_EXPANSION * path.stat().st_size + (1 << 20)
    try:
        if path.name.endswith(SINGLE_FILES):
            shutil.copyfile(path, folder / path.name)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [(m.filename, m.file_size, _zip_is_plain(m)) for m in archive.infolist()]
                _check_members(path, limit, members)
                archive.extractall(folder)  # reads no more of a member than its stated size, and checks its CRC
        else:
            with tarfile.open(path) as tar:
                members = [(m.name, m.size, m.isreg() or m.isdir()) for m in tar.getmembers()]
                _check_members(path, limit, members)
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # there since Python 3.11.4
                tar.extractall(folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None


def _zip_is_plain(member: zipfile.ZipInfo) -> bool:
    mode = stat.S_IFMT(member.external_attr >> 16)
    return not member.flag_bits & 1 and mode in (0, stat.S_IFREG, stat.S_IFDIR)


def _check_members(path: Path, limit: int, members: list[tuple[str, int, bool]]) -> None:
    """members: (name, bytes, is a plain file or folder)."""
    if len(members) > MAX_MEMBERS or sum(size for _, size, _ in members) > limit:
        raise UserError(f"{path}: unpacks to more than {limit} bytes or {MAX_MEMBERS} files")
    for name, _, is_plain in members:
        parts = PurePosixPath(name.replace("\\", "/"))
        if not is_plain or parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{path}: member {name!r} is a link, a device, or leaves the folder")


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        "python -m datasets.download",
        __doc__,
        epilog="Example: python -m datasets.download bccd resnet18 --root data\n"
        "Exit codes: 0 fetched, 2 a mistake in the arguments or the data, 5 a file that could not be written, "
        "130 after Ctrl-C.",
    )
    parser.add_argument("names", nargs="+", choices=tuple(DATASETS), metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--root", default="data", metavar="FOLDER", help="folder to fetch into (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and stop")
    arguments = parser.parse_args(argv)
    for name in dict.fromkeys(arguments.names):
        for archive in DATASETS[name].archives:
            size = f"{archive.bytes / 1e6:,.1f} MB" if archive.bytes else "size not known"
            print(f"{archive.url}  {size}  {archive.digest or 'hash not known: recorded on first download'}")
        if not arguments.dry_run:
            download(DATASETS[name], arguments.root)
    return 0


if __name__ == "__main__":
    run_script(main)
