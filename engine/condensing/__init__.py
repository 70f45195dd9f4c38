"""What condense.py is made of; the learning itself is distill/condense/gradient_matching.py.

config     the section `condense` of a config, and the Task of one set
methods    from real pictures to those that a set begins with
set_files  the set on disk
"""
