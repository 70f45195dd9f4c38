"""`python -m engine.pruning`: a trained detector without the channels that matter least (distill/pruning)."""
