"""The rows and files of label_cases: what each is, and how it has to end."""

import json
from typing import Any

from tests.faults.matrix import Outcome

DROPPED = "object dropped"
SIZE = (100, 80)  # pixels of every picture


def voc_object(box: Any = (1, 1, 10, 10), name: str = "cell", extra: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = box if isinstance(box, str) else "".join(f"<{key}>{v}</{key}>" for key, v in zip(keys, box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def voc_xml(objects: str, size: tuple | None = SIZE, start: str = "") -> str:
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"{start}<annotation>{stated}\n{objects}\n</annotation>"


def coco_tree(rows: list, **changes: Any) -> dict:
    images = [{"id": n, "file_name": f"{name}.png", "width": 100, "height": 80} for n, name in ((1, "good"), (2, "x"))]
    categories = [{"id": 90, "name": "no"}, {"id": 3, "name": "1e3"}]
    return {"images": images, "annotations": rows, "categories": categories} | changes


YOLO_GOOD = ("0 0.5 0.5 0.2 0.4", "2 0.5 0.5 0.2 0.4")
KITTI_GOOD = ("Car 0 0 -1.5 10 20 30 40 1.5 1.6 3.9 1 2 30 0.1", "Van 0 0 -1.5 10 20 30 40 1.5 1.6 3.9 1 2 30 0.1")
VOC_GOOD = (voc_object(), voc_object(box=(3, 4, 50, 60)))
COCO_GOOD: tuple[dict, dict] = (
    {"id": 0, "image_id": 2, "category_id": 90, "bbox": [10, 20, 30, 40]},
    {"id": 2, "image_id": 2, "category_id": 90, "bbox": [1, 2, 3, 4]},
)

# fmt: off
MALFORMED, UNKNOWN, EDGE, NUMBER = "malformed row", "unknown class", "box past the edge", "not a number"
OUTSIDE, EMPTY, TURNED = "box outside the picture", "zero-size box", "box turned inside out"
FRACTIONS = "not normalised"
YOLO_ROWS = {
    "four columns": ("0 0.5 0.5 0.2", DROPPED, MALFORMED),
    "a score": ("0 0.5 0.5 0.2 0.4 0.9", DROPPED, MALFORMED),
    "eight columns": ("0 0.1 0.1 0.5 0.2 0.3 0.9 0.1", DROPPED, MALFORMED),
    "a word": ("0 0.5 0.5 0.2 wide", DROPPED, MALFORMED),
    "decimal commas": ("0 0,5 0,5 0,2 0,4", DROPPED, MALFORMED),
    "commas": ("0,0.5,0.5,0.2,0.4", DROPPED, MALFORMED),
    "a comment": ("0 0.5 0.5 0.2 0.4 # cell", DROPPED, MALFORMED),
    "underscores": ("0 0.5 0.5 0.2 0.4_0", DROPPED, MALFORMED),
    "a zero byte": ("0 0.5 0.5 0.2 0.4\0", DROPPED, MALFORMED),
    "class by name": ("cell 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class too large": ("3 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class below zero": ("-1 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class with a sign": ("+1 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class of a half": ("0.5 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class beyond 32 bits": ("99999999999 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class of hex": ("0x1 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "class nan": ("nan 0.5 0.5 0.2 0.4", DROPPED, UNKNOWN),
    "nan": ("0 nan 0.5 0.2 0.4", DROPPED, NUMBER),
    "infinity": ("0 0.5 inf 0.2 0.4", DROPPED, NUMBER),
    "overflow": ("0 0.5 0.5 1e999 0.4", DROPPED, NUMBER),
    "pixels": ("0 50 40 20 32", DROPPED, FRACTIONS),
    "a little too wide": ("0 0.5 0.5 1.03 0.4", DROPPED, FRACTIONS),
    "center below zero": ("0 -0.5 0.5 0.2 0.4", DROPPED, FRACTIONS),
    "no width": ("0 0.5 0.5 0 0.4", DROPPED, EMPTY),
    "height below zero": ("0 0.5 0.5 0.2 -0.005", DROPPED, TURNED),
    "polygon that is a line": ("0 0.1 0.1 0.1 0.2 0.1 0.9", DROPPED, EMPTY),
    "outside": ("0 1.005 0.5 0.002 0.1", DROPPED, OUTSIDE),
    "past the edge": ("0 0.0 0.5 0.2 0.4", "noted", EDGE),
    "twice": (YOLO_GOOD[0], "duplicate dropped", "duplicate box"),
    "class as a float": ("1.0 0.5 0.5 0.2 0.4", "", ""),
    "exponents": ("1 5e-1 +.5 2E-1 0.4", "", ""),
    "tabs": ("1\t0.5 \t 0.5\t0.2 0.4 ", "", ""),
    "polygon": ("1 0.1 0.1 0.5 0.2 0.3 0.9", "", ""),
}
UNREADABLE = "unreadable label file"
YOLO_FILES: dict[str, tuple[bytes, Outcome, str]] = {
    "empty": (b"", "correct", ""),
    "blank lines": (b"\r\n \n\n", "correct", ""),
    "byte order mark": (b"\xef\xbb\xbf0 0.5 0.5 0.2 0.4\r\n", "correct", ""),
    "old Mac's lines": (b"0 0.5 0.5 0.2 0.4\r1 0.5 0.5 0.2 0.4\r", "correct", ""),
    "UTF-16": ("0 0.5 0.5 0.2 0.4".encode("utf-16"), "counted", UNREADABLE),
    "no text": (b"\x00\x80\x81", "counted", UNREADABLE),
    "Latin-1": (b"caf\xe9 0.5 0.5 0.2 0.4", "counted", UNREADABLE),
    "65 MB": (b"0 0.5 0.5 0.2 0.4\n" * 4_000_000, "counted", UNREADABLE),
    "HTML": (b"<html>404</html>", "counted", MALFORMED),
    "tracks": (b"0 0.5 0.5 0.2 0.4 0.9 17\n", "refused", "class, box, confidence and track id"),
    "keypoints": (b"0 0.5 0.5 0.2 0.4" + b" 0.5 0.5 2" * 2 + b"\n", "refused", "keypoints"),
}
OBJECT = "malformed object"
VOC_ROWS = {
    "no width": (voc_object((5, 5, 5, 9)), DROPPED, EMPTY),
    "turned": (voc_object((9, 5, 5, 9)), DROPPED, TURNED),
    "nan": (voc_object(("nan", 5, 9, 9)), DROPPED, OBJECT),
    "infinity": (voc_object((5, 5, "inf", 9)), DROPPED, OBJECT),
    "a word": (voc_object(("ten", 5, 9, 9)), DROPPED, OBJECT),
    "decimal comma": (voc_object(("5,5", 5, 9, 9)), DROPPED, OBJECT),
    "underscore": (voc_object(("1_0", 5, 19, 9)), DROPPED, OBJECT),
    "a corner missing": (voc_object("<xmin>1</xmin><ymin>2</ymin><xmax>4</xmax>"), DROPPED, OBJECT),
    "an empty box": (voc_object(""), DROPPED, OBJECT),
    "an empty name": (voc_object(name=""), DROPPED, OBJECT),
    "difficult of two": (voc_object(extra="<difficult>2</difficult>"), DROPPED, OBJECT),
    "far outside": (voc_object(("1e308", 5, "1.5e308", 9)), DROPPED, OUTSIDE),
    "outside": (voc_object((200, 5, 210, 9)), DROPPED, OUTSIDE),
    "below zero": (voc_object((-20, 5, -2, 9)), DROPPED, OUTSIDE),
    "unknown class": (voc_object(name="virus"), DROPPED, UNKNOWN),
    "past the edge": (voc_object((90, 70, 140, 75)), "noted", EDGE),
    "twice": (voc_object(), "duplicate dropped", "duplicate box"),
    "difficult": (voc_object((2, 2, 9, 9), extra="<difficult>1</difficult>"), "", ""),
    "floats": (voc_object(("2.5", " 3 ", "9e0", "9.")), "", ""),
    "parts": (voc_object((2, 2, 9, 9), extra=f"<part><name>x</name>{voc_object('')}</part>"), "", ""),
}
LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
FILE_NAME = "/etc/hostname"
VOC_FILES: dict[str, tuple[bytes, Outcome, str]] = {
    name: (text if isinstance(text, bytes) else text.encode(), "counted", UNREADABLE) for name, text in {
        "empty": "", "no XML": "cells", "HTML": "<html><body>404</body></html>", "LFS pointer": "version https://git-lfs",
        "cut": voc_xml(voc_object())[:-5], "two roots": voc_xml("") * 2, "another root": "<annotations></annotations>",
        "doctype": voc_xml("", start="<!DOCTYPE annotation>"),
        "inner entity": voc_xml("&a;", start='<!DOCTYPE a [<!ENTITY a "b">]>'),
        "outer entity": voc_xml("&a;", start=f'<!DOCTYPE a [<!ENTITY a SYSTEM "file://{FILE_NAME}">]>'),
        "parameter entity": voc_xml("", start=f'<!DOCTYPE a [<!ENTITY % p SYSTEM "file://{FILE_NAME}"> %p;]>'),
        "outer subset": voc_xml("", start='<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">'),
        "laughs": voc_xml("&a11;", start=f'<!DOCTYPE a [<!ENTITY a0 "ha">{LAUGHS}]>'),
        "quadratic": voc_xml("&a;" * 50_000, start=f'<!DOCTYPE a [<!ENTITY a "{"x" * 50_000}">]>'),
        "undeclared entity": voc_xml("&a;"), "deep": "<annotation>" * 100_000, "10 MB token": voc_xml("x" * (10 << 20)),
        "a zero byte": voc_xml("\0"), "a bare &": voc_xml("Q & A"), "not UTF-8": voc_xml("caf\xe9").encode("latin-1"),
        "unknown encoding": voc_xml("", start='<?xml version="1.0" encoding="klingon"?>'),
        "an encoding of Python's": voc_xml("", start='<?xml version="1.0" encoding="unicode_escape"?>'),
        "an encoding that lies": voc_xml("\xff", start='<?xml version="1.0" encoding="ascii"?>').encode("latin-1"),
    }.items()
} | {
    "byte order mark": (b"\xef\xbb\xbf" + voc_xml("").encode(), "correct", ""),
    "UTF-16": (voc_xml("", start='<?xml version="1.0" encoding="UTF-16"?>').encode("utf-16"), "correct", ""),
    "UTF-8 that says UTF-16": (voc_xml("", start='<?xml version="1.0" encoding="UTF-16"?>').encode(), "correct", ""),
    "GB2312": (voc_xml("<!-- \u7ec6\u80de -->", start='<?xml version="1.0" encoding="gb2312"?>').encode("gb18030"),
               "correct", ""),
    "CDATA and comments": (voc_xml(voc_object(name="<![CDATA[cell]]><!-- -->")).encode(), "correct", ""),
    "no size": (voc_xml("", size=None).encode(), "correct", ""),
    "size of zero": (voc_xml("", size=(0, 0)).encode(), "correct", ""),
    "size of words": (voc_xml("", size=("wide", 80)).encode(), "correct", ""),
    "another size": (voc_xml("", size=(101, 80)).encode(), "counted", "wrong size stated"),
    "sides swapped": (voc_xml("", size=(80, 100)).encode(), "counted", "wrong size stated"),
}
LEFT = "label without picture"


def coco_row(**changes: Any) -> dict:
    return COCO_GOOD[0] | {"id": 1, "bbox": [11, 21, 30, 40]} | changes


COCO_ROWS = {
    "no width": (coco_row(bbox=[10, 20, 0, 40]), DROPPED, EMPTY),
    "width below zero": (coco_row(bbox=[10, 20, -5, 40]), DROPPED, TURNED),
    "outside": (coco_row(bbox=[100, 20, 5, 40]), DROPPED, OUTSIDE),
    "three numbers": (coco_row(bbox=[10, 20, 30]), DROPPED, OBJECT),
    "a word": (coco_row(bbox=[10, 20, 30, "wide"]), DROPPED, OBJECT),
    "no box": (coco_row(bbox=[]), DROPPED, OBJECT),
    "null box": (coco_row(bbox=None), DROPPED, OBJECT),
    "box of keys": (coco_row(bbox={"x": 1}), DROPPED, OBJECT),
    "true": (coco_row(bbox=[10, 20, 30, True]), DROPPED, OBJECT),
    "400 digits": (coco_row(bbox=[10, 20, 30, 10**400]), DROPPED, OBJECT),
    "crowd of two": (coco_row(iscrowd=2), DROPPED, OBJECT),
    "ignore maybe": (coco_row(ignore="maybe"), DROPPED, OBJECT),
    "area of words": (coco_row(area="large"), DROPPED, OBJECT),
    "no such class": (coco_row(category_id=4), DROPPED, UNKNOWN),
    "null class": (coco_row(category_id=None), DROPPED, UNKNOWN),
    "class by name": (coco_row(category_id="no"), DROPPED, UNKNOWN),
    "no such picture": (coco_row(image_id=8), "left out", LEFT),
    "picture of a list": (coco_row(image_id=[2]), "left out", LEFT),
    "no keys": ({}, "left out", LEFT),
    "past the edge": (coco_row(bbox=[10, 20, 1e308, 1e308]), "noted", EDGE),
    "twice": (COCO_GOOD[0] | {"id": 1}, "duplicate dropped", "duplicate box"),
    "crowd": (coco_row(iscrowd=1), "", ""),
    "numbers as text": (coco_row(bbox=["10.5", "20", "3e1", "40"], image_id="2", category_id="90"), "", ""),
    "ids as floats": (coco_row(image_id=2.0, category_id=90.0), "", ""),
    "a mask": (coco_row(segmentation=[[1, 2, 3, 4, 5, 6]]), "", ""),
    "the id of another": (coco_row(id=0), "", ""),
    "a number far out": (coco_row(id=10**30), "", ""),
}
CATEGORY = [{"id": 90, "name": "no"}, {"id": 3, "name": "1e3"}]
PICTURE = [{"id": 1, "file_name": "good.png"}, {"id": 2, "file_name": "x.png"}]
OWN = {"id": 9, "image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 20]}
COCO_FILES: dict[str, tuple[bytes, Outcome, str]] = {
    name: (text if isinstance(text, bytes) else json.dumps(text).encode(), "refused", words)
    for name, (text, words) in {
        "empty": (b"", "not valid JSON"), "cut": (json.dumps(coco_tree([OWN])).encode()[:-1], "not valid JSON"),
        "a list": ([], "under 'categories'|under 'images'"), "HTML": (b"<html>404</html>", "not valid JSON"),
        "no pictures": (coco_tree([OWN], images={}), "under 'images'"),
        "no annotations": (coco_tree([OWN], annotations=None), "under 'annotations'"),
        "annotations of numbers": (coco_tree([1]), "under 'annotations'"),
        "no categories": (coco_tree([OWN], categories=[]), "no categories"),
        "a category without a name": (coco_tree([OWN], categories=[{"id": 1}]), "an id and a name"),
        "two ids alike": (coco_tree([OWN], categories=[*CATEGORY, {"id": 3, "name": "b"}]), "stands there twice"),
        "two names alike": (coco_tree([OWN], categories=[*CATEGORY, {"id": 4, "name": "no"}]), "stands there twice"),
        "one id as number and text": (coco_tree([OWN], categories=[*CATEGORY, {"id": 3.0, "name": "b"}]), "twice"),
        "NaN": (b'{"images": [NaN]}', "NaN"), "infinity": (b'{"images": [-Infinity]}', "-Infinity"),
        "NaN in a mask": (json.dumps(coco_tree([OWN | {"segmentation": [[float("nan")]]}])).encode(), "NaN"),
        "200,000 deep": (b"[" * 200_000, "nested too deeply|not valid JSON"),
        "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
        "10,000 digits": (b'{"images": [' + b"9" * 10_000 + b"]}", "JSON"),
        "a comment": (b'{"images": [] // none\n}', "not valid JSON"), "single quotes": (b"{'images': []}", "not valid"),
    }.items()
} | {
    name: (json.dumps(coco_tree([OWN], images=[*PICTURE, record])).encode(), "counted", kind)
    for name, (record, kind) in {
        "an id taken": ({"id": 2, "file_name": "y.png"}, "malformed image"),
        "an id of a half": ({"id": 8.5, "file_name": "y.png"}, "malformed image"),
        "no file name": ({"id": 8}, "malformed image"),
        "out of the folder": ({"id": 8, "file_name": "../../etc/passwd"}, "malformed image"),
        "an absolute path": ({"id": 8, "file_name": "/etc/passwd"}, "malformed image"),
        "out by Windows' way": ({"id": 8, "file_name": "..\\..\\passwd"}, "malformed image"),
        "a zero byte": ({"id": 8, "file_name": "a\0.png"}, "malformed image"),
        "a picture that is gone": ({"id": 8, "file_name": "none.png"}, LEFT),
        "a picture listed twice": ({"id": 8, "file_name": "./x.png"}, "listed twice"),
    }.items()
} | {
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(coco_tree([OWN])).encode(), "correct", ""),
    "more keys": (json.dumps(coco_tree([OWN], info={"year": 2026}, licenses=None)).encode(), "correct", ""),
    "50 MB of masks": (json.dumps(coco_tree([OWN | {"segmentation": [[1.5]]}])).encode().replace(
        b"[[1.5]]", b"[[" + b"1.5, " * 8_999_999 + b"1.5]]"), "correct", ""),  # json.dumps would take a second
}
# fmt: on


def kitti_row(name: str = "Car", box: Any = (11, 21, 31, 41), rest: str = "1.5 1.6 3.9 1 2 30 0.1") -> str:
    return f"{name} 0 0 -1.5 {' '.join(map(str, box))} {rest}".strip()


KITTI_ROWS = {
    "14 columns": (kitti_row(rest="1.5 1.6 3.9 1 2 30"), DROPPED, MALFORMED),
    "17 columns": (kitti_row() + " 0.9 3", DROPPED, MALFORMED),
    "a word": (kitti_row(box=("a", 1, 2, 3)), DROPPED, MALFORMED),
    "nan": (kitti_row(box=("nan", 20, 30, 40)), DROPPED, MALFORMED),
    "infinity": (kitti_row(box=(1, 20, "inf", 40)), DROPPED, MALFORMED),
    "unknown class": (kitti_row("Spaceship"), DROPPED, UNKNOWN),
    "another case": (kitti_row("car"), DROPPED, UNKNOWN),
    "turned": (kitti_row(box=(30, 20, 10, 40)), DROPPED, TURNED),
    "no width": (kitti_row(box=(30, 20, 30, 40)), DROPPED, EMPTY),
    "outside": (kitti_row(box=(300, 20, 330, 40)), DROPPED, OUTSIDE),
    "DontCare outside": (kitti_row("DontCare", (300, 20, 330, 40)), DROPPED, OUTSIDE),
    "past the edge": (kitti_row(box=(90, 20, 130, 40)), "noted", EDGE),
    "twice": (KITTI_GOOD[0], "duplicate dropped", "duplicate box"),
    "DontCare of -1": (kitti_row("DontCare", rest="-1 -1 -1 -1000 -1000 -1000 -10"), "", ""),
    "a score": (kitti_row() + " 0.9", "", ""),
}
