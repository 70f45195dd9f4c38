"""All rows: one LossCase per loss."""

from tests.distill.mutants import features, logits

CASES = [*features.CASES, *logits.CASES]
