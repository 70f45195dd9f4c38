"""SECURITY.md: every promise names tests that exist; the libraries it counts on are asked for everywhere alike."""

import ast
import re
import tomllib

import pytest

from tests.conftest import ROOT

PROMISES = re.split(r"\n- ", (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Limits")[0])[1:]


@pytest.mark.parametrize("promise", PROMISES, ids=[promise[:40] for promise in PROMISES])
def test_every_promise_is_held_by_a_test(promise):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def floors(lines: list[str]) -> dict[str, tuple[int, ...]]:
    found = [re.match(r"([\w-]+)(?:>=|==)([\d.]+)", line) for line in lines]
    return {m[1].lower(): tuple(map(int, m[2].split("."))) for m in found if m}


def test_the_oldest_libraries_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = floors(project["dependencies"])
    read = lambda name: floors((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert asked["pillow"] >= (13, 0) and asked["torch"] >= (2, 11)
    pinned = read("constraints.txt")
    assert all(pinned[name] >= floor for name, floor in asked.items() if name in pinned)
    assert "pillow" in pinned


def test_the_limits_are_those_of_the_code():
    import checkpoint
    from datasets import coco, download, images, text_lines, voc_xml
    from engine.web_demo import clips, detectors, gallery
    from weights import containers, inert_pickle, shared_file

    mib = 1 << 20
    stated = {
        "4 GiB; its tensors together 4 times": (containers.MAX_FILE_BYTES, containers.MAX_COPIES) == (4096 * mib, 4),
        "64 MiB, 1,000,000 opcodes, texts of 1 MiB, 1,000 deep": (
            containers.MAX_PICKLE_BYTES,
            inert_pickle.MAX_OPCODES,
            inert_pickle.MAX_STRING_BYTES,
            inert_pickle.MAX_MARK_DEPTH,
        )
        == (64 * mib, 1_000_000, mib, 1000),
        "20,000 entries": containers.MAX_ZIP_ENTRIES == 20_000,
        "100 MiB; 1 MiB": (containers.MAX_HEADER_BYTES, shared_file.MAX_TEXT) == (100 * mib, mib),
        "100,000": checkpoint.MAX_CLASSES == 100_000,
        "a picture 10 MB and 24 million pixels": (gallery.MAX_MEGABYTES, gallery.MAX_MEGAPIXELS) == (10, 24),
        "a video 40 MB, 10 seconds and frames of 9 million pixels": (
            clips.MAX_MEGABYTES,
            clips.MAX_SECONDS,
            clips.MAX_FRAME_PIXELS,
        )
        == (40, 10, 9_000_000),
        "weights 200 MB and images of 2,048 pixels a side": (
            detectors.MAX_WEIGHTS_MEGABYTES,
            detectors.MAX_IMAGE_SIZE,
        )
        == (200, 2048),
        "64 million pixels": images.MAX_PIXELS == 64_000_000,
        "4 MiB; 4 GiB; 64 MiB": (voc_xml.MAX_XML_BYTES, coco.MAX_JSON_BYTES, text_lines.MAX_BYTES)
        == (4 * mib, 4096 * mib, 64 * mib),
        "20 times its size, 1,000,000 files": (download.MAX_EXPANSION, download.MAX_MEMBERS) == (20, 1_000_000),
    }
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all(words in text and holds for words, holds in stated.items()), stated
