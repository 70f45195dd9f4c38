"""Two processes learn as one with the joined batch: every detection loss and every term, by their gradients.

Each process holds some of the images, and DistributedDataParallel averages the gradients; here the test does. What
differs by construction is held fixed: batch normalisation of the models in eval mode (each process normalises its own
images), the draws of a two-stage detector (the first rows are taken), and MGD's mask (nothing is dropped).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from config import TermConfig
from distill.criterion import Criterion
from distill.terms import LOSSES
from frcnn import faster_rcnn, heads, matching
from structures import Targets
from tests.two_processes import in_two_processes

SIZE, CLASSES = 32, ("a", "b", "c")
IMAGE = [0, 0, 0, 0, 1, 1, 2, 2, 2]
UNEQUAL, ONE_EMPTY = ([0, 1], [2]), ([0, 2], [3])  # images of each process
SMALL = 2000  # gradients of parameters with at most this many numbers are compared: some of every layer
BARE = dict(student_maps=("p3", "p4"))
MAPS = BARE | dict(adapter="conv1x1")


@functools.cache
def model(arch: str, seed: int, *, learns: bool = False) -> nn.Module:
    """In eval mode, with the statistics of all images, so that maps differ from image to image down to the head."""
    torch.manual_seed(seed)
    made = models.build(arch, len(CLASSES))
    for parameter in made.parameters():  # away from the prior, so that scores differ between locations
        if parameter.numel() < 10**6:
            parameter.data += 0.05 * torch.randn_like(parameter)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches: of this one
    with torch.no_grad():
        made.train()(batch([0, 1, 2, 3])[0])
    return made.eval().requires_grad_(learns)


@dataclass
class ImageOutput:
    features: dict[str, Tensor]
    image_logits: Tensor
    image_size: tuple[int, int]


class ImageClassifier(nn.Module):
    """A teacher of whole images."""

    strides = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.classify = nn.Linear(3, len(CLASSES)).requires_grad_(False)

    def forward(self, images: Tensor) -> ImageOutput:
        return ImageOutput({"images": images}, 9 * self.classify(images.mean((2, 3))), tuple(images.shape[2:]))


def term(loss: str, teacher: str = "t", **changes) -> TermConfig:
    return TermConfig(teacher, loss, 1.0, **changes)


HEAD = dict(student_maps=("class_logits",))
TERMS = {  # by student
    "yolov8_narrow": [
        *(term(loss, **MAPS) for loss in ("mse", "cosine", "pkd", "score_weighted_l2", "decoupled_mse", "fgd")),
        *(term(loss, **BARE) for loss in ("attention", "location_similarity", "instance_distance")),
        term("cwd", **BARE, adapter="conv1x1_norm"),
        term("mgd", **MAPS, parameters={"drop": 0.0}),
        *(term("masked_mse", name=mask, **MAPS, parameters={"mask": mask})
          for mask in ("boxes", "anchors", "positives")),
        term("crosskd_classes", student_maps=("cls3_1", "cls4_2"), adapter="conv1x1"),
        term("crosskd_edges", student_maps=("box3_1", "box5_2"), adapter="conv1x1"),
        term("soft_class", **HEAD), term("quality_focal", **HEAD),
        *(term("localization", name=f"region_{region}", student_maps=("box_logits",), parameters={"region": region})
          for region in ("scores", "main", "valuable")),
        term("box_classes"), term("box_classes", name="assigned", parameters={"at": "assigned"}),
        term("image_kl", "images", student_maps=("p5",)),
    ],
    "yolov5n": [term("objectness_scaled"), term("soft_class", **HEAD), term("quality_focal", **HEAD)],
    "yolov7_tiny": [term("soft_class", **HEAD)],
    "fasterrcnn_mobilenet_v3_small": [
        *(term(loss) for loss in ("softmax_kl", "decoupled_kl", "prediction_correlation")),
        term("box_classes", "other"),
    ],
}  # fmt: skip
TEACHERS = {arch: "yolov8n" if arch == "yolov8_narrow" else arch for arch in TERMS}


def batch(rows: list[int]) -> tuple[Tensor, Targets]:
    """These of four images, of which 0, 1 and 2 have four, two and three objects, and 3 none."""
    generator = torch.Generator().manual_seed(0)
    brightness = torch.tensor([0.1, 1, 3, 2]).view(4, 1, 1, 1)
    patches = brightness * torch.rand(4, 3, SIZE // 4, SIZE // 4, generator=generator)
    images = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    corner = SIZE / 2 * torch.rand(len(IMAGE), 2, generator=generator)
    boxes_xyxy = torch.cat((corner, corner + SIZE / 4 + SIZE / 4 * torch.rand(len(IMAGE), 2, generator=generator)), 1)
    place = torch.full((4,), -1)
    place[rows] = torch.arange(len(rows))
    image = place[torch.tensor(IMAGE)]
    targets = Targets(boxes_xyxy, torch.arange(len(IMAGE)) % 3, image, torch.zeros(len(IMAGE), dtype=torch.bool))
    return images[rows], targets[image >= 0]


def losses_of(arch: str) -> tuple[Callable[[list[int]], dict[str, Tensor]], list[nn.Parameter]]:
    """rows of images -> every loss of a student and its terms by name; and the small parameters that learn."""
    student = model(arch, 1, learns=True)
    teachers = {
        "t": model(TEACHERS[arch], 2),
        "other": model("yolov5n" if arch == "yolov8_narrow" else "yolov8n", 2),
        "images": ImageClassifier(),
    }
    used = {t.teacher for t in TERMS[arch]}
    chosen = {name: teacher for name, teacher in teachers.items() if name in used}
    build = dict(student=student, epochs=1, image_size=SIZE, class_names=CLASSES)
    torch.manual_seed(3)
    criterion = Criterion(tuple(TERMS[arch]), teachers=chosen, **build)
    both = (term("box_classes", name="by_confidence"), term("box_classes", "other", name="of_the_other"))
    two = {name: teachers[name] for name in ("t", "other")}
    trusting = Criterion(both, teachers=two, teacher_weighting="confidence", **build)
    for module in (student, criterion, trusting, *teachers.values()):
        module.double()

    def compute(rows: list[int]) -> dict[str, Tensor]:
        images, targets = batch(rows)
        images = images.double()
        with torch.no_grad():
            t_outputs = {name: teacher(images) for name, teacher in teachers.items()}
        output = student(images)
        found = student.losses(output, targets) | criterion(output, t_outputs, targets, 0.0)
        return found | trusting(output, t_outputs, targets, 0.0)

    learnt = [*student.parameters(), *criterion.parameters(), *trusting.parameters()]
    return compute, [p for p in learnt if p.numel() <= SMALL]


def small_gradients(losses: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """By loss, the gradients of the parameters in one row."""
    found = {}
    for name, loss in losses.items():
        each = zip(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), parameters)
        found[name] = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in each])
    return found


def with_fixed_draws(function: Callable[[], Any]) -> Any:
    """Sampling for a two-stage detector: the first rows are taken, and fewer of them; its box head is narrow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "choose", lambda rows, count: rows[:count])
        patch.setattr(faster_rcnn, "ROI_SAMPLES", 8)
        patch.setattr(faster_rcnn, "RPN_SAMPLES", 64)
        patch.setattr(heads, "HIDDEN", 32)
        return function()


