"""The queries of a DETR's decoder that a term compares; the loss is losses.queries.query_agreement."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from distill.given_boxes import to_student_labels
from distill.term_inputs import TermInputs


def earlier_and_last_layer(inputs: TermInputs) -> dict[str, Any]:
    """Logits (B, L - 1, Q, K) and boxes (B, L - 1, Q, 4) of the student: s_ of its decoder layers 1 to L - 1, t_ of L.

    A query keeps its place from layer to layer. ValueError for a student without an earlier decoder layer.
    """
    logits, boxes = (getattr(inputs.s_output, name, None) for name in ("layer_logits", "layer_boxes"))
    if logits is None or boxes is None or logits.shape[1] < 3:  # proposals, an earlier layer, the last one
        raise ValueError("the student has no earlier decoder layer that its last one could teach; an RT-DETR has")
    pairs: dict[str, Tensor] = {}
    for name, of_layers in (("logits", logits), ("boxes", boxes)):
        earlier = of_layers[:, 1:-1]
        pairs |= {f"s_{name}": earlier, f"t_{name}": of_layers[:, -1:].detach().expand_as(earlier)}
    return pairs


def of_objects(inputs: TermInputs) -> dict[str, Any]:
    """Logits (N, L, J) and boxes (N, L, 4) of N denoising queries of the labelled objects, for the student's L layers.

    t_ are those of the teacher's last layer, for each of the L. J are the classes that both models have; an object of
    another class makes no query, and the noise draws labels of these classes alone. repeats is the number of groups of
    queries, each with every object once. The draws use torch's global CPU generator. ValueError unless both models
    decode such queries.
    """
    for role, model in (("student", inputs.student), ("teacher", inputs.teacher)):
        if not hasattr(model, "decode_queries"):
            raise ValueError(f"the {role} has no decoder that takes queries made from objects; an RT-DETR has")
    targets, device = inputs.targets, inputs.targets.labels.device
    every = torch.arange(inputs.student.num_classes, device=device)
    s_columns, t_columns = (every, every) if inputs.classes is None else (c.to(device) for c in inputs.classes)
    places = to_student_labels(targets.labels, every[: len(s_columns)], s_columns)  # (G,), of the J classes, or -1
    shared = dataclasses.replace(targets, labels=places)[places >= 0]
    noisy = inputs.student.make_queries(inputs.s_output, shared, num_classes=len(s_columns))
    image, query = noisy.is_real.nonzero().unbind(1)  # (N,) each

    def decoded_by(model: Any, output: Any, columns: Tensor) -> tuple[Tensor, Tensor]:
        boxes, logits = model.decode_queries(output, dataclasses.replace(noisy, labels=columns[noisy.labels]))
        return logits[image, :, query][..., columns], boxes[image, :, query]

    s_logits, s_boxes = decoded_by(inputs.student, inputs.s_output, s_columns)
    with torch.no_grad():
        t_logits, t_boxes = decoded_by(inputs.teacher, inputs.t_output, t_columns)
    t_logits, t_boxes = t_logits[:, -1:].expand_as(s_logits), t_boxes[:, -1:].expand_as(s_boxes)
    pairs = {"s_logits": s_logits, "t_logits": t_logits, "s_boxes": s_boxes, "t_boxes": t_boxes}
    return pairs | {"repeats": noisy.groups}
