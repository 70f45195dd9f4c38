"""Narrower models out of wide ones. The channels that belong together: layers/channel_groups.py.

scores   how much a channel matters: BatchNorm's gamma, the size of its weights, at random
inherit  a student that begins as a selection of its teacher's channels
files    the file of widths
"""
