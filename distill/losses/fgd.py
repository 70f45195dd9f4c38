"""Focal and global distillation (FGD): imitate the pixels that the teacher attends to, and their relations.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", arXiv:2111.11837.

    L = a sum_fg + b sum_bg                                    fgd_focal
      + g (|A^S_t - A^S_s|_1 + |A^C_t - A^C_s|_1)              fgd_attention
      + l sum (R_t(T) - R_s(S))^2                              fgd_global

All sums run over channels and pixels and are divided by B only, as published, so that the published weights apply
(a, b, g, l = 1e-3, 5e-4, 5e-4, 5e-6 for one-stage detectors, 5e-5, 2.5e-5, 5e-5, 5e-7 for two-stage ones); they belong
to maps of 256 channels. R_s and R_t are two networks, trained with the student; FGD owns them.

Computed in float32 for half-precision inputs, in float64 for float64; the teacher's map is detached, and an empty map
gives 0.

Deliberate differences from the released code: the pixels of a box are those of masks.box_density (there: every pixel
the box touches and one more); the code indexes its (H, W) masks by x first, which transposes them, and ours does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.losses.features import as_map_pair
from distill.losses.keywords import by_keyword
from distill.losses.masked import as_mask
from layers.over_processes import joint_normaliser


@by_keyword
def fgd_focal(
    *,
    s_map: Tensor,
    t_map: Tensor,
    foreground: Tensor,
    temperature: float = 0.5,
    foreground_weight: float = 1e-3,
    background_weight: float = 5e-4,
) -> Tensor:
    """Squared differences weighted by the teacher's attention, foreground and background apart.

        L = 1/B sum_bcp (a M_bp + b N_bp) A^S_bp A^C_bc (t_bcp - s_bcp)^2

    M_bp is 1 / (area of the object's box) inside a box, so that every object weighs alike, and 0 outside all boxes.
    N_bp is 1 / (number of background pixels of image b) where M_bp = 0, and 0 elsewhere. A^S and A^C are the teacher's
    attention, see `attention`.

    Args:
        s_map, t_map: (B, C, H, W).
        foreground: M, (B, 1, H, W), masks.box_density.
        temperature: of the attention.
        foreground_weight, background_weight: a, b.
    Returns:
        scalar ().
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    near = as_mask(foreground, s_map)
    far = (near == 0).to(s_map.dtype)
    far = far / far.sum((1, 2, 3), keepdim=True).clamp(min=1)
    spatial, channel = attention(t_map, temperature)  # (B, 1, H, W), (B, C, 1, 1)
    weight = (foreground_weight * near + background_weight * far) * spatial  # (B, 1, H, W)
    return (weight * channel * (t_map - s_map).square()).sum() / joint_normaliser(len(s_map), s_map)


@by_keyword
def fgd_attention(*, s_map: Tensor, t_map: Tensor, temperature: float = 0.5) -> Tensor:
    """The student attends where, and in which channels, the teacher does.

        L = 1/B sum_bp |A^S(t)_bp - A^S(s)_bp| + 1/B sum_bc |A^C(t)_bc - A^C(s)_bc|

    Args:
        s_map, t_map: (B, C, H, W). temperature: of both attentions.
    Returns:
        scalar (); unweighted (FGD multiplies by its attention_weight).
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    pairs = zip(attention(s_map, temperature), attention(t_map, temperature))
    differences = torch.stack([(t - s).abs().sum() for s, t in pairs])  # (2,)
    return differences.sum() / joint_normaliser(len(s_map), s_map)


@by_keyword
def fgd_global(
    *, s_map: Tensor, t_map: Tensor, s_context: Callable[[Tensor], Tensor], t_context: Callable[[Tensor], Tensor]
) -> Tensor:
    """Match the two maps after a context network has added a summary of the whole image to each of their pixels.

        L = 1/B sum_bcp (R_t(t)_bcp - R_s(s)_bcp)^2

    Args:
        s_map, t_map: (B, C, H, W).
        s_context, t_context: R_s, R_t, each (B, C, H, W) -> (B, C, H, W); GlobalContext. The parameters of both learn,
            those of R_t too: only the teacher's map is detached. Not 0 for s = t, unless R_s = R_t.
    Returns:
        scalar (); unweighted (FGD multiplies by its global_weight).
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    count = joint_normaliser(len(s_map), s_map)
    if s_map.numel() == 0:
        return s_map.sum()
    with torch.autocast(s_map.device.type, enabled=False):  # the convolutions inside run in float32, too
        t_related = t_context(t_map.clone())  # a copy: autograd may not save what comes from torch.inference_mode
        return (t_related - s_context(s_map)).square().sum() / count


def attention(feature_map: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How strong each pixel and each channel is, relative to the others: A^S (B, 1, H, W) and A^C (B, C, 1, 1).

        A^S_b = H W softmax_p(mean_c |f_bcp| / T),    A^C_b = C softmax_c(mean_p |f_bcp| / T)

    Both are 1 on average.
    """
    b, c, h, w = feature_map.shape
    strength = feature_map.abs()
    spatial = strength.mean(1).flatten(1).div(temperature).softmax(1) * (h * w)  # (B, H*W)
    channel = strength.flatten(2).sum(2).div(temperature * max(h * w, 1)).softmax(1) * c  # (B, C)
    return spatial.view(b, 1, h, w), channel.view(b, c, 1, 1)


class GlobalContext(nn.Module):
    """R: a map plus one vector that sums up its image (the block of GCNet, arXiv:1904.11492).

        R(f)_bp = f_bp + W_2 relu(LayerNorm(W_1 sum_q softmax_q(w_k . f_bq) f_bq))

    (B, C, H, W) -> (B, C, H, W), hidden width C // 2. W_2 starts at zero, so R starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)  # w_k
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        assert self.attend.bias is not None
        nn.init.kaiming_normal_(self.attend.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.attend.bias, *self.transform[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, feature_map: Tensor) -> Tensor:
        share = self.attend(feature_map).flatten(2).softmax(-1)  # (B, 1, H*W)
        context = (feature_map.flatten(2) * share).sum(-1)  # (B, C)
        return feature_map + self.transform(context)[:, :, None, None]


class FGD(nn.Module):
    """FGD as one loss: the pixels and channels that the teacher attends to, and the relations of all pixels.

    It owns the two context networks R_s and R_t; their parameters join the optimizer.

    Args:
        channels: C of the maps (after the adapter).
        temperature, foreground_weight (a), background_weight (b), attention_weight (g), global_weight (l): the
            published ones for one-stage detectors.
    """

    def __init__(
        self,
        channels: int,
        *,
        temperature: float = 0.5,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        global_weight: float = 5e-6,
    ) -> None:
        super().__init__()
        self.s_context, self.t_context = GlobalContext(channels), GlobalContext(channels)
        self.temperature = temperature
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.attention_weight, self.global_weight = attention_weight, global_weight

    @by_keyword
    def forward(self, *, s_map: Tensor, t_map: Tensor, foreground: Tensor) -> Tensor:
        """s_map, t_map (B, C, H, W), foreground (B, 1, H, W) from masks.box_density -> scalar ()."""
        focal = fgd_focal(
            s_map=s_map,
            t_map=t_map,
            foreground=foreground,
            temperature=self.temperature,
            foreground_weight=self.foreground_weight,
            background_weight=self.background_weight,
        )
        attended = fgd_attention(s_map=s_map, t_map=t_map, temperature=self.temperature)
        related = fgd_global(s_map=s_map, t_map=t_map, s_context=self.s_context, t_context=self.t_context)
        return focal + self.attention_weight * attended + self.global_weight * related
