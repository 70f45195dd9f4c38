"""The evaluator benchmark's set, made small: it is COCO-like, and ours equals pycocotools on it."""

import contextlib
import io

import numpy as np
import pytest

from benchmarks import evaluator


def test_ours_equals_pycocotools_on_the_benchmarks_set():
    pytest.importorskip("pycocotools")
    data = evaluator.generate(40, seed=0)
    assert np.bincount(data["image"]).tolist() == [100] * 40
    assert 5 < len(data["object_image"]) / 40 < 10 and data["object_crowd"].any()
    with contextlib.redirect_stdout(io.StringIO()):
        _, expected = evaluator.run_pycocotools(data)
    _, got = evaluator.run_ours(data)
    assert got == pytest.approx(expected, abs=1e-12)
    assert 0.2 < got["AP"] < 0.5
