"""teachers.clip: both towers against the released models and float64 mathematics, image and region logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.losses.box_classes import box_class_kl
from distill.losses.logits import image_kl
from errors import UserError
from models import build_teacher
from teachers.clip import CLIP
from teachers.clip_tokenizer import ClipTokenizer
from tests.reference import clip as reference
from tests.reference.golden_models import golden_image, public_state, relative_error, undrawn
from tests.teachers.tiny_clip import DEPTH, pictures, tiny_clip, with_classes
from weights import load_public

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> CLIP:
    return tiny_clip()


# the released models -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reproduces_the_released_models(golden):
    """Features and logits of both; the weights that their recorded models have in common are made once."""
    state = {}
    for name in ("clip_vit_b32", "clip_vit_b16"):
        arrays, meta = golden(name)
        meta["keys"] = [key for key in meta["keys"] if key[0] not in state or list(state[key[0]].shape) != key[1]]
        state |= public_state(meta, {"logit_scale": np.array(math.log(1 / 0.07))})
        with undrawn():
            model = build_teacher(name)
        assert sum(p.numel() for p in model.parameters()) == meta["params"] and len(state) == 302
        assert load_public(model, state).layout == "OpenAI"
        with torch.no_grad():
            texts = model.text_tower(torch.from_numpy(arrays["tokens"]).long())
            model.set_class_embeddings(meta["texts"], texts, texts[:1])
            output = model(golden_image(meta) * model.std + model.mean)  # recorded without normalisation
        assert relative_error(output.image_embedding, arrays["image_features"]) < 1e-5
        assert relative_error(texts, arrays["text_features"]) < 1e-5
        assert relative_error(output.image_logits, arrays["logits_per_image"]) < 1e-5


# towers --------------------------------------------------------------------------------------------------------------


def in_numpy(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_image_tower_matches_float64_reference(model, size):
    images = pictures(1, *size)
    output = model(images)
    normalised = ((images - model.mean) / model.std)[0].double().numpy()
    vector, dense, maps = reference.image_tower(normalised, in_numpy(model.image_tower), patch=32, heads=2, depth=DEPTH)
    assert relative_error(output.image_embedding[0], vector) < 1e-5
    rows = {name: value[0].flatten(1).T for name, value in output.features.items()}
    assert relative_error(rows["dense"], dense) < 1e-5
    for i, tokens in enumerate(maps):
        assert relative_error(rows[f"block{i}"], tokens) < 1e-5
    assert torch.equal(output.features["patches"], output.features[f"block{DEPTH - 1}"])


def test_text_tower_matches_float64_reference(model):
    ids = torch.zeros(3, 77, dtype=torch.int64)
    ids[0, :5] = torch.tensor([49406, 320, 1125, 269, 49407])
    ids[1, :77] = torch.cat((torch.tensor([49406]), torch.arange(100, 175), torch.tensor([49407])))
    ids[2, :2] = torch.tensor([49406, 49407])
    got = model.text_tower(ids)
    tower = in_numpy(model.text_tower)
    wanted = np.stack([reference.text_tower(row, tower, heads=1, depth=DEPTH) for row in ids.numpy()])
    assert relative_error(got, wanted) < 1e-5
    torch.testing.assert_close(model.text_tower(ids[[0, 2]]), got[[0, 2]], rtol=1e-5, atol=1e-5)  # no matter with whom
    assert model.text_tower(ids[:0]).shape == (0, 24)


def test_names_sizes_and_shapes(model):
    images = pictures(2, 64, 96)
    output = model(images)
    assert list(output.features) == [*(f"block{i}" for i in range(DEPTH - 1)), "dense", f"block{DEPTH - 1}", "patches"]
    assert set(output.features) == set(model.strides) == set(model.channels)
    for name, feature_map in output.features.items():
        assert feature_map.shape == (2, model.channels[name], 2, 3) and model.strides[name] == 32
    assert output.image_size == (64, 96) and output.image_logits is None and output.images is images
    for size in ((64, 90), (30, 64), (0, 32)):
        with pytest.raises(ValueError, match="expected multiples of 32"):
            model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("requested", "features", "num_blocks", "parts"),
    [
        ({"patches"}, ["patches"], 2, []),
        ({"block0"}, ["block0"], 1, []),
        ({"dense"}, ["dense"], 2, []),
        ({"image_embedding", "block1"}, ["block1"], 2, ["image_embedding"]),
        ({"image_logits"}, [], 2, ["image_embedding", "image_logits"]),
        (set(), [], 0, []),
    ],
)
def test_only_what_is_requested_is_computed(requested, features, num_blocks, parts):
    model, images, ran = with_classes(tiny_clip()), pictures(), []
    everything = model(images)
    for block in model.image_tower.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    model.requested_outputs = frozenset(requested)
    output = model(images)
    assert list(output.features) == features and len(ran) == num_blocks
    assert all(torch.equal(output.features[name], everything.features[name]) for name in features)
    for part in ("image_embedding", "image_logits"):
        assert (getattr(output, part) is not None) == (part in parts)
        assert part not in parts or torch.equal(getattr(output, part), getattr(everything, part))


def test_images_are_normalised_inside(model):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    seen = []
    handle = model.image_tower.patches.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(mean)
    model(mean + torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1))
    handle.remove()
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 32, 32))
    assert not {"mean", "std", "classes", "background"} & set(model.state_dict())


# image logits --------------------------------------------------------------------------------------------------------


def test_image_logits_are_scaled_cosines():
    model = with_classes(tiny_clip())
    output = model(pictures())
    wanted = reference.scaled_cosines(output.image_embedding.double().numpy(), model.classes.double().numpy(), 1 / 0.07)
    np.testing.assert_allclose(output.image_logits.numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert output.image_logits.shape == (2, 3) and model.num_classes == 3 and model.class_names[0] == "name a"
    s_logits = torch.zeros(2, 3, requires_grad=True)
    image_kl(s_logits=s_logits, t_logits=output.image_logits, temperature=2.0).backward()
    assert s_logits.grad.abs().sum() > 0


def test_classes_by_name(model, shared_data):
    tokenizer = ClipTokenizer(shared_data / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz")
    model = tiny_clip()
    model.set_classes(
        ["RBC", "WBC", "Platelets"], tokenizer, templates=("a {name}.", "{article} {name}"), background=["sky"]
    )
    vectors = F.normalize(model.encode_texts(["a WBC.", "a WBC"], tokenizer), dim=1).mean(0)
    torch.testing.assert_close(model.classes[1], F.normalize(vectors, dim=0))
    torch.testing.assert_close(model.background, F.normalize(model.encode_texts(["sky"], tokenizer), dim=1))
    torch.testing.assert_close(model.classes.norm(dim=1), torch.ones(3))
    for names, message in (([], "found none"), (["dog " * 80], "tokens, expected at most 75"), (["7"], "found '7'")):
        with pytest.raises(UserError, match=message):
            model.set_classes(names, tokenizer)
    assert model.class_names == ("RBC", "WBC", "Platelets") and len(model.classes) == 3  # nothing changed


def test_embeddings_of_other_shapes_are_refused(model):
    for classes, background in (((2, 24), (1, 24)), ((3, 23), (1, 24)), ((3, 24), (0, 24)), ((3, 24), (1, 23))):
        with pytest.raises(ValueError, match="J at least 1"):
            model.set_class_embeddings(["a", "b", "c"], torch.ones(classes), torch.ones(background))
    assert model.num_classes == 0


# region logits -------------------------------------------------------------------------------------------------------

BOXES = [torch.tensor([[0.0, 0, 160, 96], [10, 20, 60, 90], [100, 5, 101, 6]]), torch.tensor([[40.0, 0, 130, 77]])]


@pytest.mark.parametrize("context", [1.0, 1.5])
def test_the_box_of_the_whole_image_is_the_image_resized(context):
    model = with_classes(tiny_clip(context=context))
    images = pictures()
    resized = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    whole = [torch.tensor([[0.0, 0, 160, 96]])] * 2
    got = model.class_logits_at(model(images), whole)
    torch.testing.assert_close(got[:, 1:], model(resized).image_logits, rtol=1e-4, atol=1e-4)
    assert got.shape == (2, 4) and model.class_activation == "softmax"


def test_crops_are_pictures_of_their_own():
    """Whole pixels at the tower's own size: the crop goes through the tower as a picture would."""
    model = with_classes(tiny_clip(context=1.0))
    images = pictures(1, 256, 288)
    got = model.class_logits_at(model(images), [torch.tensor([[16.0, 24, 240, 248]])])
    torch.testing.assert_close(got[:, 1:], model(images[:, :, 24:248, 16:240]).image_logits, rtol=1e-4, atol=1e-4)
    wide = with_classes(tiny_clip(context=2.0)).class_logits_at(model(images), [torch.tensor([[72.0, 80, 184, 192]])])
    torch.testing.assert_close(wide, got, rtol=1e-4, atol=1e-4)  # 224 / 2 about the same centre


