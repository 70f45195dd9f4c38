"""DINOv2 against the recorded outputs of the released model, its two file layouts, and what it promises of its maps."""

import numpy as np
import pytest
import torch

from errors import UserError
from models import TEACHERS, build_teacher
from teachers.dinov2 import FACEBOOK_NAMES, DINOv2, build_dinov2, fuse_query_key_value, patch_pca
from tests.reference.golden_models import golden_image, public_state, relative_error, undrawn
from tests.reference.vision_transformer import principal_components
from weights import guess_family, load_public, row_pattern

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["vits14", "vits14_reg", pytest.param("vitb14", marks=pytest.mark.slow)])
def test_reproduces_the_released_model(golden, name):
    arrays, meta = golden(f"dinov2_{name}")
    with undrawn():
        model = build_teacher(f"dinov2_{name}")
    width = model.channels["patches"]
    assert sum(p.numel() for p in model.parameters()) + width == meta["params"]  # theirs has the mask token
    assert load_public(model, public_state(meta, {})).layout == "facebookresearch"
    images = golden_image(meta)  # recorded without normalisation
    with torch.no_grad():
        output = model(images * model.std + model.mean)
    tokens = output.features["patches"].flatten(2).transpose(1, 2)[:, ::3]
    assert relative_error(tokens, arrays["patch_tokens"]) < 1e-5
    assert relative_error(output.class_token, arrays["cls_token"]) < 1e-5
    assert relative_error(output.features["block5"][:, ::8], arrays["block5_map"]) < 1e-5


def tiny(num_registers: int = 0, seed: int = 0) -> DINOv2:
    torch.manual_seed(seed)
    model = DINOv2(width=24, depth=3, heads=2, num_registers=num_registers, table_side=5)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2 + (1 if "norm" in name and "weight" in name else 0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "registers"])
def model(request):
    return tiny(request.param)


# maps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(14, 14), (28, 70), (70, 70), (126, 84)])
def test_any_size_of_whole_patches(model, size):
    output = model(torch.rand(2, 3, *size))
    grid = (size[0] // 14, size[1] // 14)
    assert output.image_size == size
    assert list(output.features) == ["block0", "block1", "block2", "patches"] == list(model.strides)
    for name, values in output.features.items():
        assert values.shape == (2, model.channels[name], *grid) and model.strides[name] == 14
        assert torch.isfinite(values).all()
    assert output.class_token.shape == (2, 24) and output.class_attention.shape == (2, 2, *grid)


@pytest.mark.parametrize("size", [(15, 14), (28, 20), (0, 14)])
def test_other_sizes_are_refused(model, size):
    with pytest.raises(ValueError, match="expected multiples of 14"):
        model(torch.rand(1, 3, *size))
    assert model.size_multiple == 14


def test_no_images():
    output = tiny()(torch.rand(0, 3, 28, 28))
    assert output.features["patches"].shape == (0, 24, 2, 2) and output.class_token.shape == (0, 24)


def test_images_do_not_mix(model):
    images = torch.rand(3, 3, 28, 42)
    together, alone = model(images), model(images[1:2])
    for name in together.features:
        torch.testing.assert_close(together.features[name][1:2], alone.features[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.class_attention[1:2], alone.class_attention, rtol=1e-4, atol=1e-6)


def test_last_block_through_the_norm_is_what_patches_are(model):
    output = model(torch.rand(1, 3, 28, 42))
    assert torch.equal(output.features["block2"], output.features["patches"])
    assert not torch.allclose(output.features["block1"], output.features["patches"])
    tokens = output.features["block0"].flatten(2).transpose(1, 2)
    tokens = (tokens - model.norm.bias) / model.norm.weight
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(1, 6), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("requested", "features", "num_blocks", "has_token", "has_attention"),
    [
        ({"patches"}, ["patches"], 3, True, False),
        ({"block0"}, ["block0"], 1, False, False),
        ({"block0", "block1"}, ["block0", "block1"], 2, False, False),
        ({"block2"}, ["block2"], 3, True, False),
        ({"class_token"}, [], 3, True, False),
        ({"class_attention", "block1"}, ["block1"], 3, True, True),
        (set(), [], 0, False, False),
    ],
)
def test_only_what_is_requested_is_computed(requested, features, num_blocks, has_token, has_attention):
    model, images, ran = tiny(4), torch.rand(1, 3, 28, 28), []
    everything = model(images)
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    model.requested_outputs = frozenset(requested)
    output = model(images)
    assert list(output.features) == features and len(ran) == num_blocks and output.image_size == (28, 28)
    assert all(torch.equal(output.features[name], everything.features[name]) for name in features)
    assert (output.class_token is not None) == has_token and (output.class_attention is not None) == has_attention
    assert not has_token or torch.equal(output.class_token, everything.class_token)


def test_class_attention_is_the_last_blocks(model):
    images = torch.rand(1, 3, 42, 28)
    seen = []
    handle = model.blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = model(images)
    handle.remove()
    block = model.blocks[-1]
    q, k, _ = block.attention.qkv(block.norm1(seen[0])).unflatten(-1, (3, 2, 12)).unbind(2)  # (1, N, heads, D)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 12**0.5
    first = seen[0].shape[1] - 6
    expected = logits.softmax(-1)[:, :, 0, first:]
    torch.testing.assert_close(output.class_attention.flatten(2), expected)
    assert (output.class_attention.sum((2, 3)) < 1).all()


def test_images_are_normalised_inside(model):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 14, 14)
    seen = []
    handle = model.patches.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(mean)
    model(mean + torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    handle.remove()
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 14, 14))
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 14, 14))
    assert {"mean", "std"}.isdisjoint(model.state_dict())


