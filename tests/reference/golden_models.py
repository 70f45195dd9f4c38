"""The public state dict and the input picture that a golden file of tests/golden was recorded with."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from boxes import xyxy_to_cxcywh
from models import build
from tests.golden import recipe
from weights import load_public, rename


@contextmanager
def undrawn() -> Iterator[None]:
    """Models that are built in here have no initial weights, which take as long to draw as a golden's to fill."""
    keep = lambda tensor, *args, **options: tensor
    with patch.object(Tensor, "uniform_", keep), patch.object(Tensor, "normal_", keep):
        yield


def public_state(meta: dict, kept: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Every public key in the file's order; `kept` holds the entries the recipe leaves to the model, but counters."""
    state = {}
    for name, shape, dtype in meta["keys"]:
        values = recipe.fill(name, tuple(shape), meta["gain"], meta["salt"])
        if values is None:
            values = kept[name] if name in kept else np.zeros(shape)
        state[name] = torch.from_numpy(np.asarray(values)).to(getattr(torch, dtype)).reshape(shape)
    return state


def golden_image(meta: dict) -> Tensor:
    """(B, 3, H, W) float32."""
    return torch.from_numpy(recipe.image(**meta["image"])).float()


def relative_error(ours: Tensor, golden: np.ndarray) -> float:
    """||ours - golden|| / ||golden||, after the shapes were found equal."""
    assert ours.shape == golden.shape
    ours = ours.detach().double().numpy()
    return np.linalg.norm(ours - golden) / np.linalg.norm(golden.astype(np.float64))


def check_anchor_golden(model: nn.Module, arrays: dict[str, np.ndarray], meta: dict, maps: tuple[str, ...]) -> None:
    """These maps, the logits and the decoded predictions of YOLOv5 and YOLOv7, with the golden's weights."""
    with torch.no_grad():
        output = model.eval()(golden_image(meta))
        boxes_xyxy, scores = model.decode(output)
    for name in maps:
        assert relative_error(output.features[name][:, ::8], arrays[name]) < 1e-5, name
        assert output.features[name].shape[1] == model.channels[name]
    raw = torch.cat((output.box_logits, output.objectness_logits[..., None], output.class_logits), dim=-1)
    start = 0
    for name in ("p3", "p4", "p5"):
        shape = arrays[f"raw_{name}"].shape  # (B, 3, H, W, 5 + K)
        count = math.prod(shape[1:4])
        assert relative_error(raw[:, start : start + count].reshape(shape), arrays[f"raw_{name}"]) < 1e-5, name
        start += count
    decoded = arrays["decoded"]  # (B, A, 5 + K): the released code reports objectness and class apart
    assert relative_error(xyxy_to_cxcywh(boxes_xyxy), decoded[..., :4]) < 1e-5
    assert relative_error(scores, decoded[..., 4:5] * decoded[..., 5:]) < 1e-5


def check_anchor_free_golden(arch: str, arrays: dict[str, np.ndarray], meta: dict, bins_name: str) -> None:
    """Counts, names, maps, logits and decoded predictions of YOLOv8 and YOLOv5u."""
    with undrawn():
        model = build(arch, meta["nc"])
    own = sum(p.numel() for p in model.parameters())
    assert own + 16 == meta["params"]  # the released model counts its constant bins 0..15
    state = public_state(meta, {bins_name: np.arange(16.0)})
    renamed = rename(state, model.public_names)
    assert set(renamed) == set(model.state_dict()) and len(renamed) == len(state) - 1
    load_public(model, state)
    with torch.no_grad():
        output = model.eval()(golden_image(meta))
        boxes_xyxy, scores = model.decode(output)
    decoded = torch.cat((xyxy_to_cxcywh(boxes_xyxy), scores), dim=-1).transpose(1, 2)
    for ours, name in [
        (output.features["p3"][:, ::8], "p3"),
        (output.features["p4"][:, ::8], "p4"),
        (output.features["p5"][:, ::8], "p5"),
        (output.box_logits.flatten(2).transpose(1, 2), "raw_boxes"),
        (output.class_logits.transpose(1, 2), "raw_scores"),
        (decoded, "decoded"),
    ]:
        assert relative_error(ours, arrays[name]) < 1e-5, name
