"""Shapes: the limits, draws and mutations, and the way from a shape to a file, a model, a checkpoint and back."""

import pytest
import torch

import checkpoint
import fine_tuning
import models
from distill.pruning.files import read_widths
from engine.search.config import SearchConfig
from engine.search.space import Shape, count_flops, space_of
from engine.training.flops import forward_flops
from errors import UserError
from layers.channel_groups import find_groups
from random_streams import Stream, seeded_generator

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = Shape((8, 24, 32, 56, 64), (2, 1, 3, 1, 2))


@pytest.fixture(scope="module")
def space():
    return space_of("yolov8_half", 3, 64, SearchConfig(flops=0.9, least=0.7, widths=(0.5, 1.5), depth=3))


def test_draws_and_mutations_are_within_the_limits(space):
    assert (
        space.channels[1] == (8, 16, 24) and space.channels[4] == tuple(range(64, 193, 8)) and space.depths == (1, 2, 3)
    )
    draw = lambda number, taken=(): space.draw(seeded_generator(Stream.SHAPES, 0, number), taken)
    shapes = [draw(number) for number in range(4)]
    assert len(set(shapes)) == 4 and shapes == [draw(number) for number in range(4)] and draw(0, shapes) not in shapes
    child = space.mutate(shapes[0], seeded_generator(Stream.MUTATION, 0, 0), shapes)
    genes = [(*shape.channels, *shape.depths) for shape in (shapes[0], child)]
    assert sum(a != b for a, b in zip(*genes)) == 1
    limit = 0.9 * count_flops(Shape((8, 16, 32, 64, 128), (1, 2, 2, 1, 1)), 3, 64)  # the architecture's own
    for shape in [*shapes, child]:
        assert all(width in values for width, values in zip(shape.channels, space.channels, strict=True))
        assert set(shape.depths) <= {1, 2, 3} and 0.7 * limit <= space.flops(shape) <= limit


@pytest.mark.parametrize(
    ("shape", "classes"), [(SHAPE, 3), (Shape((16, 40, 272, 8, 64), (1, 3, 1, 2, 1)), 90)], ids=["small", "odd"]
)
def test_flops_are_those_that_a_forward_pass_counts(shape, classes):
    model = models.build("yolov8n", classes, channels=shape.channels, depths=shape.depths)
    widths = tuple(find_groups(model).widths().items())
    assert count_flops(shape, classes, 96) == forward_flops("yolov8n", 96, classes, widths=widths)


def test_the_control_is_the_architecture_with_the_largest_factor(space):
    scaled = space.scaled()
    assert scaled.depths == (1, 2, 2, 1, 1) and space.flops(scaled) <= space.high
    assert all(width % 8 == 0 for width in scaled.channels)
    own = Shape((8, 16, 32, 64, 128), (1, 2, 2, 1, 1))
    assert space_of("yolov8_half", 3, 64, SearchConfig(flops=1.0, least=0, widths=(1, 1), depth=1)).scaled() == own


def test_a_shape_is_a_file_of_widths_a_model_and_a_checkpoint(space, tmp_path):
    text = space.widths_text(SHAPE)
    (tmp_path / "shape.yaml").write_text(text)
    widths = read_widths(tmp_path / "shape.yaml", "yolov8_half")
    model = models.build("yolov8_half", 3, widths=widths).eval()
    same = models.build("yolov8_half", 3, channels=SHAPE.channels, depths=SHAPE.depths)
    shapes = {name: value.shape for name, value in same.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    about = {"arch": "yolov8_half", "names": ["a", "b", "c"], "image_size": 64}
    checkpoint.save(tmp_path / "shape.pt", about | {"ema": model.state_dict()})
    read, _ = checkpoint.load_model(tmp_path / "shape.pt")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(read(images).logits(), model(images).logits()))
    started = fine_tuning.start_model("yolov8_half", ["c", "d"], tmp_path / "shape.pt", say=lambda line: None)
    assert models.depths_of("yolov8_half", started.state_dict()) == {"depths": SHAPE.depths}
    assert find_groups(started).widths() == widths  # so it is pruned like any other


def test_depths_follow_from_names_alone():
    half = models.build("yolov8_half", 2).state_dict()
    deeper = models.build("yolov8_half", 2, depths=(1, 2, 2, 1, 3))
    assert models.depths_of("yolov8_half", half) == models.depths_of("yolov5n", half) == {}
    assert models.depths_of("yolov8_half", deeper.state_dict()) == {"depths": (1, 2, 2, 1, 3)}
    assert models.depths_of("yolov8_narrow", half) == {"depths": (1, 2, 2, 1, 1)}
    assert models.widths_of("yolov8_half", 2, deeper.state_dict()) == find_groups(deeper).widths()
    gap = {name.replace("stage3.blocks.1.", "stage3.blocks.7."): value for name, value in half.items()}
    assert models.widths_of("yolov8_half", 2, gap) is None
    widths = find_groups(deeper).widths()
    del widths["neck.top_down4.blocks.2.conv1.conv"]
    with pytest.raises(UserError, match=r"'neck\.top_down4\.blocks\.2\.conv1\.conv' is missing"):
        models.build("yolov8_half", 2, widths=widths)


def test_a_file_cannot_ask_for_a_model_of_any_depth():
    state = models.build("yolov8_half", 2).state_dict()
    for count, depth in ((32, 32), (33, 1)):  # beyond the limit the depth is the architecture's own
        more = dict.fromkeys(f"neck.top_down4.blocks.{i}.conv1.conv.weight" for i in range(count))
        found = models.depths_of("yolov8_half", {**state, **more}).get("depths", (1, 2, 2, 1, 1))
        assert found[-1] == depth


def test_the_control_lies_within_the_limit():
    """For limits below and far above the architecture's own FLOPs; where that cannot be, nothing is trained."""
    settings = {"least": 0.5, "widths": (0.5, 1.5), "depth": 2}
    for share in (0.5, 30.0):
        space = space_of("yolov8_half", 3, 64, SearchConfig(flops=share, **settings))
        assert 0.8 * space.high < space.flops(space.scaled()) <= space.high
    with pytest.raises(UserError, match=r"'search\.flops': the narrowest yolov8_half costs 0\.0.. GFLOPs, expected a"):
        space_of("yolov8_half", 3, 64, SearchConfig(flops=0.01, **settings)).scaled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (0.1, 0.4)}, r"'search\.widths': 0\.1 to 0\.4 of 8, 16, .* hold no multiple of 8"),
        ({"least": 0.999999}, r"none of 3 random shapes costs .* GFLOPs and is new"),
    ],
)
def test_a_space_without_shapes_is_refused(changes, message, monkeypatch):
    monkeypatch.setattr("engine.search.space.TRIES", 3)
    settings = {"flops": 0.5, "least": 0.5, "widths": (0.5, 1.5), "depth": 2} | changes
    with pytest.raises(UserError, match=message):
        space_of("yolov8_half", 3, 64, SearchConfig(**settings)).draw(seeded_generator(Stream.SHAPES, 0, 0))
