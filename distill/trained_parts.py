"""What a term trains beside the student: adapters, and losses that are modules, built with the widths of its maps."""

from typing import Any

from torch import nn

from config import TermConfig
from distill.adapters import build_adapter, normalises
from distill.checks import FIXED_MAPS
from distill.outputs import named_map
from distill.term_inputs import ClassColumns
from distill.terms import LOSSES
from errors import UserError, naming


def build_adapters(term: TermConfig, s_probe: Any, t_probe: Any, classes: ClassColumns | None) -> nn.ModuleList:
    """One adapter per pair of maps; UserError where the pair cannot be joined.

    s_probe, t_probe: outputs of both models for any images. classes: the columns that both have; None: equal lists.
    """
    entry = LOSSES[term.loss]
    if entry.compares != "map" and term.adapter != "none":
        raise UserError(f"loss {term.loss!r} compares {entry.compares}, not maps: expected adapter none")
    pairs = zip(term.student_maps, term.teacher_maps)
    if entry.compares in FIXED_MAPS:
        return nn.ModuleList(nn.Identity() for _ in pairs)
    return nn.ModuleList(adapter_of_pair(term, s_probe, t_probe, *pair, classes) for pair in pairs)


def adapter_of_pair(
    term: TermConfig, s_probe: Any, t_probe: Any, s_name: str, t_name: str, classes: ClassColumns | None
) -> nn.Module:
    """The adapter between two maps; Identity between logits, image logits, and maps that need none."""
    entry = LOSSES[term.loss]
    try:
        s, t = named_map(s_probe, s_name), named_map(t_probe, t_name)
    except KeyError as error:
        raise UserError(f"map {error.args[0]}") from None
    shapes = f"{s_name} {tuple(s.shape)} of the student and {t_name} {tuple(t.shape)} of the teacher"
    if entry.compares == "logits":
        has_common_columns = classes is not None and s_name == t_name == "class_logits" and s.shape[:2] == t.shape[:2]
        if s.shape != t.shape and not has_common_columns:
            raise UserError(f"logits {shapes} must have equal shapes")
        return nn.Identity()
    # By name as well: the logits (B, A, 4, R) of edges have four dimensions, and no pixels.
    is_t_fine = t.dim() == 2 if entry.compares == "image" else t_name in t_probe.features and t.dim() == 4
    if not (is_t_fine and s_name in s_probe.features and s.dim() == 4):
        raise UserError(f"{shapes} are not maps (B, C, H, W)")
    if entry.compares == "image" or (term.adapter == "none" and not entry.same_width):
        return nn.Identity()
    with naming(f"{s_name} and {t_name}", ValueError):
        adapter = build_adapter(term.adapter, s.shape[1], t.shape[1])
    if normalises(adapter) and entry.runs_teacher_layers and not term.parameters.get("rescale", True):
        raise UserError("the teacher's layers cannot take a normalised map: expected rescale: true")
    return adapter


def build_losses(term: TermConfig, s_probe: Any, t_probe: Any, classes: ClassColumns | None) -> nn.ModuleList:
    """The module of each pair, or Identity for a loss that trains nothing. Its errors are about term.parameters."""
    entry = LOSSES[term.loss]
    losses = nn.ModuleList()
    for s_name, t_name in zip(term.student_maps, term.teacher_maps):
        if entry.module is None:
            losses.append(nn.Identity())
            continue
        t_width = named_map(t_probe, t_name).shape[1]
        widths: tuple[int, ...] = (t_width,)
        if entry.compares == "image":
            widths = (named_map(s_probe, s_name).shape[1], t_width if classes is None else len(classes.student))
        losses.append(entry.module(*widths, **term.parameters))
    return losses
