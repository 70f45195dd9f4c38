"""Renaming by tables, filling models strictly both ways, and naming the family of weights that do not fit."""

import pytest
import torch
from torch import nn

import models
from errors import UserError
from weights import PublicLayout, fuse_entries, guess_family, load_public, rename

# rename -------------------------------------------------------------------------------------------------------------


def test_rename():
    state = {"m.0.w": 1, "m.12.q.3.w": 2, "m.0.b": 3, "dfl.x": 4}
    table = [("m.0.", "stem."), ("m.12.q.{}.", "stage{}.q."), ("dfl.", None)]
    assert rename(state, table) == {"stem.w": 1, "stage3.q.w": 2, "stem.b": 3}
    assert list(rename(state, table)) == ["stem.w", "stage3.q.w", "stem.b"]


@pytest.mark.parametrize(
    ("state", "table", "reason"),
    [
        ({"a.w": 1, "b.w": 1}, [("a.", "x.")], "'b.w' is claimed by no row"),
        ({"a.b.w": 1}, [("a.", "x."), ("a.b.", "y.")], r"'a.b.w' is claimed by \['a.', 'a.b.'\]"),
        ({"a.w": 1}, [("a.", "x."), ("b.", "y.")], r"rows no key used: \['b.'\]"),
        ({"a.w": 1}, [("a.", "x."), ("a.", "y.")], "is claimed by"),
        ({"a.1.w": 1, "a.2.w": 1}, [("a.{}.", "x.")], "both become 'x.w'"),
        ({"a.one.w": 1}, [("a.{}.", "x.{}.")], "no row"),
        ({"axw": 1}, [("a.w", "x")], "no row"),  # a dot is a dot
        ({"z.a.w": 1}, [("a.", "x.")], "no row"),  # rows match the start
        ({}, [("a.", None)], "rows no key used"),
    ],
)
def test_rename_refuses(state, table, reason):
    with pytest.raises(KeyError, match=reason):
        rename(state, table)


# load_public --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    public_names = [("model.0.", "stem."), ("model.1.m.{}.", "blocks.{}."), ("model.2.", "head."), ("dfl", None)]  # noqa: RUF012
    class_head = ("head.",)

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, num_classes)


def public_state(model: nn.Module) -> dict:
    table = [("stem.", "model.0."), ("blocks.{}.", "model.1.m.{}."), ("head.", "model.2.")]
    return {**rename(model.state_dict(), table), "dfl": torch.arange(16.0)}


def assert_untouched(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_load_public_fills_everything_and_casts():
    source, model = Small(), Small()
    state = {name: t.half() if t.is_floating_point() else t for name, t in public_state(source).items()}
    report = load_public(model, state)
    assert set(report.loaded) == set(model.state_dict())
    for name, value in model.state_dict().items():
        expected = source.state_dict()[name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected.half().to(value.dtype) if value.is_floating_point() else expected)


def test_load_public_reads_a_path(tmp_path):
    source, model = Small(), Small()
    torch.save({"model": public_state(source)}, tmp_path / "a.pt")
    assert load_public(model, tmp_path / "a.pt").source == str(tmp_path / "a.pt")
    assert_untouched(model, source.state_dict())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("model.1.m.1.bias"), r"1 missing \(blocks.1.bias\)"),
        (lambda s: s.update({"model.1.m.2.bias": torch.ones(4)}), r"1 unexpected \(blocks.2.bias\)"),
        (lambda s: s.update({"model.3.bias": torch.ones(4)}), "'model.3.bias' is claimed by no row"),
        (lambda s: s.pop("dfl"), r"rows no key used: \['dfl'\]"),
        (
            lambda s: s.update({"model.1.m.1.bias": torch.ones(1, 4)}),
            r"blocks.1.bias is \(1, 4\), the model's is \(4,\)",
        ),
        (lambda s: s.update({"model.1.m.1.bias": torch.ones(4).long()}), "blocks.1.bias is torch.int64"),
        (lambda s: s.update({"model.2.bias": torch.ones(3)}), "only the class head differs: fine_tuning.start_model"),
    ],
)
def test_load_public_refuses_and_leaves_the_model(change, reason):
    model, state = Small(), public_state(Small())
    change(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=reason):
        load_public(model, state)
    assert_untouched(model, before)


def test_load_public_without_counters():
    state = public_state(Small())
    del state["model.0.1.num_batches_tracked"]
    assert "stem.1.num_batches_tracked" not in load_public(Small(), state).loaded


# families -----------------------------------------------------------------------------------------------------------


def golden_shapes(meta: dict) -> dict:
    return {name: tuple(shape) for name, shape, *_ in meta["keys"]}


YOLO = [f"{family}{size}" for family in ("yolov8", "yolov5") for size in "nsmlx"] + [f"yolov5{s}u" for s in "nsmlx"]
YOLO += ["yolov7-tiny"]


@pytest.mark.parametrize("arch", YOLO)
def test_families_of_released_names(arch, golden):
    assert guess_family(golden_shapes(golden(arch)[1])) == arch


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("yolov8n", "yolov8s"),
        ("yolov8n", "yolov8m"),
        ("yolov5nu", "yolov5n"),
        ("yolov5n", "yolov5nu"),
        ("yolov5n", "yolov8n"),
        ("yolov7-tiny", "yolov5n"),
    ],
)
def test_wrong_family_is_named(theirs, ours, golden):
    shapes = golden_shapes(golden(theirs)[1])
    state = {name: torch.zeros(shape, dtype=torch.float32 if shape else torch.int64) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=f"these are {theirs} weights, the model is {ours}"):
        load_public(models.build(ours, 80), state)