def of_process(rank: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    """By student: the gradient of every loss with the images of a process; where one has no objects, every loss."""

    def of(arch: str) -> dict[str, dict[str, Tensor]]:
        compute, parameters = losses_of(arch)
        empty = compute(ONE_EMPTY[rank])
        every = torch.autograd.grad(sum(empty.values()), parameters, allow_unused=True)  # nobody waits for anybody
        assert any(gradient is not None for gradient in every)
        return {
            "gradients": small_gradients(compute(UNEQUAL[rank]), parameters),
            "losses": {name: loss.detach() for name, loss in empty.items()},
        }

    return with_fixed_draws(lambda: {arch: of(arch) for arch in TERMS})


def alone(arch: str) -> dict[str, dict[str, Tensor]]:
    """The same of one process with the joined batch; and how far off it the mean loss of two is that count alone."""
    compute, parameters = losses_of(arch)
    joined = compute(UNEQUAL[0] + UNEQUAL[1])
    with torch.no_grad():
        own = [compute(rows) for rows in UNEQUAL]
        empty = compute(ONE_EMPTY[0] + ONE_EMPTY[1])
    return {
        "gradients": small_gradients(joined, parameters),
        "losses": empty,
        "own counts": {name: ((own[0][name] + own[1][name]) / 2 / joined[name] - 1).abs() for name in joined},
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_learn_as_one_with_the_joined_batch(tmp_path, one_thread):
    of_rtdetr = {"last_layer", "object_queries"}  # in tests/rtdetr/test_training.py
    assert {t.loss for terms in TERMS.values() for t in terms} | of_rtdetr == set(LOSSES)
    ranks = in_two_processes(of_process, tmp_path)
    table, wrong = [], []
    for arch in TERMS:
        one = with_fixed_draws(lambda arch=arch: alone(arch))
        for name, expected in one["gradients"].items():
            both = {key: (ranks[0][arch][key][name] + ranks[1][arch][key][name]) / 2 for key in ranks[0][arch]}
            size, loss = expected.abs().max(), one["losses"][name]
            error = (both["gradients"] - expected).abs().max() / size
            off = one["own counts"][name]
            row = f"{arch:30} {name:24} {error:.1e}; the loss with the counts of each process alone {off:.1e}"
            table.append(row)
            is_right = error < 1e-7 and (both["losses"] - loss).abs() <= 1e-7 * loss.abs()
            if not (size > 0 and is_right and off > 1e-3):
                wrong.append(f"{row}; loss {both['losses']:.6g}, expected {loss:.6g}")
    print(*table, sep="\n")
    assert not wrong, "\n".join(wrong)
