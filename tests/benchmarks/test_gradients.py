"""The table of gradients: what it compares, against numpy, and that it still runs."""

import numpy as np
import pytest
import torch

from benchmarks import gradients


def test_comparison_matches_numpy_and_leaves_out_what_has_no_direction():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 6))
    a[1], b[2] = 0, 0
    cosine, squared, without, channels = gradients.compare([torch.tensor(a)], [torch.tensor(b)])
    rows = [0, 3]
    cosines = [a[r] @ b[r] / np.linalg.norm(a[r]) / np.linalg.norm(b[r]) for r in rows]
    assert cosine == pytest.approx(1 - np.mean(cosines)) and (without, channels) == (2, 4)
    assert squared == pytest.approx(((a - b) ** 2).sum() / (b**2).sum())
    assert gradients.compare([torch.tensor(a)], [torch.tensor(a)])[:2] == (pytest.approx(0), 0)


def test_prints_a_line_for_every_look(shared_data, capsys):
    options = ["--image-size", "64", "--first", "1", "--every", "1", "--visits", "1"]
    assert gradients.main(["--root", str(shared_data / "bccd"), *options]) == 0
    title, _, head, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert "yolov8_narrow, 64 px" in title and head.split()[0] == "norms" and len(rows) == 2
    for row, norms in zip(rows, ("batch", "group")):
        cells = row.split()
        assert cells[:2] == [norms, "1"] and all(0 <= float(cell) for cell in cells[2:8])
