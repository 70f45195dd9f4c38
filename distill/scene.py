"""What a loss may ask about a batch beyond the two maps it compares: the Scene, and functions that read it.

A function here makes one keyword argument of a loss: a mask, a weight, a generator, the rest of a branch of the
teacher. Its own keyword-only arguments are options of the term. What cannot be had from these two models is a
ValueError, which the criterion turns into a refusal before training.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.localization import valuable_region
from distill.masks import anchor_mask, box_density, box_mask, make_anchor_sizes, positive_masks, score_maps
from structures import Targets


@dataclass(frozen=True)
class Scene:
    """What is known of a batch and of the two models while one pair of maps is compared.

    targets: its objects, in pixels of the student's images, of image_size (H, W).
    s_output, t_output: all that both models said; t_output.image_size differs where the teacher sees another size.
    student, teacher: the models themselves, for what only they can tell (beliefs about boxes, positives, tails).
    s_name, t_name: of the pair. classes: columns of the classes both know, as beliefs.join_classes gives them; None
    where the lists are equal.
    boxes: those a loss about boxes is asked about, in pixels of the student's images; labels are the student's, -1
    where a box has none.
    seed: of this step and pair, for losses that draw. shared: what was computed for another pair of the same step.
    """

    targets: Targets
    image_size: tuple[int, int]
    s_output: Any
    t_output: Any
    student: Any = None
    teacher: Any = None
    s_name: str = ""
    t_name: str = ""
    classes: tuple[Tensor, Tensor] | None = None
    boxes: Targets | None = None
    seed: int = 0
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), computed for the first pair of a step that asks."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


def imitation_mask(
    scene: Scene,
    s_map: Tensor,
    *,
    mask: Literal["boxes", "anchors", "positives"] = "boxes",
    psi: float = 0.5,
    anchor_sizes: tuple[float, ...] = (2.0, 4.0),
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
) -> Tensor:
    """Where to imitate, (B, 1, H, W): inside the boxes, near them as FGFI publishes it, or where the student learns.

    anchors: anchor_sizes are in strides of the map; the anchors of each level of YOLOv5 and of Faster R-CNN lie around
    them. positives: the locations of the map's level that the student's own assigner gives an object.
    """
    grid = dict(batch_size=len(s_map), grid_size=tuple(s_map.shape[2:]), image_size=scene.image_size)
    if mask == "boxes":
        return box_mask(scene.targets, **grid)
    if mask == "positives":
        return level_of(positive_levels(scene), s_map, "student").float()
    if mask != "anchors":
        raise ValueError(f"mask: found {mask!r}, expected boxes, anchors or positives")
    stride = scene.image_size[1] / s_map.shape[3]
    sizes = make_anchor_sizes([size * stride for size in anchor_sizes], list(anchor_ratios))
    return anchor_mask(scene.targets, **grid, anchor_sizes=sizes, psi=psi)


def foreground_mask(scene: Scene, s_map: Tensor) -> Tensor:
    """Inside the boxes: (B, 1, H, W)."""
    return imitation_mask(scene, s_map)


def foreground_density(scene: Scene, s_map: Tensor) -> Tensor:
    """One over the area of the box around each pixel, 0 outside: (B, 1, H, W)."""
    grid_size = tuple(s_map.shape[2:])
    return box_density(scene.targets, batch_size=len(s_map), grid_size=grid_size, image_size=scene.image_size)


def teacher_scores(scene: Scene, s_map: Tensor) -> Tensor:
    """The dense teacher's best class score at each pixel of the level that has this map's grid: (B, H, W)."""
    return level_of(
        scene.once(("score_maps", scene.classes is None), lambda: teacher_score_maps(scene)), s_map, "teacher"
    )


def teacher_score_maps(scene: Scene) -> list[Tensor]:
    logits = teacher_class_logits(scene)
    grids = level_grids(scene.t_output)
    objectness = getattr(scene.t_output, "objectness_logits", None)
    anchors = anchors_per_pixel(logits, grids)
    return score_maps(logits, grid_sizes=grids, anchors_per_pixel=anchors, t_objectness_logits=objectness)


def teacher_class_logits(scene: Scene) -> Tensor:
    """(B, A, K) of a dense teacher, detached; of the classes that both models know."""
    logits = getattr(scene.t_output, "class_logits", None)
    if logits is None:
        raise ValueError("the teacher has no class_logits to weight with")
    logits = logits.detach().float()
    return logits if scene.classes is None else logits[..., scene.classes[1].to(logits.device)]


def location_weight(
    scene: Scene, s_logits: Tensor, *, region: Literal["scores", "main", "valuable"] = "scores", gamma: float = 0.25
) -> Tensor:
    """What each location counts, (B, A).

    scores: the dense teacher's best class score, where it sees something. main: 1 where the student learns an object.
    valuable: 1 there and in the valuable localization region around it (localization.valuable_region, with gamma).
    """
    if region == "scores":
        return teacher_class_logits(scene).amax(-1).sigmoid()
    if region not in ("main", "valuable"):
        raise ValueError(f"region: found {region!r}, expected scores, main or valuable")
    gt_index = student_positives(scene)
    weight = gt_index >= 0
    if region == "valuable":
        boxes_xyxy, _ = scene.teacher.decode(scene.t_output)  # they fit from the first epoch on
        weight = weight | valuable_region(
            boxes_xyxy=boxes_xyxy.detach(), gt_index=gt_index, targets=scene.targets, gamma=gamma
        )
    return weight.float()


def score_sum(scene: Scene, s_logits: Tensor) -> Tensor:
    """The sum of the teacher's best class scores, (): about the number of locations where it sees something."""
    return scene.once(
        ("score_sum", scene.classes is None), lambda: teacher_class_logits(scene).amax(-1).sigmoid().sum()
    )


