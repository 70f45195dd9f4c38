"""Pictures of what was found and learnt.

detections  boxes on a picture, with Pillow alone
fonts       which font has the characters of a text
heat_maps   maps as colors
plots       the curves and tables of a run (matplotlib), drawn predictions (Pillow)
"""
