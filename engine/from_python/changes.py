"""Keyword arguments of retort.train and retort.compare -> the overrides that a command line would have."""

import json
from collections.abc import Mapping
from typing import Any


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """`{"epochs": 10, "optimizer.learning_rate": 0.1}` -> `["epochs=10", "optimizer.learning_rate=0.1"]`.

    A dict changes the keys that it has: `optimizer={"name": "sgd"}` is `optimizer.name=sgd`. Lists replace lists.
    """
    overrides = []
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            overrides += as_overrides({f"{key}.{inner}": item for inner, item in value.items()})
        else:  # JSON is YAML; a path becomes a text
            overrides.append(f"{key}={json.dumps(value, default=str, ensure_ascii=False)}")
    return overrides
