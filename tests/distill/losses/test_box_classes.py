"""Box classification, joined by name and by box; the checks of the loss and the mutants are in test_mutants."""

import math

import pytest
import torch

from datasets import class_names
from datasets.class_names import join_classes, map_classes
from datasets.voc import CLASSES
from distill.losses.box_classes import assigned_logits, box_class_kl, boxes_by_image, log_odds
from distill.losses.logits import softmax_kl
from models import build

VOC = ("aeroplane", "bicycle", "pottedplant", "tvmonitor", "person")
COCO = ("person", "bicycle", "car", "airplane", "potted plant", "tv")


def test_a_softmax_of_two_classes_and_background():
    """p = (0.5, 0.3, 0.2): class 1 has log-odds log(0.3 / 0.7), class 2 log(0.2 / 0.8)."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log() + 7
    torch.testing.assert_close(log_odds(logits, "softmax"), torch.tensor([[math.log(3 / 7), math.log(1 / 4)]]))


def test_a_softmax_teacher_and_a_sigmoid_student_can_agree():
    t = torch.randn(4, 6, dtype=torch.float64)
    s = log_odds(t, "softmax")
    assert box_class_kl(s_logits=s, t_logits=t, t_head="softmax").abs() < 1e-12
    assert box_class_kl(s_logits=t, t_logits=s, s_head="softmax").abs() < 1e-12
    assert box_class_kl(s_logits=t[:, 1:], t_logits=t, t_head="softmax") > 0.1


def test_two_classes_without_doubt_are_worth_two_hinton_losses():
    """Background impossible and two classes: each question of the two is Hinton's one."""
    s, t = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    with_background = [torch.cat((torch.full((5, 1), -1e3, dtype=torch.float64), z), 1) for z in (s, t)]
    got = box_class_kl(s_logits=with_background[0], t_logits=with_background[1], s_head="softmax", t_head="softmax")
    torch.testing.assert_close(got, 2 * softmax_kl(s_logits=s, t_logits=t))


def test_classes_are_joined_by_name_and_by_other_words_for_it():
    s_index, t_index = join_classes(VOC, COCO)
    assert s_index.tolist() == [0, 1, 2, 3, 4] and t_index.tolist() == [3, 1, 4, 5, 0]
    assert s_index.dtype == torch.int64
    s_index, t_index = join_classes(CLASSES, class_names.COCO)
    assert s_index.tolist() == list(range(20)) and t_index.tolist() == list(
        map_classes(CLASSES, class_names.COCO).columns
    )


def test_an_alias_wins_and_a_name_is_nearer_than_another_word():
    pairs = lambda *lists, **more: [columns.tolist() for columns in join_classes(*lists, **more)]
    assert pairs(["tv", "sofa"], ["couch", "tv", "bed"], aliases={"sofa": "bed"}) == [[0, 1], [1, 2]]
    assert pairs(["television", "tv"], ["tv"]) == [[1], [0]]
    assert pairs(["sofa"], ["couch", "sofa"]) == [[0], [1]]
    assert pairs(["tv", "sofa"], ["Television", "couch"], aliases={"sofa": "television"}) == [[1], [0]]
    assert pairs(["pedestrian", "car"], ["person", "car"]) == [[1], [1]]  # a person may sit


