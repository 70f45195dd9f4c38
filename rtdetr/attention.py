"""Attention of several heads, in the parameters of torch's own, which released weights have."""

import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.MultiheadAttention):
    """queries (B, Q, D), keys and values (B, S, D) -> (B, Q, D); M heads of D / M channels (arXiv:1706.03762).

        out = concat_m softmax(q_m k_m^T / sqrt(D / M)) v_m W_o + b_o,    q = queries W_q + b_q,  k, v likewise

    is_hidden (B, Q, S) bool: True where a query does not see a key. torch's own `forward` joins batch and length in one
    dimension; a program that torch.export makes of it with a free batch then refuses a single image.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, batch_first=True)

    def forward(  # type: ignore[override]  # one result, and one mask
        self, queries: Tensor, keys: Tensor, values: Tensor, is_hidden: Tensor | None = None
    ) -> Tensor:
        inputs = zip((queries, keys, values), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x, w, b in inputs)
        is_visible = None if is_hidden is None else ~is_hidden[:, None]  # (B, 1, Q, S)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible)  # (B, M, Q, D / M)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
