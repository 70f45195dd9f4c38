"""The inputs of a term in a step: TermInputs. ValueError for what a model lacks: the criterion refuses such a term."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distill.adapters import resize_shown, resize_to
from distill.losses.masks import location_scores, make_anchor_sizes, positive_masks, score_maps
from distill.outputs import head_level, level_layout, named_map
from structures import Targets

ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width, where none are given


class ClassColumns(NamedTuple):
    """The classes that both models have: the columns (J,) int64 of each, in one order (join_classes)."""

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class TermInputs:
    """One pair of maps (or outputs) of a term in one step, and what a loss can take from the batch."""

    targets: Targets  # the objects of the batch, in pixels of the student's images
    s_output: Any  # all outputs of the student
    t_output: Any  # all outputs of the teacher; its image_size differs if the teacher gets another image size
    student: Any = None
    teacher: Any = None
    s_name: str = ""  # the names of the pair in s_output and t_output
    t_name: str = ""
    s_map: Tensor | None = None  # (B, C, H, W), after the adapter; None for a term that compares no maps
    t_map: Tensor | None = None  # (B, C, H, W) at the grid of s_map; None for a term that compares no maps
    classes: ClassColumns | None = None  # None: equal lists
    content: Tensor | None = None  # (B, 1, H, W) bool at the grid of s_map, False where it is left out; None: all True
    t_content: Tensor | None = None  # the same at the teacher's own grid
    shared: dict[Hashable, Any] = field(default_factory=dict)  # computed once in a step for all terms of a teacher

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the student's images in pixels."""
        return self.s_output.image_size

    def maps(self) -> dict[str, Tensor]:
        """s_map and t_map, as keyword arguments of the losses of maps."""
        assert self.s_map is not None and self.t_map is not None
        return {"s_map": self.s_map, "t_map": self.t_map}

    def grid(self) -> dict[str, Any]:
        """batch_size, grid_size and image_size of s_map, as keyword arguments of distill.losses.masks."""
        assert self.s_map is not None
        return dict(batch_size=len(self.s_map), grid_size=tuple(self.s_map.shape[2:]), image_size=self.image_size)

    def logits(self) -> dict[str, Tensor]:
        """s_logits and t_logits of the pair; class logits are cut to the columns that both models have."""
        s_logits = named_map(self.s_output, self.s_name)
        if self.classes is not None and self.s_name == "class_logits":
            s_logits = s_logits[..., self.classes.student.to(s_logits.device)]
        return {"s_logits": s_logits, "t_logits": self.t_logits()}

    def t_logits(self) -> Tensor:
        """The teacher's output of the pair; class and image logits are cut to the columns that both models have."""
        t_logits = named_map(self.t_output, self.t_name).detach()
        if self.classes is not None and self.t_name in ("class_logits", "image_logits"):
            t_logits = t_logits[..., self.classes.teacher.to(t_logits.device)]
        return t_logits

    def computed_once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """compute(), kept in `shared` for the other pairs and terms of this step."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def teacher_scores(self) -> Tensor:
        """(B, A): masks.location_scores of the dense teacher, for the classes that both models have."""
        return self.computed_once(("scores", self.classes is None), lambda: location_scores(*self._score_logits()))

    def teacher_score_map(self) -> Tensor:
        """(B, H, W): the teacher's scores at the level of t_map, resized to the grid of s_map; 0 outside `content`."""
        row = head_level(self.teacher, self.t_output, self.t_name)
        level = self._score_levels()[row][:, None]
        size = self._student_size(level)
        if self.content is None or self.t_content is None:
            return resize_to(level, size)[:, 0]
        return (resize_shown(level, self.t_content, size)[0] * self.content)[:, 0]

    def teacher_score_sum(self) -> Tensor:
        """The sum of the teacher's scores over all levels, (): roughly the number of locations with an object.

        Each level is resized to the student's grid first.
        """
        levels = [level[:, None] for level in self._score_levels()]
        return torch.cat([resize_to(level, self._student_size(level)).flatten(1) for level in levels], 1).sum()

    def _score_levels(self) -> list[Tensor]:
        """masks.score_maps of the teacher, (B, H', W') at its own grids."""
        logits, objectness = self._score_logits()
        compute = lambda: score_maps(logits, **level_layout(self.t_output, logits), t_objectness_logits=objectness)
        return self.computed_once(("score_maps", self.classes is None), compute)

    def _student_size(self, level: Tensor) -> tuple[int, int]:
        """(H, W) of the student's grid at a level (B, 1, H', W') of the teacher's.

        If the teacher gets another image size, all its grids differ from the student's by one factor, this pair's.
        """
        (h, w), (t_h, t_w) = self.maps()["s_map"].shape[2:], named_map(self.t_output, self.t_name).shape[2:]
        return max(round(level.shape[2] * h / t_h), 1), max(round(level.shape[3] * w / t_w), 1)

    def _score_logits(self) -> tuple[Tensor, Tensor | None]:
        """The teacher's class logits (B, A, K), for the classes that both have, and its objectness logits (B, A)."""
        logits = getattr(self.t_output, "class_logits", None)
        if logits is None:
            raise ValueError("the teacher has no class_logits to weight with")
        if self.classes is not None:
            logits = logits[..., self.classes.teacher.to(logits.device)]
        return logits, getattr(self.t_output, "objectness_logits", None)

    def positives(self) -> Tensor:
        """(B, A) int64: the row of targets that each location of a dense student learns, or -1."""
        if not hasattr(self.student, "positives"):
            raise ValueError("the student assigns objects to no locations: it is not dense")
        return self.computed_once("positives", lambda: self.student.positives(self.s_output, self.targets))

    def positive_mask(self) -> Tensor:
        """(B, 1, H, W) bool: the pixels of s_map whose location learns an object."""
        gt_index = self.positives()
        levels = positive_masks(gt_index >= 0, **level_layout(self.s_output, gt_index))
        return levels[head_level(self.student, self.s_output, self.s_name)]

    def anchor_outputs(self) -> dict[str, Tensor]:
        """s_ and t_ box, objectness and class logits of two heads with anchors and equal classes, else ValueError."""
        if not all(hasattr(model, "anchors_pixels") for model in (self.student, self.teacher)):
            raise ValueError("both models must have objectness and anchors (YOLOv5, YOLOv7-tiny)")
        if self.classes is not None:
            raise ValueError("whole outputs can be compared where the class lists are equal")
        pairs = {"s": self.s_output, "t": self.t_output}
        names = ("box_logits", "objectness_logits", "class_logits")
        return {f"{key}_{name}": getattr(output, name) for key, output in pairs.items() for name in names}

    def teacher_tail(self) -> nn.Module:
        """The layers behind t_map in the teacher's branch, frozen, in eval mode. ValueError where there are none."""
        if not hasattr(self.teacher, "tail"):
            raise ValueError(f"the teacher has no branch that goes on from {self.t_name}")
        try:
            return self.teacher.tail(self.t_name)
        except KeyError as error:
            raise ValueError(f"the teacher's branches: {error.args[0]}") from None

    def anchors(self, sizes: tuple[float, ...] | None, ratios: tuple[float, ...]) -> Tensor:
        """The anchors at s_map, (n, 2) widths and heights in pixels of the student's images.

        They are those of the student's head at the stride of its map, or else those of the teacher's head. `sizes`, in
        strides of the map, replaces them: one anchor for each size and each of `ratios`, height / width. FGFI is not
        defined for two heads without anchors; sizes of 2 and 4 strides are used there. ValueError for ratios, other
        than the default, that the head's own anchors would replace.
        """
        pairs = ((self.student, self.s_name, self.s_output), (self.teacher, self.t_name, self.t_output))
        with_anchors = [pair for pair in pairs if hasattr(pair[0], "anchors_at")]
        if sizes is not None or not with_anchors:
            stride = self.image_size[1] / self.grid()["grid_size"][1]
            return make_anchor_sizes([size * stride for size in sizes or (2.0, 4.0)], list(ratios))
        model, name, output = with_anchors[0]
        try:
            anchors = model.anchors_at(name)
        except KeyError as error:
            raise ValueError(f"mask anchors: {error.args[0]}") from None
        if tuple(ratios) != ANCHOR_RATIOS:
            raise ValueError("anchor_ratios: the head has anchors of its own, expected anchor_sizes beside them")
        (height, width), (own_height, own_width) = self.image_size, output.image_size
        return anchors * anchors.new_tensor([width / own_width, height / own_height])


def check_anchors(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError for two heads with other anchors: a location of one predicts other boxes than that of the other."""
    models = [cast(Any, model) for model in (student, teacher) if hasattr(model, "anchors_pixels")]
    if len(models) == 2 and not torch.equal(*(model.anchors_pixels().cpu() for model in models)):
        raise ValueError("the anchors of student and teacher differ: their locations predict different boxes")
