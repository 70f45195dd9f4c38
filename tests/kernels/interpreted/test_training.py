"""A student taught through the kernels: its losses and gradients are those of their specifications, step after step."""

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.timing import random_batch
from config import OptimizerConfig, TermConfig
from engine.training.optimization import build_optimizer
from kernels.backend import IS_INTERPRETED

STEPS, BATCH_SIZE, IMAGE_SIZE = (2, 1, 64) if IS_INTERPRETED else (200, 16, 320)
MASKED = TermConfig(gpu.TEACHER, "masked_mse", 0.01, ("p4",), adapter="conv1x1")


def setting(device, bfloat16: bool) -> gpu.Setting:
    return gpu.Setting("yolov8n", True, "kernels", device, gpu.Scale(IMAGE_SIZE, BATCH_SIZE), bfloat16)


@pytest.mark.slow
def test_every_step_has_the_losses_and_gradients_of_the_specifications(device, monkeypatch):
    """From the same weights, in float32, at each step of a training run: class outputs, channels, masked maps."""
    student, criterion, forward = gpu.our_forward(setting(device, bfloat16=False), MASKED)
    optimizer = build_optimizer((student, criterion), OptimizerConfig(learning_rate=1e-3, momentum=0.9))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    images, targets = (part.to(device) for part in random_batch(BATCH_SIZE, IMAGE_SIZE))
    images = images.contiguous(memory_format=torch.channels_last)
    names = {f"{loss}_{gpu.TEACHER}" for loss in ("cwd", "soft_class", "masked_mse")}
    for number in range(STEPS):
        found = {}
        for kernels in ("eager", "triton"):
            monkeypatch.setenv("KERNELS", kernels)
            terms = forward(images, targets, gpu.no_mark)
            for name in names:
                gradients = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
                gradient = torch.cat([g.flatten() for g in gradients if g is not None])
                found[kernels, name] = terms[name].item(), gradient
        for name in names:
            (value, gradient), (expected, expected_gradient) = found["triton", name], found["eager", name]
            assert value == pytest.approx(expected, rel=1e-4) and expected > 0, (number, name)
            assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm(), (number, name)
        (sum(terms.values()) * len(images)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.slow
def test_a_run_through_the_kernels_learns_as_one_through_the_specifications(device, monkeypatch):
    """Two runs of train.py's step, in bfloat16. Rounding grows along a run, so later only means are compared."""
    losses = {}
    for kernels in ("eager", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        step = gpu.build_step(setting(device, bfloat16=True))
        losses[kernels] = np.array([sum(step(number, gpu.no_mark).values()) for number in range(STEPS)])
    np.testing.assert_allclose(losses["triton"][:2], losses["eager"][:2], rtol=0.01)
    means = [losses[kernels].reshape(2, -1).mean(1) for kernels in ("triton", "eager")]
    np.testing.assert_allclose(*means, rtol=0.05)
    assert len(set(losses["triton"])) == STEPS
