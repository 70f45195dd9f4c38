"""Dataset distillation: a few stored images that train a detector instead of a whole set.

gradient_matching  the algorithm, step by step
mean_gradient      the gradients that are matched
gradient_distance  the distance between them
network_pool       detectors early in their training, whose gradients are matched
synthetic          the stored images, their tiles, and the optimizer of their pixels
coresets, crops    real images chosen by a rule; mosaics of crops
"""
