"""Read and write YAML with the scalars of YAML 1.2.

Differences from PyYAML's defaults: `1e-3` is a number, `no` and `12:30` are text, `010` is ten. A key given twice, an
alias or a deeply nested file is an error. One subclass of SafeLoader reads everything; it makes plain values only.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and booleans, no key given twice, no alias and no deep nesting."""

    source, depth = "", 0  # the text's name in errors; of the collections around the next node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{self._place(event)}: aliases (*{event.anchor}) are not supported")
        is_collection = isinstance(event, yaml.CollectionStartEvent)
        self.depth += is_collection
        if self.depth > MAX_YAML_DEPTH:
            raise UserError(f"{self._place(event)}: nested deeper than {MAX_YAML_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= is_collection
        return node

    def _place(self, event: yaml.Event) -> str:
        return f"{self.source}:{event.start_mark.line + 1 if event.start_mark else '?'}"


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if tag == "tag:yaml.org,2002:null"]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$|^\.nan$"),
    list("-+.0123456789"),
)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # 010 is ten


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    mapping: dict = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


class _TextLoader(_Loader):
    """As _Loader, but every scalar is a string."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own name and form)


MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 50


def read_yaml(path: str | Path, *, as_text: bool = False) -> Any:
    """The plain Python values in a YAML file. UserError for a file over 1 MiB, nested deeper than 50, or with aliases.

    Scalars follow YAML 1.2's core schema (`1e-3` is a float, `no` and `12:30` are strings). With `as_text` every scalar
    stays the string in the file; class names such as `1e3` and `null` need that.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"{path}: {len(data)} bytes, expected a YAML file of at most {MAX_YAML_BYTES}")
    try:
        return parse_yaml(data.decode("utf-8-sig"), str(path), as_text=as_text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_mapping(path: str | Path, expected: str = "keys and values", *, as_text: bool = False) -> dict[str, Any]:
    """The keys and values of a YAML file, as read_yaml reads them. UserError if it holds something else, or nothing."""
    tree = read_yaml(path, as_text=as_text)
    if not isinstance(tree, dict):
        kinds = {type(None): "nothing", list: "a list", str: "a text"}
        raise UserError(f"{path}: found {kinds.get(type(tree), 'a number')}, expected {expected}")
    return tree


def parse_yaml(text: str, source: str, *, as_text: bool = False) -> Any:
    """As read_yaml, but from a text. `source` names the text in errors."""
    try:
        loader = (_TextLoader if as_text else _Loader)(text)
        loader.source = source
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def dump_yaml(tree: Any, *, on_one_line: bool = False) -> str:
    """YAML text that read_yaml turns back into the same values in the same order. Strings like `1e3` are quoted.

    on_one_line: `{a: 1, b: [2]}` for a list or a dict.
    """
    width = 1 << 20 if on_one_line else None
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=on_one_line, width=width
    )


class _Dumper(yaml.SafeDumper):
    """Quotes each string that YAML 1.1 or our 1.2 scalars would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    node = dumper.represent_scalar("tag:yaml.org,2002:str", text)
    if any(p.match(text) for rows in _Loader.yaml_implicit_resolvers.values() for _, p in rows):
        node.style = "'"
    return node


_Dumper.add_representer(str, _represent_str)
