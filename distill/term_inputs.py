"""What a term is given in a step: TermInputs. What the models do not have is a ValueError, refused before training."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.adapters import resize_to
from distill.losses.masks import location_scores, positive_masks, score_maps
from distill.outputs import head_level, level_layout, named_map
from structures import Targets


@dataclass(frozen=True)
class TermInputs:
    """One pair of a term in one step, and what can be asked about the batch.

    targets: the objects of the batch, in pixels of the student's images.
    s_output, t_output: all outputs of both models; t_output.image_size differs where the teacher sees another size.
    student, teacher: the models. s_name, t_name: what the pair is called in their outputs.
    s_map, t_map: of a term that compares maps, the student's after the adapter and the teacher's, (B, C, H, W) both, at
    the student's grid. Of one that compares images, s_map is the student's map.
    classes: columns of the classes that both models have (class_names.join_classes); None where the lists are equal.
    content: (B, 1, H, W) bool at the grid of s_map, where the term looks; None: everywhere.
    shared: values computed once for all terms of a teacher in a step.
    """

    targets: Targets
    s_output: Any
    t_output: Any
    student: Any = None
    teacher: Any = None
    s_name: str = ""
    t_name: str = ""
    s_map: Tensor | None = None
    t_map: Tensor | None = None
    classes: tuple[Tensor, Tensor] | None = None
    content: Tensor | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the student's images in pixels."""
        return self.s_output.image_size

    def maps(self) -> dict[str, Tensor]:
        """s_map and t_map, as the losses of maps take them."""
        return {"s_map": self.s_map, "t_map": self.t_map}

    def grid(self) -> dict[str, Any]:
        """The keyword arguments that tell distill.losses.masks the grid of s_map."""
        return dict(batch_size=len(self.s_map), grid_size=tuple(self.s_map.shape[2:]), image_size=self.image_size)

    def logits(self) -> dict[str, Tensor]:
        """s_logits and t_logits, the outputs of the pair's names; of class logits the columns that both models have."""
        s, t = named_map(self.s_output, self.s_name), self.t_logits()
        has_common = self.classes is not None and self.s_name == "class_logits"
        return {"s_logits": s[..., self.classes[0].to(s.device)] if has_common else s, "t_logits": t}

    def t_logits(self) -> Tensor:
        """The teacher's output of the pair's name; of logits of classes the columns that both models have."""
        t = named_map(self.t_output, self.t_name).detach()
        has_common = self.classes is not None and self.t_name in ("class_logits", "image_logits")
        return t[..., self.classes[1].to(t.device)] if has_common else t

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), computed for the first pair of a step that asks."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def teacher_scores(self) -> Tensor:
        """(B, A): masks.location_scores of the dense teacher, of the classes that both models have."""
        return self.once(("scores", self.classes is None), lambda: location_scores(*self._score_logits()))

    def teacher_score_map(self) -> Tensor:
        """(B, H, W): the teacher's scores at the level of its map of this pair, at the grid of s_map."""
        scores = self._score_maps()[head_level(self.teacher, self.t_output, self.t_name)]
        return (scores if self.content is None else scores * self.content)[:, 0]

    def teacher_score_sum(self) -> Tensor:
        """The sum of the teacher's scores over all levels, (): about how many locations see an object."""
        return torch.cat([level.flatten(1) for level in self._score_maps()], 1).sum()

    def _score_maps(self) -> list[Tensor]:
        """masks.score_maps of the teacher, (B, 1, H, W), each at the grid that the student has for it.

        Where the teacher sees another image size, all its grids differ from the student's by one factor: this pair's.
        """
        logits, objectness = self._score_logits()
        make = lambda: score_maps(logits, **level_layout(self.t_output, logits), t_objectness_logits=objectness)
        levels = self.once(("score_maps", self.classes is None), make)
        (h, w), (t_h, t_w) = self.s_map.shape[2:], named_map(self.t_output, self.t_name).shape[2:]
        sizes = [(max(round(m.shape[1] * h / t_h), 1), max(round(m.shape[2] * w / t_w), 1)) for m in levels]
        return [resize_to(level[:, None], size) for level, size in zip(levels, sizes)]

    def _score_logits(self) -> tuple[Tensor, Tensor | None]:
        """The teacher's class logits (B, A, K) of the classes that both have, and its objectness logits (B, A)."""
        logits = getattr(self.t_output, "class_logits", None)
        if logits is None:
            raise ValueError("the teacher has no class_logits to weight with")
        logits = logits if self.classes is None else logits[..., self.classes[1].to(logits.device)]
        return logits, getattr(self.t_output, "objectness_logits", None)

    def positives(self) -> Tensor:
        """(B, A) int64: the row of targets that each location of a dense student learns, or -1."""
        if not hasattr(self.student, "positives"):
            raise ValueError("the student assigns objects to no locations: it is not dense")
        return self.once("positives", lambda: self.student.positives(self.s_output, self.targets))

    def positive_mask(self) -> Tensor:
        """(B, 1, H, W) bool: the pixels that learn an object, of the level of the student's map of this pair."""
        gt_index = self.positives()
        levels = positive_masks(gt_index >= 0, **level_layout(self.s_output, gt_index))
        return levels[head_level(self.student, self.s_output, self.s_name)]
