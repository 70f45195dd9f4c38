"""Dataset distillation: a few stored images that train a detector instead of a whole set.

gradient_matching  the algorithm, step by step
mean_gradient      the gradients that are matched
gradient_distance  the distance between them
network_pool       detectors early in their training, whose gradients are matched
head_matching      the same where it works: a frozen backbone and a linear head to learn, step by step
linear_head        that head: its loss, gradient and curvature, and the one head that a set of images trains
synthetic          the stored images, their tiles, and the optimizer of their pixels
coresets, crops    real images chosen by a rule; mosaics of crops
"""
