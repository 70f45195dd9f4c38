"""A CLIP of two narrow blocks a tower with fixed random weights, classes to ask it for, and pictures."""

import torch

from teachers.clip import CLIP
from tests.golden import recipe

DEPTH = 2


def tiny_clip(seed: int = 0, **settings) -> CLIP:
    torch.manual_seed(seed)
    sizes = dict(patch=32, image_width=128, text_width=64, embedding_width=24, depth=DEPTH)
    model = CLIP(**sizes, **settings)
    for name, parameter in model.named_parameters():
        if name != "logit_scale" and "tokens.weight" not in name:
            parameter.data = torch.randn(parameter.shape) * 0.1 + (1 if "norm" in name and "weight" in name else 0)
    return model.eval().requires_grad_(False)


def with_classes(model: CLIP, num_classes: int = 3, num_background: int = 2) -> CLIP:
    rng = torch.Generator().manual_seed(5)
    width = model.background.shape[1]
    names = [f"name {chr(97 + k)}" for k in range(num_classes)]
    vectors = torch.randn(num_classes + num_background, width, generator=rng)
    model.set_class_embeddings(names, vectors[:num_classes], vectors[num_classes:])
    return model


def pictures(batch: int = 2, height: int = 96, width: int = 160) -> torch.Tensor:
    return torch.from_numpy(recipe.image(batch, height, width)).float()
