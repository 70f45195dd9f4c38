"""Distillation losses: pure functions of tensors, and modules for the few that train something. No models, no configs.

features       maps: MSE, cosine, CWD, PKD, attention, score-weighted L2
masks          where to imitate: boxes, anchors (FGFI), positives, class scores; masked and decoupled MSE in masked
fgd, mgd       focal and global distillation; masked generation
relations      between locations and between objects
logits         classes: KL, quality focal, DKD, DIST, soft targets
localization   distributions of box edges
crosskd        the student's maps through the rest of the teacher's head
box_classes    classes of given boxes, sigmoid or softmax on either side
queries        classes and boxes of the same queries of a DETR
keywords       the error of a loss that is called without keywords

`from distill import losses; losses.localization_kl(s_logits=..., t_logits=...)` has every loss that a config can name.
"""

from distill.losses.box_classes import box_class_kl
from distill.losses.crosskd import crosskd_classes, crosskd_edges
from distill.losses.features import (
    attention_transfer,
    channel_correlation,
    channel_wise_kl,
    cosine_distance,
    feature_mse,
    score_weighted_l2,
)
from distill.losses.fgd import FGD
from distill.losses.localization import localization_kl
from distill.losses.logits import (
    TaughtImageHead,
    decoupled_kl,
    image_kl,
    objectness_scaled,
    prediction_correlation,
    quality_focal,
    soft_class_targets,
    softmax_kl,
)
from distill.losses.masked import decoupled_mse, masked_mse
from distill.losses.mgd import MGD
from distill.losses.queries import query_agreement
from distill.losses.relations import instance_distance, location_similarity

__all__ = [
    "FGD",
    "MGD",
    "TaughtImageHead",
    "attention_transfer",
    "box_class_kl",
    "channel_correlation",
    "channel_wise_kl",
    "cosine_distance",
    "crosskd_classes",
    "crosskd_edges",
    "decoupled_kl",
    "decoupled_mse",
    "feature_mse",
    "image_kl",
    "instance_distance",
    "localization_kl",
    "location_similarity",
    "masked_mse",
    "objectness_scaled",
    "prediction_correlation",
    "quality_focal",
    "query_agreement",
    "score_weighted_l2",
    "soft_class_targets",
    "softmax_kl",
]
