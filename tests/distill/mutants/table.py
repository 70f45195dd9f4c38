"""All rows: one LossCase per loss."""

from tests.distill.mutants import features, fgd, logits, masked, masks, mgd, relations

CASES = [
    *features.CASES,
    *masked.CASES,
    *fgd.CASES,
    *mgd.CASES,
    *relations.CASES,
    *masks.CASES,
    *logits.CASES,
]