def student_positives(scene: Scene) -> Tensor:
    """(B, A) int64: the row of targets that each location of a dense student learns, or -1."""
    if not hasattr(scene.student, "positives"):
        raise ValueError("the student assigns objects to no locations: it is not dense")
    return scene.once("positives", lambda: scene.student.positives(scene.s_output, scene.targets))


def positive_levels(scene: Scene) -> list[Tensor]:
    """One mask (B, 1, H, W) per level of a dense student."""
    gt_index, grids = student_positives(scene), level_grids(scene.s_output)
    return positive_masks(gt_index >= 0, grid_sizes=grids, anchors_per_pixel=anchors_per_pixel(gt_index, grids))


def level_grids(output: Any) -> list[tuple[int, int]]:
    """(H, W) of the maps that a dense detector's head reads: p3, p4, ..."""
    return [tuple(m.shape[2:]) for name, m in output.features.items() if name[0] == "p" and name[1:].isdigit()]


def anchors_per_pixel(values: Tensor, grids: list[tuple[int, int]]) -> int:
    return values.shape[1] // max(sum(h * w for h, w in grids), 1)


def level_of(levels: list[Tensor], s_map: Tensor, who: str) -> Tensor:
    """The one of `levels`, (B, ..., H, W) each, that has this map's grid."""
    for level in levels:
        if level.shape[-2:] == s_map.shape[-2:]:
            return level
    grids = [tuple(level.shape[-2:]) for level in levels]
    raise ValueError(f"the {who} has no head on a grid of {tuple(s_map.shape[-2:])}, only on {grids}")


def teacher_tail(scene: Scene, s_map: Tensor) -> nn.Module:
    """What follows this map in the teacher's branch: frozen, in eval mode."""
    if not hasattr(scene.teacher, "tail"):
        raise ValueError(f"the teacher has no branch that goes on from {scene.t_name}")
    try:
        return scene.teacher.tail(scene.t_name)
    except KeyError as error:
        raise ValueError(f"the teacher's branches: {error.args[0]}") from None


def student_head(scene: Scene, s_logits: Tensor) -> str:
    return scene.student.class_activation


def teacher_head(scene: Scene, s_logits: Tensor) -> str:
    return scene.teacher.class_activation


def joined_classes(scene: Scene, s_logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Columns of the classes that both models know; None where the lists are equal."""
    return scene.classes


def box_columns(scene: Scene, s_logits: Tensor) -> Tensor:
    """(N,) the column of a softmax head that each box's label has: 0, background, for a box without one."""
    return scene.boxes.labels + 1


def step_generator(scene: Scene, s_map: Tensor) -> torch.Generator:
    """One for each step and pair of maps; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(scene.seed)


def scene_itself(scene: Scene, s_map: Tensor) -> Scene:
    return scene