def test_registers_have_no_position():
    model = tiny(4)
    images = torch.rand(1, 3, 28, 28)
    before = model(images).features["patches"]
    model.registers.data = model.registers.data[:, [2, 0, 3, 1]]  # without positions, their order is nothing
    torch.testing.assert_close(model(images).features["patches"], before, rtol=1e-4, atol=1e-5)
    model.registers.data = -model.registers.data
    assert not torch.allclose(model(images).features["patches"], before, atol=1e-2)


# files --------------------------------------------------------------------------------------------------------------


def facebook_state(model: DINOv2) -> dict[str, torch.Tensor]:
    """Our state under the names of facebookresearch's files, by the table read from right to left."""
    state = {"mask_token": torch.zeros(1, model.channels["patches"])}
    table = [*FACEBOOK_NAMES, ("register_tokens", "registers")]
    for name, value in model.state_dict().items():
        old, match = next((old, m) for old, new in table if new and (m := row_pattern(new).match(name)))
        state[old.format(*match.groups()) + name[match.end() :]] = value
    return state


def hugging_face_state(model: DINOv2) -> dict[str, torch.Tensor]:
    """Our state as transformers' Dinov2Model keeps it, written out by hand."""
    ours = model.state_dict()
    state = {
        "embeddings.cls_token": ours["class_token"],
        "embeddings.mask_token": torch.zeros(1, ours["class_token"].shape[-1]),
        "embeddings.position_embeddings": ours["positions"],
        "embeddings.patch_embeddings.projection.weight": ours["patches.project.weight"],
        "embeddings.patch_embeddings.projection.bias": ours["patches.project.bias"],
    }
    if "registers" in ours:
        state["embeddings.register_tokens"] = ours["registers"]
    for i in range(len(model.blocks)):
        theirs, mine = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            parts = ours[f"{mine}attention.qkv.{kind}"].chunk(3)
            for part, value in zip(("query", "key", "value"), parts):
                state[f"{theirs}attention.attention.{part}.{kind}"] = value
            state[f"{theirs}attention.output.dense.{kind}"] = ours[f"{mine}attention.out.{kind}"]
            state[f"{theirs}norm1.{kind}"] = ours[f"{mine}norm1.{kind}"]
            state[f"{theirs}norm2.{kind}"] = ours[f"{mine}norm2.{kind}"]
            state[f"{theirs}mlp.fc1.{kind}"] = ours[f"{mine}mlp.expand.{kind}"]
            state[f"{theirs}mlp.fc2.{kind}"] = ours[f"{mine}mlp.contract.{kind}"]
        state[f"{theirs}layer_scale1.lambda1"] = ours[f"{mine}attention_scale"]
        state[f"{theirs}layer_scale2.lambda1"] = ours[f"{mine}mlp_scale"]
    return state | {"layernorm.weight": ours["norm.weight"], "layernorm.bias": ours["norm.bias"]}


@pytest.mark.parametrize("make_state", [facebook_state, hugging_face_state])
def test_round_trip_of_both_layouts(model, make_state):
    registers = 0 if model.registers is None else 4
    fresh, state = tiny(registers, seed=1), make_state(model)
    load_public(fresh, dict(reversed(state.items())))  # the order in the file is nothing
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_of_both_layouts_on_disk(model, tmp_path):
    """As teaching.load_file reads them: a flat torch file, and safetensors with the half precision some copies have."""
    safetensors = pytest.importorskip("safetensors.torch")
    registers = 0 if model.registers is None else 4
    torch.save(facebook_state(model), tmp_path / "facebook.pth")
    halves = {name: value.half().contiguous() for name, value in hugging_face_state(model).items()}
    safetensors.save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, convert in (("facebook.pth", lambda t: t), ("model.safetensors", lambda t: t.half().float())):
        fresh = tiny(registers, seed=1)
        load_public(fresh, tmp_path / name)
        assert all(torch.equal(value, convert(model.state_dict()[key])) for key, value in fresh.state_dict().items())


