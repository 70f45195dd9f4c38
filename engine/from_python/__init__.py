"""What retort.py is made of: Retort from Python and from notebooks.

found      the detections of a picture, as a user holds them
model      a detector with its class names: from a file, a run or an architecture's name; predict, evaluate
changes    keyword arguments of a call -> overrides of a config
"""
