"""The benchmarks of NMS and the training step still run, and compare what they say they compare."""

import pytest
import torch

from benchmarks import nms, train_step


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_heads_hold_as_many_candidates_as_their_rows_say():
    generator = torch.Generator().manual_seed(0)
    few = nms.head_of_candidates(100, 0.25, generator)
    assert (few[:, 4:] > 0.25).sum() == 100
    assert (nms.head_of_candidates(8400, 0.001, generator)[0, 4:].amax(0) > 0.001).all()
    assert (nms.head_of_noise(generator)[:, 4:] > 0.001).all()
    trained = nms.head_of_trained_model(generator)[0, 4:]
    assert trained.shape == (80, 8400) and 0.01 < (trained > 0.001).float().mean() < 0.1
    found = nms.our_detections(few, 0.25, False)
    assert 0 < len(found) <= 100 and nms.same_rows(found.boxes_xyxy, found.boxes_xyxy) == len(found)


def test_nms_prints_its_tables(capsys, keep_threads):
    nms.main(["--rounds", "1"])
    said = capsys.readouterr().out
    assert "8,400 candidates, score > 0.001" in said and "30,000 boxes, at most 30,000" in said


def test_train_step_prints_its_table(capsys, keep_threads):
    train_step.main(["--image-size", "64", "--batch-size", "1", "--rounds", "1", "--threads", "1"])
    said = capsys.readouterr().out
    assert all(name in said for name in train_step.VARIANTS)
