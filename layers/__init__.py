"""Parts that models and losses of several folders share.

transformer     the parts of a plain vision transformer
fusion          fold BatchNorm into the convolution before it
channel_groups  the channels that a narrower model loses together
widths          a model with other widths than its architecture has
over_processes  sums and normalisers of a loss over the processes of a run
precision       the dtype of losses and decoding: at least float32
eval_mode       a module in eval mode for a while
"""
