"""`python -m engine.search`: the widths and depths of a YOLOv8 under a limit of FLOPs.

config    the section `search` of a config
space     which shapes there are, how one is drawn and how it mutates
methods   random search, regularised evolution, successive halving
proxies   what a shape promises before it is trained: synflow, the norm of its gradient
kendall   how well one order agrees with another
table     search.md and search.json
"""
