"""The queries of a DETR's decoder that a term compares; the loss is losses.queries.query_agreement."""

from torch import Tensor

from distill.term_inputs import TermInputs


def earlier_and_last_layer(inputs: TermInputs) -> dict[str, Tensor]:
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
