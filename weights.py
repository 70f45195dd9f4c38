"""Public weight files -> named tensors -> our models, without running anything a file names.

`rename` maps released names to ours by a table with one row per name pattern; `load_public` applies a model's own
table strictly both ways.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from errors import UserError


def rename(state: dict[str, Tensor], table: list[tuple[str, str | None]]) -> dict[str, Tensor]:
    """Rename each key by the one row that matches its start; each {} is one integer, and a None row drops the key.

    Raises KeyError for a key claimed by no row or by two, for a row no key used, and for two keys with one
    target. Values are never touched: a transpose or split gets a named function of its own, with a test.
    """
    rows = [(old, re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new) for old, new in table]
    renamed: dict[str, Tensor] = {}
    unused = [old for old, _ in table]
    for key, value in state.items():
        hits = [(old, match, new) for old, pattern, new in rows if (match := pattern.match(key))]
        if len(hits) != 1:
            raise KeyError(f"{key!r} is claimed by {[old for old, _, _ in hits] or 'no row'}")
        old, match, new = hits[0]
        if old in unused:
            unused.remove(old)
        if new is not None:
            target = new.format(*match.groups()) + key[match.end() :]
            if target in renamed:
                raise KeyError(f"{key!r} and another key both become {target!r}")
            renamed[target] = value
    if unused:
        raise KeyError(f"rows no key used: {sorted(unused)}")
    return renamed


@dataclass(frozen=True)
class LoadReport:
    """What `load_public` did: `loaded` names of ours that were filled, `fresh` class-head names left as they were."""

    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]


def load_public(model: nn.Module, state_or_path: dict[str, Tensor] | str | Path, new_head: bool = False) -> LoadReport:
    """Fill `model` with public weights: every released name is claimed by one row of `model.public_names`, every
    parameter and buffer of ours is filled, every shape is equal; values are cast to the dtype of the parameter.

    Args:
        state_or_path: public names -> tensors, or a file that `read_state_dict` reads.
        new_head: entries under the prefixes `model.class_head` whose shape differs keep the model's own values
            (a class head for another number of classes). They are listed in the report and printed.
    Raises UserError, with the model untouched, for anything left over on either side. The one tolerance: BatchNorm's
    step counters `num_batches_tracked`, which no forward in eval mode reads, may be absent from old files.
    """
    if isinstance(state_or_path, dict):
        source, state = "the given state", state_or_path
    else:
        source, state = str(state_or_path), read_state_dict(state_or_path)[0]
    try:
        renamed = rename(state, model.public_names)
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]}{_family_hint(model, state)}") from None
    own = model.state_dict()
    missing = [name for name in own if name not in renamed and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in renamed if name not in own]
    if missing or unexpected:
        found = "; ".join(
            f"{len(names)} {what} ({_some(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise UserError(f"{source}: {found}{_family_hint(model, state)}")
    fresh, wrong = [], []
    for name, value in renamed.items():
        if value.shape != own[name].shape:
            is_head = name.startswith(tuple(model.class_head))
            (fresh if new_head and is_head else wrong).append(name)
        elif value.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{source}: {name} is {value.dtype}, the model's is {own[name].dtype}")
    if wrong:
        shapes = f"{wrong[0]} is {tuple(renamed[wrong[0]].shape)}, the model's is {tuple(own[wrong[0]].shape)}"
        head_only = not new_head and all(name.startswith(tuple(model.class_head)) for name in wrong)
        advice = "; only the class head differs: new_head=True starts it fresh" if head_only else ""
        more = f" ({len(wrong)} shapes differ)" if len(wrong) > 1 else ""
        raise UserError(f"{source}: {shapes}{more}{advice or _family_hint(model, state)}")
    loaded = tuple(name for name in renamed if name not in fresh)
    model.load_state_dict({**own, **{name: renamed[name].to(own[name].dtype) for name in loaded}}, strict=True)
    if fresh:
        print(f"{source}: {len(fresh)} entries of the class head start fresh: {', '.join(fresh)}")
    return LoadReport(source, loaded, tuple(fresh))


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _family_hint(model: nn.Module, state: dict[str, Tensor]) -> str:
    return ""


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], None]:
    raise UserError(f"{path}: reading files is not written yet")
