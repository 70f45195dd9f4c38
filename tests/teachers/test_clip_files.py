"""Files of CLIP: OpenAI's archives in half precision, both generations of Hugging Face's, damaged and foreign ones."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from errors import UserError
from models import TEACHERS, build_teacher
from teachers.clip import CLIP, HUGGING_FACE_NAMES, OPENAI_NAMES, build_clip, drop_sizes, join_and_transpose
from tests.teachers.tiny_clip import DEPTH, pictures, tiny_clip
from weights import guess_family, load_public, read_state_dict, row_pattern

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> CLIP:
    return tiny_clip()


def openai_state(model: CLIP) -> dict[str, torch.Tensor]:
    """Our state under the released names, by the table read from right to left."""
    state = {}
    for name, value in model.state_dict().items():
        old, match = next((old, m) for old, new in OPENAI_NAMES if (m := row_pattern(new).match(name)))
        state[old.format(*match.groups()) + name[match.end() :]] = value
    return state


def hugging_face_state(model: CLIP) -> dict[str, torch.Tensor]:
    """Our state as transformers' CLIPModel keeps it, written out by hand."""
    ours = model.state_dict()
    state = {"logit_scale": ours["logit_scale"], "text_projection.weight": ours["text_tower.projection"].T.contiguous()}
    state["visual_projection.weight"] = ours["image_tower.projection"].T.contiguous()
    state["vision_model.embeddings.class_embedding"] = ours["image_tower.class_token"]
    state["vision_model.embeddings.patch_embedding.weight"] = ours["image_tower.patches.project.weight"]
    state["text_model.embeddings.token_embedding.weight"] = ours["text_tower.tokens.weight"]
    for theirs, mine in (("vision_model", "image_tower"), ("text_model", "text_tower")):
        state[f"{theirs}.embeddings.position_embedding.weight"] = ours[f"{mine}.positions"]
        for kind in ("weight", "bias"):
            if mine == "image_tower":
                state[f"{theirs}.pre_layrnorm.{kind}"] = ours[f"{mine}.first_norm.{kind}"]
            last = "post_layernorm" if mine == "image_tower" else "final_layer_norm"
            state[f"{theirs}.{last}.{kind}"] = ours[f"{mine}.last_norm.{kind}"]
            for i in range(len(model.image_tower.blocks)):
                layer, block = f"{theirs}.encoder.layers.{i}.", f"{mine}.blocks.{i}."
                for part, value in zip("qkv", ours[f"{block}attention.qkv.{kind}"].chunk(3)):
                    state[f"{layer}self_attn.{part}_proj.{kind}"] = value.clone()
                for old, new in (
                    ("self_attn.out_proj", "attention.out"),
                    ("layer_norm1", "norm1"),
                    ("layer_norm2", "norm2"),
                    ("mlp.fc1", "mlp.expand"),
                    ("mlp.fc2", "mlp.contract"),
                ):
                    state[f"{layer}{old}.{kind}"] = ours[f"{block}{new}.{kind}"]
    return state


def old_hugging_face_state(model: CLIP) -> dict[str, torch.Tensor]:
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    return hugging_face_state(model) | positions


@pytest.mark.parametrize(
    ("make_state", "layout"),
    [(openai_state, "OpenAI"), (hugging_face_state, "Hugging Face"), (old_hugging_face_state, "Hugging Face")],
)
def test_round_trip_of_every_layout(model, make_state, layout):
    fresh, state = tiny_clip(seed=1), make_state(model)
    report = load_public(fresh, dict(reversed(state.items())))  # the order in the file is nothing
    assert report.layout == layout
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_entries_of_the_real_files():
    """302 and 398 names of ViT-B/32 and /16; nothing is left over, and the sizes are told apart."""
    for name in ("vit_b32", "vit_b16"):
        with torch.device("meta"):
            model = build_clip(name)
            for make_state, count, suffix in (
                (openai_state, 302, ""),
                (hugging_face_state, 398, " (Hugging Face layout)"),
            ):
                state = make_state(model)
                shapes = {key: tuple(value.shape) for key, value in state.items()}
                assert len(state) == count and guess_family(shapes) == f"clip_{name}{suffix}"


