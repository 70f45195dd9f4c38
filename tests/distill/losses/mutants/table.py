"""All rows: one LossCase per loss."""

from tests.distill.losses.mutants import (
    box_classes,
    crosskd,
    features,
    fgd,
    localization,
    logits,
    masked,
    masks,
    mgd,
    queries,
    relations,
    sigmoid_logits,
)

CASES = [
    *features.CASES,
    *masked.CASES,
    *fgd.CASES,
    *mgd.CASES,
    *relations.CASES,
    *masks.CASES,
    *logits.CASES,
    *sigmoid_logits.CASES,
    *localization.CASES,
    *crosskd.CASES,
    *box_classes.CASES,
    *queries.CASES,
]