@pytest.mark.parametrize("region_mode", ["crop", "pool"])
def test_background_is_the_union_of_its_texts(region_mode):
    """The softmax gives column 0 the sum of what a softmax over all texts gives the background's."""
    model = with_classes(tiny_clip(region_mode=region_mode), num_classes=3, num_background=4)
    got = model.class_logits_at(model(pictures()), BOXES)
    all_classes = tiny_clip(region_mode=region_mode)
    all_classes.set_class_embeddings(list("abcdefg"), torch.cat((model.classes, model.background)), model.background)
    apart = all_classes.class_logits_at(all_classes(pictures()), BOXES)[:, 1:].softmax(1)
    torch.testing.assert_close(got.softmax(1)[:, 1:], apart[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.softmax(1)[:, 0], apart[:, 3:].sum(1), rtol=1e-4, atol=1e-5)


def test_pooled_boxes_match_float64_reference():
    model = with_classes(tiny_clip(region_mode="pool"))
    images = pictures()
    output = model(images)
    boxes = [torch.tensor([[0.0, 0, 160, 96], [16, 16, 80, 80], [100, 5, 101, 6]]), torch.tensor([[40.0, 8, 136, 72]])]
    got = model.class_logits_at(output, boxes)
    dense = output.features["dense"].double().numpy()
    dense = dense / np.sqrt((dense**2).sum(1, keepdims=True))
    vectors = np.stack(  # 120 parts of a side: none of them lies in two patches
        [reference.average_over_box(dense[b], box, 32, 120) for b, rows in enumerate(boxes) for box in rows.numpy()]
    )
    wanted = reference.scaled_cosines(vectors, model.classes.double().numpy(), 1 / 0.07)
    np.testing.assert_allclose(got[:, 1:].numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("crops_per_batch", [1, 2, 50])
@pytest.mark.parametrize("region_mode", ["crop", "pool"])
def test_order_batches_and_images_do_not_matter(region_mode, crops_per_batch):
    model = with_classes(tiny_clip(region_mode=region_mode, crops_per_batch=crops_per_batch))
    output = model(pictures())
    got = model.class_logits_at(output, BOXES)
    order = torch.tensor([2, 0, 1])
    turned = model.class_logits_at(output, [BOXES[0][order], BOXES[1]])
    torch.testing.assert_close(turned, got[[2, 0, 1, 3]], rtol=1e-4, atol=1e-4)
    alone = model.class_logits_at(model(pictures()[1:]), [BOXES[1]])
    torch.testing.assert_close(alone, got[3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("region_mode", ["crop", "pool"])
def test_odd_boxes(region_mode):
    model = with_classes(tiny_clip(region_mode=region_mode))
    output = model(pictures())
    none = torch.zeros(0, 4)
    assert model.class_logits_at(output, [none, none]).shape == (0, 4)
    torch.testing.assert_close(
        model.class_logits_at(output, [none, BOXES[1]]), model.class_logits_at(output, BOXES)[3:], rtol=1e-4, atol=1e-4
    )
    odd = torch.tensor([[50.0, 50, 50, 50], [-90, -90, -20, -20], [0, 0, 900, 900], [60, 60, 20, 20]])
    assert torch.isfinite(model.class_logits_at(output, [odd, odd.double()])).all()
    with pytest.raises(ValueError, match="boxes of 1 images, expected 2"):
        model.class_logits_at(output, [none])
    assert model.class_logits_at(model(torch.zeros(0, 3, 32, 32)), []).shape == (0, 4)


def test_pool_needs_its_map_and_both_need_classes(model):
    with pytest.raises(ValueError, match="call set_classes first"):
        model.class_logits_at(model(pictures()), BOXES)
    pool = with_classes(tiny_clip(region_mode="pool"))
    pool.requested_outputs = frozenset({"patches"})
    with pytest.raises(ValueError, match=r"'dense' was left out: requested_outputs is \['patches'\]"):
        pool.class_logits_at(pool(pictures()), BOXES)
    with pytest.raises(ValueError, match="must be crop or pool"):
        tiny_clip(region_mode="both")


@pytest.mark.parametrize("region_mode", ["crop", "pool"])
def test_teaches_a_sigmoid_student_about_boxes(region_mode):
    model = with_classes(tiny_clip(region_mode=region_mode))
    t_logits = model.class_logits_at(model(pictures()), BOXES)
    s_logits = torch.zeros(4, 3, requires_grad=True)
    loss = box_class_kl(s_logits=s_logits, t_logits=t_logits, t_head=model.class_activation)
    loss.backward()
    assert loss > 0 and s_logits.grad.abs().sum() > 0


@pytest.mark.parametrize("region_mode", ["crop", "pool"])
def test_logits_stay_float32_under_autocast(region_mode):
    model = with_classes(tiny_clip(region_mode=region_mode))
    exact = model(pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pictures())
        logits = model.class_logits_at(output, BOXES)
    assert output.image_logits.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(output.image_logits, exact.image_logits, rtol=0, atol=0.5)
    torch.testing.assert_close(logits, model.class_logits_at(exact, BOXES), rtol=0, atol=0.5)
