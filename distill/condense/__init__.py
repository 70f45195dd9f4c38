"""Dataset distillation: a few stored images that train a detector instead of a whole set.

gradient_matching  the algorithm, step by step; mean_gradient and gradient_distance are its two quantities
network_pool       the detectors whose gradients are matched, early in their training
synthetic          the stored images, their tiles, and how pixels move
coresets, crops    real images chosen by a rule; mosaics of crops
"""
