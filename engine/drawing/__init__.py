"""Draws detections, feature maps and the plots of a run.

detections  boxes on a picture (Pillow)
fonts       a font that has the characters of a text
heat_maps   feature maps as colors (Pillow)
plots       curves and tables of a run (matplotlib)
stamp       a line of text above a picture (Pillow)
predictions a model's detections beside the labels (Pillow)
style       palette, sizes and figures of all of these
"""
