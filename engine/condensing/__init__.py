"""The parts of condense.py. Gradient matching itself is in distill/condense/gradient_matching.py.

config     the section `condense` of a config, and the Task of one set
methods    the pictures that a set starts from, chosen or assembled from real ones
set_files  the set on disk
"""