def test_released_names_are_those_recorded(golden):
    _, meta = golden("clip_vit_b16")
    with torch.device("meta"):
        state = openai_state(build_clip("vit_b16"))
    assert {name: list(value.shape) for name, value in state.items()} == {
        name: shape for name, shape, _ in meta["keys"]
    }


def as_modules(state: dict[str, torch.Tensor]) -> nn.Module:
    """A module that has these entries as parameters, and integers as buffers."""
    root = nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if value.is_floating_point():
            module.register_parameter(last, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(last, value)
    return root


@pytest.mark.filterwarnings("ignore")
def test_an_archive_in_half_precision_with_sizes(model, tmp_path):
    sizes = {
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    state = {name: value.half() for name, value in openai_state(model).items()} | sizes
    torch.jit.save(torch.jit.script(as_modules(state)), tmp_path / "ViT-B-32.pt")
    found, info = read_state_dict(tmp_path / "ViT-B-32.pt")
    assert info.container == "TorchScript zip" and info.dtypes == {"float16": len(state) - 3, "int64": 3}
    assert (
        info.family == "clip_vit_b32" and set(found) == set(state) and set(drop_sizes(found)) == set(state) - set(sizes)
    )
    fresh = tiny_clip(seed=1)
    assert load_public(fresh, tmp_path / "ViT-B-32.pt").layout == "OpenAI"
    for name, value in model.state_dict().items():
        assert fresh.state_dict()[name].dtype == torch.float32
        assert torch.equal(fresh.state_dict()[name], value.half().float()), name


def test_safetensors(model, tmp_path):
    save_file(old_hugging_face_state(model), tmp_path / "model.safetensors")
    fresh = tiny_clip(seed=1)
    assert load_public(fresh, tmp_path / "model.safetensors").layout == "Hugging Face"
    images = pictures()
    assert torch.equal(fresh(images).image_embedding, model(images).image_embedding)


@pytest.mark.parametrize(
    ("make_state", "change", "reason"),
    [
        (openai_state, lambda s: s.pop("text_projection"), "rows no key used: .*text_projection"),
        (openai_state, lambda s: s.update(extra=torch.ones(1)), "'extra' is claimed by no row"),
        (openai_state, lambda s: s.pop("ln_final.bias"), r"1 missing \(text_tower.last_norm.bias\)"),
        (hugging_face_state, lambda s: s.pop("visual_projection.weight"), "no entry 'visual_projection.weight'"),
        (
            hugging_face_state,
            lambda s: s.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            "there without 'text_model.encoder.layers.1.self_attn.k_proj.bias'",
        ),
    ],
)
def test_damaged_files_are_named(model, make_state, change, reason):
    state = make_state(model)
    change(state)
    with pytest.raises(UserError, match=reason) as caught:
        load_public(tiny_clip(), state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make_state", [openai_state, hugging_face_state])
@pytest.mark.parametrize(("theirs", "ours"), [("vit_b32", "vit_b16"), ("vit_b16", "vit_b32")])
def test_files_of_another_size_are_refused_in_one_line(make_state, theirs, ours):
    with torch.device("meta"):
        state, model = make_state(build_clip(theirs)), build_clip(ours)
    with pytest.raises(UserError, match=rf"these are clip_{theirs}.* weights, the model is clip_{ours}$") as caught:
        load_public(model, state)
    assert "\n" not in str(caught.value)


def test_joining_keeps_queries_keys_and_values_in_their_order(model):
    state = old_hugging_face_state(model)
    joined = join_and_transpose(state)
    layer = "vision_model.encoder.layers.1.self_attn."
    for part, value in zip("qkv", joined[f"{layer}qkv.weight"].chunk(3)):
        assert torch.equal(value, state[f"{layer}{part}_proj.weight"])
    assert torch.equal(joined["visual_projection.weight"], state["visual_projection.weight"].T)
    assert len(state) - len(joined) == 2 + 2 * 2 * DEPTH * 2 and len(HUGGING_FACE_NAMES) == len(OPENAI_NAMES)


def test_teachers_by_name():
    assert {"clip_vit_b32", "clip_vit_b16"} <= set(TEACHERS)
    with torch.device("meta"):
        teacher = build_teacher("clip_vit_b16")
    assert not teacher.training and teacher.size_multiple == 16 and teacher.class_head == ()
    assert teacher.channels["patches"] == 768 and teacher.channels["dense"] == 512 and teacher.num_classes == 0
