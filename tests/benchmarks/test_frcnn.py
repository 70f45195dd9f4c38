"""The benchmark of Faster R-CNN still runs, and its two sides are given the same."""

import pytest
import torch

from benchmarks import frcnn
from benchmarks.timing import random_batch


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("row", ["RoIAlign", "infer mobilenet_v3_large_320"])
def test_prints_its_table(row, capsys, keep_threads):
    frcnn.main(["--image-size", "64", "--batch-size", "1", "--rounds", "1", "--threads", "1", "--only", row])
    said = capsys.readouterr().out.splitlines()
    assert "torchvision" in said[0] and len(said) == 3 and said[2].startswith(row)


def test_a_training_step_learns(keep_threads):
    torch.set_num_threads(1)
    images, targets = batch = random_batch(1, 64, objects=3, num_classes=frcnn.NUM_CLASSES)
    assert images.shape == (1, 3, 64, 64) and len(targets.labels) == 3
    assert (targets.boxes_xyxy >= 0).all() and (targets.boxes_xyxy <= 64).all()
    steps = frcnn.training_steps("mobilenet_v3_large", batch, None, False)
    first = steps["ours"]()
    assert first > 0 and steps["ours"]() != first


def test_detects_what_torchvision_detects():
    """From the same weights and picture: the whole way, with torchvision's own selection."""
    pytest.importorskip("torchvision")
    image = random_batch(1, 128)[0]
    peer = frcnn.peer_model("mobilenet_v3_large_320", 128).eval()
    frcnn.calibrate(peer.backbone, image)
    peer.eval()
    torch.nn.init.normal_(peer.roi_heads.box_predictor.cls_score.weight, std=0.05)
    model = frcnn.our_model("mobilenet_v3_large_320", peer).eval()
    with torch.no_grad():
        theirs, ours = peer(list(image))[0], model.detect(model(image), **frcnn.SELECTION)[0]
    assert len(ours) > 5 and ours.labels.tolist() == (theirs["labels"] - 1).tolist()
    torch.testing.assert_close(ours.boxes_xyxy, theirs["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.scores, theirs["scores"], rtol=1e-4, atol=1e-5)
