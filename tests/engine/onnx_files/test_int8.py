"""The int8 graph against the PyTorch model that rounds: integers in the file, the same numbers out."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from engine.onnx_files.detector import open_session
from engine.onnx_files.int8 import calibrate, check_quantizable, trace_int8
from errors import UserError
from layers.fusion import fuse
from yolo.layers import SPPF, Bottleneck, ConvBNAct
from yolo.yolov7 import ConvBNLeaky

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


class Small(nn.Module):
    """One layer of each kind. A channel without weights has the large bias that 32 bits must hold."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvBNAct(3, 8, 3, stride=2), Bottleneck(8, (3, 3), shortcut=True), SPPF(8, 8), ConvBNLeaky(8, 8, 3)
        )
        self.predict = nn.Conv2d(8, 6, 1)
        nn.init.normal_(self.layers[0].bn.bias)
        nn.init.zeros_(self.layers[0].bn.weight[:1]), nn.init.constant_(self.layers[0].bn.bias[:1], 5.0)

    def forward(self, images):
        return self.predict(self.layers(images)).flatten(2).transpose(1, 2)  # (B, A, 6)

    def decode(self, output):
        return output[..., :4], output[..., 4:]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = fuse(Small()).requires_grad_(False)
    images = torch.rand(4, 3, SIZE, SIZE)
    rounding = calibrate(model, images.split(1), 100)
    return model, rounding, trace_int8(rounding, SIZE, dynamic=False), images


def test_the_graph_computes_what_the_rounding_model_does(made):
    """Integer sums are exact and float32 ones are not, so single numbers may fall on the other side of a step."""
    model, rounding, graph, images = made
    session = open_session(graph.SerializeToString())
    weight = model.predict.weight.flatten(1).abs().sum(1).max()
    last = rounding.layers[3].int8.output
    step = float(weight * last.grid()[0])
    for image in images.split(1):
        expected = rounding(image).numpy()
        found = np.concatenate(session.run(None, {"images": image.numpy()}), axis=-1)
        differs = np.abs(found - expected)
        assert differs.max() < 3 * step and (differs > 1e-4).mean() < 0.05
        assert np.abs(model(image).numpy() - expected).mean() > 10 * differs.mean()  # rounding itself costs more


def test_the_file_holds_integers(made):
    from onnx import numpy_helper

    kinds = {i.name: numpy_helper.to_array(i).dtype for i in made[2].graph.initializer}
    weights = {name: kind for name, kind in kinds.items() if "conv.weight" in name and name.endswith(".integers")}
    assert len(weights) == 6 and set(weights.values()) == {np.dtype(np.int8)}
    assert not any(name.endswith("conv.weight") for name in kinds) and kinds["detector.predict.weight"] == np.float32
    assert any(kind == np.int32 for name, kind in kinds.items() if "bias" in name)


def test_models_without_an_int8_form_are_refused():
    with pytest.raises(UserError, match=r"rtdetr_l has no int8 form: .* do not round to 8 bits"):
        check_quantizable(nn.Sequential(nn.Conv2d(3, 3, 1)), "rtdetr_l")
