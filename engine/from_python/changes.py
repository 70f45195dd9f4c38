"""Keyword arguments of retort.train and retort.compare -> the overrides that a command line would have."""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from config import to_tree


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """`{"epochs": 10, "optimizer.learning_rate": 0.1}` -> `["epochs=10", "optimizer.learning_rate=0.1"]`.

    A dict changes the keys that it has: `optimizer={"name": "sgd"}` is `optimizer.name=sgd`. Lists replace lists.
    Values may be parts of a config (TermConfig) and numbers of numpy and torch.
    """
    overrides = []
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            overrides += as_overrides({f"{key}.{inner}": item for inner, item in value.items()})
        else:  # JSON is YAML
            overrides.append(f"{key}={json.dumps(value, default=_as_plain, ensure_ascii=False)}")
    return overrides


def _as_plain(value: Any) -> Any:
    """A value that JSON does not know as one that it knows; a path becomes a text."""
    if is_dataclass(value):
        return to_tree(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
