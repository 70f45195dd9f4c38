"""Find the weights in an opened container: flat state dicts, checkpoints around them, pickled modules."""

import re
from typing import Any

import torch
from torch import Tensor

from weights.containers import Content
from weights.inert_pickle import Inert, Refused, TensorRecord, short

MAX_TENSORS = 100_000
MAX_MODULE_DEPTH = 64
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")  # of a checkpoint's weights
AVERAGES = "n_averaged"  # the counter of torch's AveragedModel, beside the weights of its module


def find_weights(content: Content) -> tuple[str, dict[str, Any], list[dict], bool]:
    """(layout, name -> TensorRecord or Tensor, the dicts that may hold class names and training arguments, is_mean).

    If a checkpoint has a running mean, these are its weights, and is_mean is True: it is under a key with the word ema,
    such as model_ema, or one key below it, and has names of the trained weights if these are there (another dict or
    object is passed over). Raises Refused where there is no state dict.
    """
    found, layout, is_mean = content.value, "", False
    carriers = [found] if isinstance(found, dict) else []
    if isinstance(found, dict) and not _is_flat(found):
        found, keys, is_mean = _find_in_checkpoint(found, content)
        layout = f" under {'.'.join(keys)!r}"
    if isinstance(found, Inert):
        if isinstance(found.state, dict):
            carriers.insert(0, found.state)
        records = _entries(found, content)
        layout = f"{'TorchScript' if content.attributes else 'pickled'} module {found.name}{layout}"
    elif isinstance(found, dict) and found:
        records, layout = found, f"state dict{layout}"
    else:
        raise Refused(f"no state dict: it holds {short(found)}")
    is_wrapped = lambda name: isinstance(name, str) and name.startswith("module.")
    if AVERAGES in records and all(is_wrapped(name) for name in records if name != AVERAGES):
        records, is_mean = {name: r for name, r in records.items() if name != AVERAGES}, True
    if not records:
        raise Refused("it holds no tensors")
    if all(map(is_wrapped, records)):  # saved from inside DistributedDataParallel
        records, layout = {name.removeprefix("module."): r for name, r in records.items()}, f"{layout}, parallel"
    return layout, records, carriers, is_mean


def _find_in_checkpoint(top: dict, content: Content) -> tuple[Any, tuple[str, ...], bool]:
    """(the weights in a checkpoint, the keys that lead to them, whether they are its running mean)."""
    key = next((key for key in STATE_KEYS if _is_weights(top.get(key))), None)
    trained = None if key is None else top[key]
    for mean in sorted((k for k in top if isinstance(k, str) and _names_mean(k)), key=lambda k: k != "ema"):
        value = top[mean]
        inside = value if isinstance(value, dict) else {}
        for keys, found in [((mean,), value), *(((mean, k), inside.get(k)) for k in STATE_KEYS)]:
            if _is_weights(found) and (trained is None or _share_names(found, trained, content)):
                return found, keys, True
    if key is not None:
        return trained, (key,), False
    odd = next((key for key, value in top.items() if isinstance(value, TensorRecord | Tensor)), None)
    what = f"beside tensors such as {short(odd)} it holds others" if odd else "it holds no tensors"
    raise Refused(f"no state dict: {what}; its keys are {', '.join(short(key) for key in list(top)[:6]) or 'none'}")


def _names_mean(key: str) -> bool:
    """Whether a key has the word ema: ema, model_ema, state_dict_ema, ema_state_dict."""
    return "ema" in re.split(r"[^a-z]+", key.lower())


def _is_weights(value: Any) -> bool:
    """Whether a value is a state dict, or a pickled object with the state of a module."""
    if isinstance(value, Inert):
        return isinstance(value.state, dict) and "_parameters" in value.state
    return isinstance(value, dict) and _is_flat(value)


def _is_flat(value: dict) -> bool:
    return bool(value) and all(isinstance(k, str) and isinstance(v, TensorRecord | Tensor) for k, v in value.items())


def _share_names(a: Inert | dict, b: Inert | dict, content: Content) -> bool:
    """Whether an entry of one has the name of an entry of the other, inside `module.` or not."""
    first, second = ({name.removeprefix("module.") for name in _entries(value, content)} for value in (a, b))
    return not first.isdisjoint(second)


def _entries(value: Inert | dict, content: Content) -> dict[str, Any]:
    """Name -> TensorRecord or Tensor."""
    if isinstance(value, dict):
        return value
    records: dict[str, Any] = {}
    _walk(value, "", records, content.attributes, depth=0, visits=[0])
    return records


def _walk(module: Inert, prefix: str, records: dict, attributes: dict, *, depth: int, visits: list[int]) -> None:
    """Add the entries of the module's `state_dict()` in its order: parameters, persistent buffers, children."""
    visits[0] += 1
    if depth > MAX_MODULE_DEPTH or visits[0] > MAX_TENSORS or len(records) > MAX_TENSORS:
        raise Refused(f"its modules nest deeper than {MAX_MODULE_DEPTH} or are more than {MAX_TENSORS:,}")
    state = module.state
    if not isinstance(state, dict):
        raise Refused(f"{module.name} has no state: not a module")
    if module.name.startswith("__torch__."):
        if module.name not in attributes:
            raise Refused(f"class {module.name} is not in the archive's code")
        own = {name: state.get(name) for name in attributes[module.name]}
        children = {name: value for name, value in state.items() if isinstance(value, Inert)}
    else:
        parts: list[Any] = [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
        unsaved = state.get("_non_persistent_buffers_set", set())
        if not all(isinstance(part, dict) for part in parts) or not isinstance(unsaved, set | frozenset | list):
            raise Refused(f"{module.name} has no parameters, buffers and modules: not a module")
        own = {**parts[0], **{name: value for name, value in parts[1].items() if name not in unsaved}}
        children = parts[2]
    for name, value in own.items():
        if value is not None:
            if not isinstance(name, str) or f"{prefix}{name}" in records:
                raise Refused(f"entry {short(name)} of {short(prefix)} is given twice or is not named by text")
            records[f"{prefix}{name}"] = value
    for name, child in children.items():
        if child is not None:
            if not isinstance(child, Inert) or not isinstance(name, str):
                raise Refused(f"module {short(name)} of {short(prefix)} is {short(child)}")
            _walk(child, f"{prefix}{name}.", records, attributes, depth=depth + 1, visits=visits)


def load_entry(name: str, record: Any, content: Content) -> Tensor:
    """The tensor of one entry. Raises Refused for an odd name, a value that is no tensor, and non-finite numbers.

    Infinities are allowed in an entry named attn_mask: such a mask is made of them.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 512 or not name.isprintable():
        raise Refused(f"an entry named {short(name)}")
    if not isinstance(record, TensorRecord | Tensor):
        raise Refused(f"{name} is {short(record)}, not a tensor")
    if isinstance(record, Tensor):
        tensor = record
    else:
        assert content.load is not None  # records come from containers with a pickle
        tensor = content.load(record)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        if not name.endswith("attn_mask") or torch.isnan(tensor).any():
            raise Refused(f"{name} holds numbers that are not finite")
    return tensor