def test_unknown_families_are_not_guessed():
    assert guess_family({}) is None
    assert guess_family({"w": (3,)}) is None
    assert guess_family({"model.0.conv.weight": (16, 3, 3, 3)}) is None
    eleven = {"model.0.conv.weight": (16, 3, 3, 3), "model.23.cv2.0.0.conv.weight": (64, 64, 3, 3)}
    assert "layer 23" in guess_family(eleven)


# layouts ------------------------------------------------------------------------------------------------------------


def join_stem(state: dict) -> dict:
    return fuse_entries(state, (".left.", ".right."), ".both.")


HALVES = PublicLayout(
    "halves",
    [("stem.conv.both.", "stem.0."), ("stem.norm.", "stem.1."), ("m.{}.", "blocks.{}."), ("head.", "head.")],
    convert=join_stem,
)
PLAIN = PublicLayout("plain", [("stem.", "stem."), ("blocks.", "blocks."), ("head.", "head.")])


class Layered(Small):
    public_layouts = (PublicLayout("first", Small.public_names), HALVES, PLAIN)


def halves_state(model: nn.Module) -> dict:
    ours = model.state_dict()
    state = {f"stem.conv.left.{kind}": ours[f"stem.0.{kind}"][:1] for kind in ("weight", "bias")}
    state |= {f"stem.conv.right.{kind}": ours[f"stem.0.{kind}"][1:] for kind in ("weight", "bias")}
    table = [("stem.1.", "stem.norm."), ("blocks.{}.", "m.{}."), ("head.", "head."), ("stem.0.", None)]
    return state | rename(ours, table)


@pytest.mark.parametrize(
    ("layout", "make_state"), [("first", public_state), ("halves", halves_state), ("plain", lambda m: m.state_dict())]
)
def test_the_layout_that_fits_is_taken(layout, make_state):
    source, model = Layered(), Layered()
    report = load_public(model, make_state(source))
    assert report.layout == layout
    assert_untouched(model, source.state_dict())
    assert load_public(Small(), public_state(source)).layout == "released"


def test_layouts_are_matched_without_counters():
    state = {name: value for name, value in halves_state(Layered(7)).items() if "num_batches" not in name}
    assert load_public(Layered(7), state).layout == "halves"


@pytest.mark.parametrize(
    ("make_state", "change", "reason"),
    [
        (halves_state, lambda s: s.pop("m.1.bias"), r"1 missing \(blocks.1.bias\)"),
        (halves_state, lambda s: s.update(x=torch.ones(1)), r"'x' is claimed by no row \(read as the halves layout\)"),
        (
            halves_state,
            lambda s: s.pop("stem.conv.left.bias"),
            r"right.bias' is there without 'stem.conv.left.bias' \(read as the halves layout\)",
        ),
        (public_state, lambda s: s.pop("dfl"), r"rows no key used: \['dfl'\] \(read as the first layout\)"),
        (
            lambda m: {"other": torch.ones(1)},
            lambda s: None,
            r"'other' is claimed by no row \(read as the first layout",
        ),
    ],
)
def test_what_fits_no_layout_is_reported_against_the_nearest(make_state, change, reason):
    model, state = Layered(), make_state(Layered())
    change(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=reason):
        load_public(model, state)
    assert_untouched(model, before)


def test_fuse_entries():
    state = {"b.k.w": torch.ones(1, 3), "z": torch.zeros(()), "b.q.w": torch.zeros(2, 3), "b.q.k": torch.ones(1)}
    fused = fuse_entries(state, (".q.w", ".k.w"), ".qk.w")
    assert list(fused) == ["z", "b.qk.w", "b.q.k"]
    assert torch.equal(fused["b.qk.w"], torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3]))
    assert len(state) == 4  # the given state is not changed
    with pytest.raises(KeyError, match=r"'b.q.w' is there without 'b.k.w'"):
        fuse_entries({"b.q.w": torch.zeros(2, 3)}, (".q.", ".k."), ".qk.")
    for shape in [(1, 4), (1,), ()]:
        with pytest.raises(KeyError, match="does not join"):
            fuse_entries({"b.q.w": torch.zeros(2, 3), "b.k.w": torch.zeros(shape)}, (".q.", ".k."), ".qk.")


class Pair(nn.Module):
    """Two parts whose released names two layouts give the other way around."""

    public_layouts = (
        PublicLayout("straight", [("a.", "conv."), ("b.", "norm.")]),
        PublicLayout("crossed", [("a.", "norm."), ("b.", "conv.")]),
    )
    class_head = ()

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)


@pytest.mark.parametrize("layout", ["straight", "crossed"])
def test_a_layout_that_fits_goes_before_one_that_only_claims_every_name(layout):
    theirs = {"straight": {"conv": "a", "norm": "b"}, "crossed": {"conv": "b", "norm": "a"}}[layout]
    state = {
        name.replace(part, released): value
        for name, value in Pair().state_dict().items()
        for part, released in theirs.items()
        if name.startswith(part) and "num_batches_tracked" not in name
    }
    assert load_public(Pair(), state).layout == layout


def test_a_model_of_one_layout_names_none():
    with pytest.raises(UserError, match=r"'x' is claimed by no row$"):
        load_public(Small(), {**public_state(Small()), "x": torch.ones(1)})
