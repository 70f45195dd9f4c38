"""Narrower models out of wide ones. The channels that belong together: layers/channel_groups.py.

scores   how much a channel matters: BatchNorm's gamma, the size of its weights, the loss without it, at random
cut      the channels that stay under a limit of FLOPs
cost     FLOPs of given widths
inherit  a student that begins as a selection of its teacher's channels
files    the file of widths
"""
