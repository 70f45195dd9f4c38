"""The criterion on two small stand-in detectors: terms, schedules, adapters, and every refusal."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from config import GradientShare, TermConfig
from distill.checks import check_term, expected_instead
from distill.criterion import Criterion, TeacherFacts, term_factor
from distill.losses.logits import soft_class_targets
from distill.terms import LOSSES
from errors import UserError
from structures import Targets


@dataclasses.dataclass
class Output:
    features: dict[str, Tensor]
    class_logits: Tensor
    box_logits: Tensor
    image_size: tuple[int, int] = (32, 32)


class TinyDetector(nn.Module):
    """Two maps (strides 8 and 16), class logits and edge distributions at the locations of both."""

    def __init__(self, width: int, num_classes: int = 3) -> None:
        super().__init__()
        self.p3 = nn.Conv2d(3, width, 8, 8)
        self.p4 = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 2, 2))
        self.cls = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in (width, 2 * width))
        self.box = nn.ModuleList(nn.Conv2d(c, 4 * 5, 1) for c in (width, 2 * width))

    def tail(self, name: str) -> nn.Module:
        """As if the classes of one level came straight from p3, and the edges of the other from p4."""
        return {"p3": self.cls[0], "p4": self.box[1]}[name]

    def forward(self, images: Tensor) -> Output:
        p3 = self.p3(images)
        p4 = self.p4(p3)
        read = lambda convs: torch.cat([c(p).flatten(2) for c, p in zip(convs, (p3, p4))], 2).transpose(1, 2)
        return Output({"p3": p3, "p4": p4}, read(self.cls), read(self.box).unflatten(2, (4, 5)))


IMAGES = torch.rand(2, 3, 32, 32)


def term(**changes) -> TermConfig:
    fields = dict(teacher="big", loss="mse", weight=1.0, student_maps=("p3", "p4"), adapter="conv1x1")
    return TermConfig(**{**fields, **changes})


def build(*terms, student=None, teachers=None, epochs=10, **names) -> Criterion:
    torch.manual_seed(0)
    teachers = {"big": TinyDetector(6)} if teachers is None else teachers
    for teacher in teachers.values():
        teacher.eval()
    return Criterion(
        terms, student=student or TinyDetector(4), teachers=teachers, epochs=epochs, image_size=32, **names
    )


def test_terms_are_named_weighted_sums_over_maps():
    student, teacher = TinyDetector(6), TinyDetector(6)
    both = build(term(weight=2.0, adapter="none"), student=student, teachers={"big": teacher})
    s, t = student(IMAGES), teacher(IMAGES)
    losses = both(s, {"big": t}, Targets.empty(), epoch=0.0)
    assert list(losses) == ["mse_big"]
    expected = 2 * sum((s.features[m] - t.features[m]).square().mean() for m in ("p3", "p4"))
    torch.testing.assert_close(losses["mse_big"], expected)


def test_student_and_adapters_learn_and_the_teacher_does_not():
    student, teacher = TinyDetector(4), TinyDetector(6)
    criterion = build(
        term(loss="cwd"), term(loss="soft_class", student_maps=("class_logits",), adapter="none"),
        student=student, teachers={"big": teacher},
    )  # fmt: skip
    losses = criterion(student(IMAGES), {"big": teacher(IMAGES)}, Targets.empty(), epoch=0.0)
    assert set(losses) == {"cwd_big", "soft_class_big"} and all(
        v > 0 and v.dtype == torch.float32 for v in losses.values()
    )
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in student.p3.parameters())
    weights = [p for n, p in criterion.named_parameters() if n.endswith("weight")]
    assert len(weights) == 2 and all(p.grad.abs().sum() > 0 for p in weights)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("adapter", ["conv1x1", "conv1x1_norm", "conv3x3", "mlp"])
def test_bfloat16_maps_are_adapted_in_bfloat16_and_compared_in_float32(adapter):
    """Outside of autocast too: the maps carry their precision."""
    student, teacher = TinyDetector(4), TinyDetector(6)
    criterion = build(term(adapter=adapter), student=student, teachers={"big": teacher})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s, t = student(IMAGES), teacher(IMAGES)
    assert s.features["p3"].dtype == torch.bfloat16
    half = criterion(s, {"big": t}, Targets.empty(), 0.0)["mse_big"]
    full = criterion(student(IMAGES), {"big": teacher(IMAGES)}, Targets.empty(), 0.0)["mse_big"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=1e-3)
    half.backward()
    assert student.p3.weight.grad.abs().sum() > 0


def test_building_changes_nothing_in_the_models():
    """Nor in their modes: a BatchNorm that keeps its statistics goes on keeping them."""
    student, teacher = TinyDetector(4).train(), TinyDetector(6).eval()
    student.p4[0].eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    build(term(), student=student, teachers={"big": teacher})
    assert student.training and student.p4.training and not student.p4[0].training and not teacher.training
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "epoch", "expected"),
    [
        ({}, 3.0, 1.0),
        (dict(warmup_epochs=4.0), 1.0, 0.25),
        (dict(warmup_epochs=4.0), 6.0, 1.0),
        (dict(stop_epoch=8.0), 7.99, 1.0),
        (dict(stop_epoch=8.0), 8.0, 0.0),
        (dict(decay="linear", final_fraction=0.2), 5.0, 0.6),
        (dict(decay="cosine", final_fraction=0.1), 0.0, 1.0),
        (dict(decay="cosine", final_fraction=0.1), 5.0, 0.55),
        (dict(decay="cosine", final_fraction=0.1), 10.0, 0.1),
        (dict(decay="linear", warmup_epochs=2.0), 1.0, 0.5 * 0.9),
    ],
)
def test_schedule(changes, epoch, expected):
    assert term_factor(term(**changes), epoch, epochs=10) == pytest.approx(expected)


def test_schedule_scales_the_loss_and_a_stopped_term_is_logged_as_zero():
    student, teacher = TinyDetector(6), TinyDetector(6)
    criterion = build(term(adapter="none", decay="linear", stop_epoch=9.0), student=student, teachers={"big": teacher})
    s, t = student(IMAGES), {"big": teacher(IMAGES)}
    full, half, off = (criterion(s, t, Targets.empty(), epoch=e)["mse_big"] for e in (0.0, 5.0, 9.5))
    torch.testing.assert_close(half, full / 2)
    assert off == 0
    for before in (-1.0, float("nan")):  # of a warm-up: a weight below 0
        with pytest.raises(UserError, match=r"argument epoch: found .*, expected 0 or more"):
            criterion(s, t, Targets.empty(), epoch=before)


REFUSED = {
    "unknown teacher": (dict(teacher="huge"), "terms.0.teacher: found 'huge', expected one of big"),
    "unknown loss": (dict(loss="msee"), "terms.0.loss: found 'msee'"),
    "zero weight": (dict(weight=0.0), "terms.0.weight"),
    "nan weight": (dict(weight=float("nan")), "terms.0.weight"),
    "endless weight": (dict(weight=float("inf")), "terms.0.weight: found inf"),
    "never on": (dict(stop_epoch=0.0), "terms.0.stop_epoch"),
    "no maps": (dict(student_maps=()), "terms.0.student_maps"),
    "unknown map": (dict(student_maps=("p9",)), "'p9' is not among p3, p4, class_logits, box_logits"),
    "unequal lists": (dict(teacher_maps=("p3",)), "terms.0.teacher_maps: found 1, expected 2"),
    "widths": (dict(adapter="none"), "widths differ (4 and 6 channels)"),
    "parameter": (dict(parameters={"temprature": 2.0}), "found 'temprature'"),
    "logits as maps": (dict(student_maps=("class_logits",)), "are not maps"),
    "adapter on logits": (dict(loss="soft_class", student_maps=("class_logits",)), "adapter none"),
    "maps as logits": (
        dict(loss="soft_class", student_maps=("p3",), adapter="none"),
        "terms.0.student_maps: found p3, loss 'soft_class' compares class_logits",
    ),
    "edges as classes": (
        dict(loss="quality_focal", student_maps=("class_logits",), teacher_maps=("box_logits",), adapter="none"),
        "terms.0.teacher_maps: found box_logits, loss 'quality_focal' compares class_logits",
    ),
    "classes as edges": (
        dict(loss="crosskd_edges", student_maps=("p3",), teacher_maps=("cls3_1",)),
        "terms.0.teacher_maps: found 'cls3_1', a map of the branch that loss 'crosskd_edges' is not for",
    ),
    "name": (dict(name="a.b"), "terms.0.name"),
    "name of an attribute": (dict(name="train"), "terms.0.name"),
    "mask": (dict(loss="masked_mse", parameters={"mask": "ovals"}), "terms.0: mask: found 'ovals'"),
    "module parameter": (dict(loss="mgd", parameters={"drop": 1.5}), "terms.0.parameters.drop: found 1.5"),
    "padding of logits": (
        dict(loss="soft_class", student_maps=("class_logits",), adapter="none", content_only=True),
        "terms.0.content_only: loss 'soft_class' compares more than maps",
    ),
    "old name": (dict(loss="box_beliefs"), "terms.0.loss: found 'box_beliefs', which is called 'box_classes' now"),
    "images": (dict(on="labeled"), "terms.0: key 'on': found 'labeled', expected one of all, labelled, unlabelled"),
    "decay": (dict(decay="steps"), "terms.0: key 'decay': found 'steps', expected one of none, linear, cosine"),
    "text as maps": (dict(student_maps="p3"), "terms.0: key 'student_maps': found 'p3', expected a list"),
    "text as weight": (dict(weight="1"), "terms.0: key 'weight': found '1', expected a number"),
    "no head on the grid": (dict(loss="score_weighted_l2", student_maps=("c2",)), "'c2' is not among"),
}


OUT_OF_RANGE = [
    ("cwd", "temperature", 0), ("cwd", "temperature", -1.0), ("cwd", "temperature", float("nan")),
    ("cwd", "temperature", float("inf")), ("cwd", "temperature", "2"), ("cwd", "temperature", True),
    ("attention", "power", -2.0), ("soft_class", "power", -1), ("localization", "gamma", -0.5),
    ("mgd", "drop", 1.0), ("mgd", "drop", None), ("masked_mse", "psi", 1.0), ("masked_mse", "anchor_sizes", []),
    ("masked_mse", "anchor_sizes", 2.0), ("masked_mse", "anchor_ratios", [1.0, 0.0]),
    ("decoupled_mse", "foreground_weight", -1.0), ("fgd", "global_weight", float("nan")),
    ("location_similarity", "nodes", 0), ("instance_distance", "size", 2.5), ("crosskd_classes", "rescale", 1),
    ("quality_focal", "beta", float("nan")), ("softmax_kl", "max_boxes", 0), ("box_classes", "score_threshold", 1.0),
    ("objectness_scaled", "class_weight", -0.5), ("prediction_correlation", "sample_weight", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "name", "value"), OUT_OF_RANGE)
def test_a_number_that_no_loss_is_defined_for_is_refused(loss, name, value):
    maps = {"soft_class": "class_logits", "quality_focal": "class_logits", "localization": "box_logits"}.get(loss, "p3")
    maps = () if LOSSES[loss].compares in ("boxes", "outputs") else (maps,)
    with pytest.raises(UserError, match=rf"^terms\.0\.parameters\.{name}: found .*, expected ") as error:
        check_term(term(loss=loss, student_maps=maps, parameters={name: value}), "terms.0", ("big",))
    assert "\n" not in str(error.value)


NOT_READ = [
    ("masked_mse", {"psi": 0.3}, "psi: found 0.3 beside mask: boxes, .* expected mask: anchors"),
    ("masked_mse", {"mask": "positives", "anchor_sizes": [2.0]}, "anchor_sizes: found .* beside mask: positives"),
    ("localization", {"region": "main", "gamma": 0.5}, "gamma: found 0.5 beside region: main"),
    ("box_classes", {"boxes": "teacher", "at": "assigned"}, "boxes: found 'teacher' beside at: assigned"),
    ("softmax_kl", {"max_boxes": 20}, "max_boxes: found 20 beside boxes: targets, .* boxes: teacher or proposals"),
    ("decoupled_kl", {"boxes": "proposals", "score_threshold": 0.1}, "score_threshold: found 0.1 beside boxes: prop"),
]


@pytest.mark.parametrize(("loss", "parameters", "message"), NOT_READ)
def test_a_parameter_that_would_change_nothing_is_refused(loss, parameters, message):
    maps = {"localization": ("box_logits",), "masked_mse": ("p3",)}.get(loss, ())
    with pytest.raises(UserError, match=rf"^terms\.0\.parameters\.{message}") as error:
        check_term(term(loss=loss, student_maps=maps, parameters=parameters), "terms.0", ("big",))
    assert "\n" not in str(error.value)
    defaults = {name: LOSSES[loss].parameters()[name].default for name in parameters}
    check_term(term(loss=loss, student_maps=maps, parameters=defaults), "terms.0", ("big",))  # says nothing new


def test_a_final_fraction_without_a_decay_is_refused():
    with pytest.raises(UserError, match=r"^terms\.0\.final_fraction: found 0\.5 with decay none"):
        check_term(term(final_fraction=0.5), "terms.0", ("big",))


def test_a_power_below_one_is_refused():
    with pytest.raises(UserError, match=r"terms\.0: power 0\.5 must be at least 1"):
        build(term(loss="attention", parameters={"power": 0.5}))


def test_a_row_describes_its_own_loss():
    for name, entry in LOSSES.items():
        assert (entry.only_output is not None) == (entry.compares == "logits"), name
        for parameter, (other, values) in entry.only_with.items():
            assert {parameter, other} <= set(entry.parameters()) and values, f"{name}: {parameter}"


def test_every_default_is_in_its_range():
    for entry in LOSSES.values():
        for name, argument in entry.parameters().items():
            assert expected_instead(name, argument.default, argument.default) == ""
    assert (
        expected_instead("anchor_sizes", [2, 4.5], None)
        == expected_instead("max_boxes", 7.0, 100)
        == expected_instead("psi", 0, 0.5)
        == ""
    )


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_term_that_could_never_act_is_refused(changes, message):
    with pytest.raises(UserError) as caught:
        build(term(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


TARGETS = Targets(
    torch.tensor([[2.0, 3.0, 20.0, 25.0], [10.0, 0.0, 31.0, 31.0], [0.0, 16.0, 12.0, 32.0], [4.0, 1.0, 15.0, 9.0]]),
    torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 0, 0]), torch.zeros(4, dtype=torch.bool),
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if entry.compares in ("map", "logits")])
def test_every_loss_of_maps_and_logits_acts_through_the_criterion(name):
    """Above zero, with gradients for the student and for whatever the loss trains; the same for the same seed."""
    student, teacher = TinyDetector(4), TinyDetector(6).requires_grad_(False).eval()
    of_logits = "box_logits" if name == "localization" else "class_logits"
    is_map = LOSSES[name].compares == "map"
    of_maps = "p4" if name == "crosskd_edges" else "p3"
    maps = dict(student_maps=(of_maps if is_map else of_logits,), adapter="conv1x1" if is_map else "none")
    criterion = build(term(loss=name, **maps), student=student, teachers={"big": teacher})
    with torch.no_grad():
        t = {"big": teacher(IMAGES)}
    torch.manual_seed(3)
    loss = criterion(student(IMAGES), t, TARGETS, epoch=0.0)[f"{name}_big"]
    torch.manual_seed(3)
    assert torch.equal(criterion(student(IMAGES), t, TARGETS, epoch=0.0)[f"{name}_big"], loss)
    loss.backward()
    assert loss > 0 and loss.isfinite() and student.p3.weight.grad.abs().sum() > 0
    trained = dict(criterion.losses.named_parameters())
    assert bool(trained) == (name in ("fgd", "mgd"))
    assert all(p.grad is not None for p in trained.values())
    without_objects = criterion(student(IMAGES), t, Targets.empty(), epoch=0.0)[f"{name}_big"]
    assert without_objects.isfinite()


def test_options_of_masks_reach_them():
    student, teacher = TinyDetector(4), TinyDetector(6)
    values = []
    for parameters in ({}, {"mask": "anchors"}, {"mask": "anchors", "psi": 0.0}):
        criterion = build(
            term(loss="masked_mse", student_maps=("p3",), parameters=parameters), student=student,
            teachers={"big": teacher},
        )  # fmt: skip
        values.append(criterion(student(IMAGES), {"big": teacher(IMAGES)}, TARGETS, 0.0)["masked_mse_big"].item())
    assert len(set(values)) == 3


def test_relations_need_no_adapter():
    build(term(loss="attention", adapter="none"))


def test_a_share_may_be_written_as_in_a_config():
    assert build(term(weight={"share": 0.1})).terms["mse_big"].weight == GradientShare(0.1)


def test_one_name_for_two_terms_is_refused():
    with pytest.raises(UserError, match="used twice"):
        build(term(), term())


def test_class_lists_are_joined_by_name():
    """Columns are compared by what they mean: another order changes nothing, a class less leaves its column out."""
    student, teacher, shuffled, fewer = TinyDetector(4), TinyDetector(6), TinyDetector(6), TinyDetector(6, 2)
    order = [2, 0, 1]
    for other, columns in ((shuffled, order), (fewer, order[:2])):
        other.load_state_dict({**teacher.state_dict(), **{k: v for k, v in other.state_dict().items() if "cls" in k}})
        for a, b in zip(other.cls, teacher.cls):
            a.weight.data, a.bias.data = b.weight.data[columns], b.bias.data[columns]
    logits = term(loss="soft_class", student_maps=("class_logits",), adapter="none", parameters={"power": 0.0})
    named = dict(student=student, class_names=("a", "b", "c"))
    value = lambda criterion, model: criterion(student(IMAGES), {"big": model(IMAGES)}, TARGETS, 0.0)["soft_class_big"]
    facts = lambda *names, **more: {"big": TeacherFacts(names, **more)}
    same = value(build(logits, teachers={"big": teacher}, **named), teacher)
    other = build(logits, teachers={"big": shuffled}, facts=facts("C", "A", "B"), **named)
    torch.testing.assert_close(value(other, shuffled), same)
    renamed = build(logits, teachers={"big": shuffled}, facts=facts("C", "A", "x", aliases={"b": "x"}), **named)
    torch.testing.assert_close(value(renamed, shuffled), same)
    less = build(logits, teachers={"big": fewer}, facts=facts("c", "a"), **named)
    s, t = student(IMAGES).class_logits[..., [0, 2]], teacher(IMAGES).class_logits[..., [0, 2]]
    torch.testing.assert_close(value(less, fewer), soft_class_targets(s_logits=s, t_logits=t, power=0.0))


def test_what_the_teacher_calls_otherwise_is_told_once(capsys):
    logits = term(loss="soft_class", student_maps=("class_logits",), adapter="none")
    names, facts = ("sofa", "Car", "lamp"), {"big": TeacherFacts(("car", "couch", "tv"))}
    criterion = build(logits, dataclasses.replace(logits, name="b"), class_names=names, facts=facts)
    assert [columns.tolist() for columns in criterion.classes["b"]] == [[0, 1], [1, 0]]
    assert capsys.readouterr().out == "teacher 'big' has 2 of 3 classes, not lamp; sofa is its couch, Car is its car\n"
    same = build(logits, class_names=names, facts={"big": TeacherFacts(("couch", "car", "Lamp"))})
    assert same.classes == {"soft_class_big": None}  # lists that mean the same are equal lists


def test_class_lists_without_a_common_name_are_refused():
    logits = term(loss="soft_class", student_maps=("class_logits",), adapter="none")
    names = dict(class_names=("a", "b", "c"), facts={"big": TeacherFacts(("d", "e", "f"))})
    with pytest.raises(UserError, match=r"terms\.0: teacher 'big': no class in common"):
        build(logits, **names)
    build(term(), **names)  # maps do not care


def test_a_fault_of_a_teacher_names_it():
    logits = term(loss="soft_class", student_maps=("class_logits",), adapter="none")
    named, teacher = dict(class_names=("a", "b", "c")), TinyDetector(6)
    teacher.num_classes = 3
    with pytest.raises(UserError, match=r"terms\.0: teacher 'big': found 2 class names, expected 3, one for each"):
        build(logits, teachers={"big": teacher}, facts={"big": TeacherFacts(("a", "b"))}, **named)

    def forward(images):
        raise ValueError("images are 32 x 32 pixels, expected multiples of 14")

    teacher.forward = forward
    with pytest.raises(UserError, match="teacher 'big': images are 32 x 32 pixels, expected multiples of 14"):
        build(term(), teachers={"big": teacher}, **named)


def test_a_teacher_in_train_mode_is_refused():
    """Its maps would be those of the batch, and its statistics would follow the pictures."""
    with pytest.raises(UserError, match=r"^teacher 'big': found train mode, .*, expected \.eval\(\)$"):
        Criterion([term()], student=TinyDetector(4), teachers={"big": TinyDetector(6)}, epochs=1, image_size=32)


def test_no_terms_cost_nothing():
    criterion = Criterion((), student=TinyDetector(4), teachers={}, epochs=1)
    assert criterion(None, {}, Targets.empty(), epoch=0.0) == {} and not list(criterion.parameters())


MAP_LOSSES = (
    "mse cosine cwd pkd attention location_similarity instance_distance score_weighted_l2 masked_mse decoupled_mse fgd "
    "crosskd_classes crosskd_edges"
).split()  # each is 0 at the teacher's own map, up to rounding


@pytest.mark.parametrize("loss", MAP_LOSSES)
@pytest.mark.parametrize("adapter", ["conv1x1", "conv1x1_norm"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_perfect_student_costs_nothing_behind_any_adapter(loss, adapter, training):
    """Its maps are the teacher's and its convolution is the identity; another's map costs something."""
    teacher = TinyDetector(6).requires_grad_(False).eval()
    student = copy.deepcopy(teacher)
    maps = {"crosskd_classes": ("p3",), "crosskd_edges": ("p4",)}.get(loss, ("p3", "p4"))
    criterion = build(term(loss=loss, adapter=adapter, student_maps=maps), student=student, teachers={"big": teacher})
    criterion.train(training)
    (pairs,) = criterion.adapters.values()
    for pair in pairs:
        convolution = pair[0] if adapter == "conv1x1_norm" else pair
        convolution.weight.data = torch.eye(len(convolution.weight))[:, :, None, None]
        if convolution.bias is not None:
            convolution.bias.data.zero_()
    boxes_xyxy, zero = torch.tensor([[4.0, 4, 20, 20], [8, 2, 30, 25], [1, 9, 12, 30]]), torch.zeros(3).long()
    targets = Targets(boxes_xyxy, zero, zero, zero.bool())
    perfect, other = (
        criterion(student(images), {"big": teacher(IMAGES)}, targets, 0.0)[f"{loss}_big"].item()
        for images in (IMAGES, IMAGES.flip(3))
    )
    assert abs(perfect) < 1e-6 and other > 20 * abs(perfect)


def test_the_teachers_layers_read_no_normalised_map():
    cross = term(loss="crosskd_classes", student_maps=("p3",), adapter="conv1x1_norm", parameters={"rescale": False})
    with pytest.raises(UserError, match=r"terms\.0: the teacher's layers cannot take a normalised map"):
        build(cross, student=TinyDetector(6), teachers={"big": TinyDetector(6).requires_grad_(False).eval()})


def test_a_teacher_of_another_stride_is_resized():
    class Coarse(TinyDetector):
        def forward(self, images):
            out = super().forward(images)
            return Output({"tokens": out.features["p4"]}, out.class_logits, out.box_logits)

    student, teacher = TinyDetector(4), Coarse(6)
    cross = term(student_maps=("p3",), teacher_maps=("tokens",))
    criterion = build(cross, student=student, teachers={"big": teacher})
    loss = criterion(student(IMAGES), {"big": teacher(IMAGES)}, Targets.empty(), 0.0)["mse_big"]
    loss.backward()
    assert loss > 0 and student.p3.weight.grad.abs().sum() > 0
