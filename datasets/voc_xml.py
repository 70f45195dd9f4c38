"""Read the XML files of Pascal VOC, one annotation a picture."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from datasets.values import read_size
from errors import UserError

MAX_XML_BYTES = 4 << 20
MAX_XML_DEPTH = 20
DECLARED = re.compile(rb"""^(\xef\xbb\xbf)?\s*<\?xml[^>]*?\sencoding\s*=\s*["']([A-Za-z0-9._:-]+)["']""")
SUPERSETS = {"gb2312": "gb18030", "gb_2312-80": "gb18030", "gbk": "gb18030"}  # files declare one and use the other
OWN_ENCODINGS = {"utf-8", "utf8", "us-ascii", "iso-8859-1"}  # encodings that the parser reads itself
NO_TEXT = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"}  # Python's own


@dataclass
class Object:
    """The texts of one <object>, and its line."""

    line: int
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.fields.get("name", "")


@dataclass
class Annotation:
    """One XML file: the stated (width, height), the stated file name, the objects."""

    size: tuple[float, float] | None = None
    filename: str = ""
    objects: list[Object] = field(default_factory=list)


_FIELDS: set[tuple[str, ...]] = {("object", "name"), ("object", "difficult")}
_FIELDS |= {("object", "bndbox", key) for key in ("xmin", "ymin", "xmax", "ymax")}


def read_annotation(path: Path) -> Annotation:
    """Parse a VOC XML file. UserError for more than 4 MiB, nesting deeper than 20, a DOCTYPE or entities."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_XML_BYTES:
        raise UserError(f"{path}: more than {MAX_XML_BYTES} bytes, expected a VOC annotation")
    annotation = Annotation()
    texts: dict[tuple[str, ...], str] = {}
    text_or_data = _decode(data, path)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    stack: list[str] = []
    text: list[str] = []

    def refuse_doctype(*_) -> None:
        raise UserError(f"{path}:{parser.CurrentLineNumber}: a DOCTYPE, expected plain XML without entities")

    def start(tag: str, _) -> None:
        stack.append(tag)
        text.clear()
        if len(stack) > MAX_XML_DEPTH:
            raise UserError(f"{path}:{parser.CurrentLineNumber}: nested deeper than {MAX_XML_DEPTH}")
        if stack[0] != "annotation":
            raise UserError(f"{path}:{parser.CurrentLineNumber}: found <{tag}>, expected <annotation>")
        if stack[1:] == ["object"]:
            annotation.objects.append(Object(parser.CurrentLineNumber))

    def end(_) -> None:
        key = tuple(stack[1:])
        if key in _FIELDS:
            annotation.objects[-1].fields.setdefault(key[-1], "".join(text).strip())
        elif key[:1] in (("size",), ("filename",)):
            texts.setdefault(key, "".join(text).strip())
        stack.pop()
        text.clear()

    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    try:
        parser.Parse(text_or_data, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise UserError(f"{path}: not well-formed XML: {error}") from None
    annotation.filename = texts.get(("filename",), "")
    annotation.size = read_size(texts.get(("size", "width")), texts.get(("size", "height")))
    return annotation


def _decode(data: bytes, path: Path) -> bytes | str:
    """The text of a file in an encoding that the parser does not read itself, such as GB2312; else the bytes."""
    declared = DECLARED.match(data)
    if declared is None or declared[2].decode("ascii").lower() in OWN_ENCODINGS:
        return data
    encoding = declared[2].decode("ascii").lower()
    if declared[1] or encoding.startswith(("utf-16", "utf-32")):  # DECLARED matched single bytes, so it is no UTF-16
        encoding = "utf-8-sig"
    try:
        if encoding.replace("-", "_") in NO_TEXT:
            raise LookupError(f"unknown encoding: {encoding}")
        return data.decode(SUPERSETS.get(encoding, encoding))
    except LookupError as error:
        raise UserError(f"{path}: not well-formed XML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding} text ({error.reason} at byte {error.start})") from None
