"""What models and losses of several folders share.

transformer     the plain vision transformer in parts
fusion          BatchNorm folded into the convolution before it
over_processes  sums and normalisers of a loss over the processes of a run
precision       what losses and decoding compute in: at least float32
"""