def test_hugging_face_counts():
    """223 entries of the small model's file, 224 with registers; nothing is left over."""
    for name, count in (("vits14", 223), ("vits14_reg", 224)):
        with torch.device("meta"):
            state = hugging_face_state(build_dinov2(name))
        assert len(state) == count
        assert guess_family({key: tuple(value.shape) for key, value in state.items()}) == (
            f"dinov2_{name} (Hugging Face layout)"
        )


def test_fusing_keeps_queries_keys_and_values_in_their_order():
    state = hugging_face_state(tiny())
    fused = fuse_query_key_value(state)
    name = "encoder.layer.1.attention.attention."
    rows = fused[f"{name}qkv.weight"]
    for part, value in zip(("query", "key", "value"), rows.chunk(3)):
        assert torch.equal(value, state[f"{name}{part}.weight"])
    assert len(state) - len(fused) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: s.pop("encoder.layer.1.attention.attention.key.bias"),
            r"query.bias' is there without 'encoder.layer.1.attention.attention.key.bias'.*Hugging Face layout",
        ),
        (lambda s: s.pop("layernorm.bias"), r"1 missing \(norm.bias\)"),
        (lambda s: s.update({"pooler.bias": torch.ones(3)}), "'pooler.bias' is claimed by no row.*Hugging Face layout"),
    ],
)
def test_damaged_hugging_face_files_are_named(change, reason):
    state = hugging_face_state(tiny())
    change(state)
    with pytest.raises(UserError, match=reason):
        load_public(tiny(), state)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("vits14", "vits14_reg"), ("vits14_reg", "vits14"), ("vits14", "vitb14"), ("vitb14", "vits14")]
)
@pytest.mark.parametrize("make_state", [facebook_state, hugging_face_state])
def test_files_of_another_size_or_kind_are_refused_in_one_line(theirs, ours, make_state):
    with torch.device("meta"):
        state, model = make_state(build_dinov2(theirs)), build_dinov2(ours)
    with pytest.raises(UserError, match=rf"these are dinov2_{theirs}.* weights, the model is dinov2_{ours}$") as error:
        load_public(model, state)
    assert "\n" not in str(error.value)


def test_teachers_by_name():
    assert {f"dinov2_{name}" for name in ("vits14", "vits14_reg", "vitb14", "vitb14_reg")} <= set(TEACHERS)
    teacher = build_teacher("dinov2_vits14_reg")
    assert not teacher.training and teacher.registers.shape == (1, 4, 384) and teacher.class_head == ()
    with pytest.raises(UserError, match="teacher 'dinov2_vits' is unknown, did you mean 'dinov2_vits14'"):
        build_teacher("dinov2_vits")


# pictures of maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [3, 16])
def test_pca_matches_reference(channels, dtype):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, channels, 4, 5)) * np.linspace(3, 1, channels)[:, None, None] + 7
    features = torch.tensor(features).to(dtype)
    got = patch_pca(features)
    assert got.shape == (2, 3, 4, 5) and got.dtype == torch.float32
    rows = features.double().numpy().transpose(0, 2, 3, 1).reshape(-1, channels)
    expected = principal_components(rows, 3)
    expected = (expected - expected.min(0)) / (expected.max(0) - expected.min(0))
    ours = got.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    for j in range(3):  # a sign is free, and turning it turns 0..1 around
        error = min(np.abs(ours[:, j] - expected[:, j]).max(), np.abs(1 - ours[:, j] - expected[:, j]).max())
        assert error < 1e-6


def test_pca_ignores_scale_and_shift_and_its_sign_is_settled():
    features = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patch_pca(features), patch_pca(5 * features - 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(patch_pca(features), 1 - patch_pca(-features), rtol=1e-5, atol=1e-6)
    for seed in range(16):  # along one axis, what is brighter has more of the axis's largest channel
        axis = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        line = axis.view(1, 5, 1, 1) * torch.tensor([0.0, 1.0, 3.0])
        largest = line[0, axis.abs().argmax(), 0]
        expected = (largest - largest.min()) / (largest.max() - largest.min())
        torch.testing.assert_close(patch_pca(line)[0, 0, 0], expected)


def test_pca_without_variance():
    assert patch_pca(torch.full((2, 8, 3, 3), 0.3)).abs().max() == 0
    assert patch_pca(torch.rand(2, 2, 3, 3))[:, 2].abs().max() == 0  # two channels, two components
    ramp = torch.arange(6.0).view(1, 1, 2, 3) * torch.tensor([1.0, -2.0, 3.0, 0.5]).view(1, 4, 1, 1)
    line = patch_pca(ramp)
    assert line[:, 0].max() == 1 and line[:, 1:].abs().max() == 0
    assert patch_pca(torch.rand(0, 8, 3, 3)).shape == (0, 3, 3, 3)
    assert patch_pca(torch.rand(1, 8, 1, 1)).abs().max() == 0