def test_names_are_equal_up_to_case_spaces_underscores_and_hyphens():
    s_index, t_index = join_classes(["Traffic Light", "dining_table"], ["DiningTable", "traffic-light"])
    assert s_index.tolist() == [0, 1] and t_index.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("student", "teacher", "aliases", "match"),
    [
        (["cat"], ["dog", "cow"], {}, "no class in common: the student has cat; the teacher has dog, cow"),
        ([], ["dog"], {}, "no class in common"),
        (["cat", "dog", "Cat"], ["dog"], {}, "student's class 'cat' stands twice"),
        (["dog"], ["tv", "t v", "dog"], {}, "teacher's class 'tv' stands twice"),
        (["cat"], ["cat"], {"kitten": "cat"}, "alias kitten: cat"),
        (["kitten"], ["cat"], {"kitten": "feline"}, "alias kitten: feline"),
        (["kitten", "cat"], ["cat"], {"kitten": "cat"}, "kitten and cat are both the teacher's cat"),
        (["1", "2"], ["0", "1"], {}, "classes 1, 2 and 0, 1 may be names, or places in one list: expected aliases"),
        (["television", "tv monitor"], ["tv"], {}, "television and tvmonitor are both the teacher's tv"),
        (
            ["television"],
            ["tv", "tvmonitor"],
            {},
            "television may be the teacher's tv and tvmonitor: expected an alias",
        ),
    ],
)
def test_lists_that_cannot_be_joined(student, teacher, aliases, match):
    with pytest.raises(ValueError, match=match):
        join_classes(student, teacher, aliases=aliases)


def test_joined_columns_are_compared_and_no_others():
    """Only the shared class moves the loss, whatever its place in either list."""
    classes = join_classes(["cat", "dog", "cow"], ["horse", "dog"])
    s, t = torch.zeros(1, 3, requires_grad=True), torch.tensor([[9.0, 2.0]])
    box_class_kl(s_logits=s, t_logits=t, classes=classes).backward()
    assert (s.grad != 0).tolist() == [[False, True, False]]


def test_boxes_go_to_their_images_and_answers_come_back_in_order():
    boxes = torch.arange(20.0).view(5, 4)
    image = torch.tensor([2, 0, 2, 0, 3])
    per_image, row = boxes_by_image(boxes, image, 5)
    assert [len(b) for b in per_image] == [2, 0, 2, 1, 0]
    assert torch.equal(per_image[2], boxes[[0, 2]])
    torch.testing.assert_close(torch.cat(per_image)[row], boxes)
    per_image, row = boxes_by_image(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2)
    assert [b.shape for b in per_image] == [(0, 4), (0, 4)] and row.shape == (0,)


def test_a_dense_student_reads_its_assigned_locations():
    class_logits = torch.randn(2, 4, 3)
    gt_index = torch.tensor([[-1, 1, -1, 0], [2, -1, -1, 2]])
    logits, row = assigned_logits(class_logits, gt_index)
    assert row.tolist() == [1, 0, 2, 2]
    torch.testing.assert_close(logits, torch.stack([class_logits[0, 1], class_logits[0, 3], *class_logits[1, [0, 3]]]))
    logits, row = assigned_logits(class_logits, torch.full((2, 4), -1))
    assert logits.shape == (0, 3) and row.shape == (0,)
    with pytest.raises(ValueError, match="gt_index"):
        assigned_logits(class_logits, gt_index[:, :2])


def test_detectors_of_different_families_teach_each_other():
    """YOLOv5 with its anchors, of other classes, teaches YOLOv8 about the objects of a batch of two images."""
    torch.manual_seed(0)
    student, teacher = build("yolov8n", num_classes=3).train(), build("yolov5n", num_classes=4).eval()
    images = torch.rand(2, 3, 64, 64)
    boxes, image = torch.tensor([[5.0, 5, 40, 50], [0, 0, 20, 20], [30, 10, 60, 60]]), torch.tensor([1, 0, 1])
    per_image, row = boxes_by_image(boxes, image, 2)
    with torch.inference_mode():
        said = teacher.class_logits_at(teacher(images), per_image)[row]
    s_logits = student.class_logits_at(student(images), per_image)[row]
    classes = join_classes(["cat", "dog", "cow"], ["cow", "horse", "cat", "sheep"])
    box_class_kl(s_logits=s_logits, t_logits=said, classes=classes).backward()
    gradient = student.head.cls[0][-1].bias.grad
    assert (gradient != 0).tolist() == [True, False, True]
