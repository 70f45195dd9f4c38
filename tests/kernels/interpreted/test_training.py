"""A student taught through the kernels learns what it learns through their specifications."""

import numpy as np
import pytest

from benchmarks.distill_step import TERMS, our_steps
from benchmarks.train_step import random_batch
from config import TermConfig
from kernels.backend import IS_INTERPRETED

STEPS, BATCH_SIZE, IMAGE_SIZE = (2, 1, 64) if IS_INTERPRETED else (200, 8, 320)
MASKED = TermConfig("yolov8s", "masked_mse", 0.01, ("p4",), adapter="conv1x1")


@pytest.mark.slow
def test_yolov8n_from_yolov8s(device, monkeypatch):
    """The losses of every step, on one batch, class beliefs, channels and masked maps distilled at once, in float32."""
    batch = tuple(part.to(device) for part in random_batch(BATCH_SIZE, IMAGE_SIZE))
    losses = {}
    for kernels in ("eager", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        step = our_steps(batch, (*TERMS["cwd+soft_class"], MASKED), False, True)["distilled"]
        losses[kernels] = np.array([step() for _ in range(STEPS)])
    np.testing.assert_allclose(losses["triton"][:10], losses["eager"][:10], rtol=1e-4)
    np.testing.assert_allclose(losses["triton"], losses["eager"], rtol=0.02)  # rounding grows with the steps
    assert len(set(losses["triton"])) == STEPS
