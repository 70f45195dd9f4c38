"""The parts of condense.py. Gradient matching itself is in distill/condense/gradient_matching.py.

config           the section `condense` of a config, and the Task of one set
real_pictures    the training pictures of a dataset
frozen_backbone  what a linear head on a released detector reads of them
methods          the pictures that a set starts from, chosen or assembled from real ones
set_files        the set on disk
"""
